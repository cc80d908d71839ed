"""The attention calls over a sequence that several ranks share."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from attnplug._call.prepare import prepare_dense
from attnplug._types import OPEN_WINDOW, SDPAParams
from attnplug.parallel._entries import run_ring
from attnplug.parallel._exchange import as_group


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Any,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window_size: tuple[int, int] = OPEN_WINDOW,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    seqused_k: Tensor | None = None,
    dropout_p: float = 0.0,
    length: int | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Any:
    params = SDPAParams(
        query,
        key,
        value,
        None,
        dropout_p,
        is_causal,
        enable_gqa,
        scale=scale,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        seqused_k=seqused_k,
        return_lse=return_lse,
        max_k=length,
    )
    prepared, rows = prepare_dense(params)
    out, lse = run_ring(prepared, as_group(group), impl)
    out = out.reshape(*rows, out.shape[-1])
    return (out, lse if lse is None else lse.reshape(rows)) if return_lse else out
