"""A call as a line of Python that makes one like it, with random numbers, and checks it."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from attnplug._accuracy import Mistake
from attnplug._call.device import name_of_dtype
from attnplug._types import OPEN_WINDOW, CausalVariant, SDPAParams

LONGEST = 64
"""How many sequences are written out; of a batch of more, those around the one that is wrong."""


def line_of(
    impl: str, params: SDPAParams, mistake: Mistake, gradients: Sequence[str] = (), grad_lse: bool = False
) -> str:
    """Return the line for a call in the form that kernels know.

    Args:
        impl: the implementation to check.
        params: the call.
        mistake: what is wrong with it.
        gradients: the arguments whose gradients are wanted.
        grad_lse: whether lse is part of the loss.
    """
    fields = _of_sequences(params, mistake) if params.is_varlen else _of_batch(params)
    query, key, value = params.query, params.key, params.value
    fields |= {
        "head_size": query.shape[-1],
        "value_head_size": value.shape[-1] if value.shape[-1] != query.shape[-1] else None,
        "dtype": name_of_dtype(query.dtype),
        "device": query.device.type if query.device.type != "cpu" else None,
        "is_causal": params.is_causal or None,
        "scale": None if params.scale is None or params.scale == 1 / sqrt(query.shape[-1]) else params.scale,
        "window_size": None if params.window_size == OPEN_WINDOW else params.window_size,
        "softcap": params.softcap or None,
        "sinks": None if params.sinks is None else True,
        "alibi": None if params.alibi_slopes is None else "bh"[-params.alibi_slopes.dim() :],
        "layout": _layout(query, key, value),
        "numbers_layout": _numbers_layout(params),
        "lse": params.return_lse or None,
        "gradients": tuple(gradients) or None,
        "lse_gradient": grad_lse or None,
    }
    given = ", ".join(f"{name}={value!r}" for name, value in fields.items() if value is not None)
    return f"from attnplug.testing import Call; Call({given}).check({impl!r})"


def _of_batch(params: SDPAParams) -> dict[str, Any]:
    (batch, heads, queries, _), (_, kv_heads, keys, _) = params.query.shape, params.key.shape
    fields: dict[str, Any] = {"batch": batch, "heads": heads, "kv_heads": kv_heads if kv_heads != heads else None}
    fields |= {"queries": queries, "keys": keys}
    if params.causal_variant is CausalVariant.LOWER_RIGHT:
        fields["causal_variant"] = "LOWER_RIGHT"
    if params.seqused_k is not None:
        fields["used"] = tuple(params.seqused_k.tolist())
    mask: Tensor | None = params.attn_mask
    if mask is not None:
        is_boolean = not mask.is_floating_point()
        fields["mask"] = _kind_of(mask)
        fields["mask_dims"] = "".join(
            letter if size > 1 else "1" for letter, size in zip("bhqk", mask.shape, strict=True)
        )
        if not is_boolean and mask.dtype != params.query.dtype:
            fields["mask_dtype"] = name_of_dtype(mask.dtype)
        fields["mask_layout"] = _layout(mask)
    return fields


def _kind_of(mask: Tensor) -> str:
    """Return what the mask of a line is: one with rows that see no key if this has some, or is nothing else."""
    seen = mask if mask.dtype == torch.bool else mask != -torch.inf
    blind = ~seen.any(-1)
    kind = "boolean" if mask.dtype == torch.bool else "additive"
    if blind.any() and (mask.shape[-2] > 1 or blind.all()):  # each third row, of one row that one
        return f"{kind} blind"
    return kind if mask.dtype == torch.bool or seen.all() else f"{kind} -inf"


def _layout(*tensors: Tensor) -> str | None:
    """Return how the first that is not contiguous lies in memory."""
    for tensor in tensors:
        if not tensor.is_contiguous():
            if tensor.stride(-1) != 1:
                return "column-major" if tensor.mT.is_contiguous() else "strided"
            return "expanded" if tensor.stride(-3) == 0 else "transposed"
    return None


def _numbers_layout(params: SDPAParams) -> str | None:
    """Return how the first of lengths, pages, slopes and sinks that is not contiguous lies in memory.

    A stride of 0 is one of those that a kernel misreads; the line has numbers that differ.
    """
    names = ("cu_seq_q", "cu_seq_k", "seqused_k", "block_table", "alibi_slopes", "sinks")
    given = (tensor for name in names if (tensor := getattr(params, name)) is not None)
    apart = next((tensor for tensor in given if not tensor.is_contiguous()), None)
    if apart is None:
        return None
    if apart.stride(-1) == 1:
        return "framed"
    return "column-major" if apart.dim() == 2 and apart.mT.is_contiguous() else "strided"


def _of_sequences(params: SDPAParams, mistake: Mistake) -> dict[str, Any]:
    heads, kv_heads = params.query.shape[1], params.key.shape[-2]
    fields: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads if kv_heads != heads else None}
    used = None if params.seqused_k is None else tuple(params.seqused_k.tolist())
    lengths = _lengths(params.cu_seq_q)
    first = max(0, min(_sequence_of(params, mistake) - LONGEST // 2, len(lengths) - LONGEST))
    shown = slice(first, first + LONGEST)
    fields["lengths_q"] = lengths[shown]
    if params.block_table is not None:
        fields["page_size"] = params.key.shape[1]
    if params.cu_seq_k is None:
        fields["lengths_k"] = (used or ())[shown]
    else:
        fields["lengths_k"] = _lengths(params.cu_seq_k)[shown]
        fields["used"] = None if used is None else used[shown]
    return fields


def _sequence_of(params: SDPAParams, mistake: Mistake) -> int:
    """Return which sequence is wrong; the first where that is not known."""
    starts = params.cu_seq_k if mistake.name in ("key", "value") else params.cu_seq_q
    if starts is None or not mistake.place or mistake.name == "sinks":
        return 0
    token = mistake.place[-1 if mistake.name == "lse" else 0]
    return int((starts[1:] <= token).sum())


def _lengths(starts: Tensor) -> tuple[int, ...]:
    return tuple(starts.diff().tolist())
