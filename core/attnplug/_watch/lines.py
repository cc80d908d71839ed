"""A call as a line of Python that makes one like it, with random numbers, and checks it."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

from torch import Tensor

from attnplug._types import OPEN_WINDOW, CausalVariant, SDPAParams

LONGEST = 64
"""How many sequences are written out; a batch of more is cut there."""


def line_of(impl: str, params: SDPAParams, gradients: Sequence[str] = (), grad_lse: bool = False) -> str:
    """Return the line for a call in the form that kernels know.

    Args:
        impl: the implementation to check.
        params: the call.
        gradients: the arguments whose gradients are wanted.
        grad_lse: whether lse is part of the loss.
    """
    fields = _of_sequences(params) if params.is_varlen else _of_batch(params)
    query, value = params.query, params.value
    fields |= {
        "head_size": query.shape[-1],
        "value_head_size": value.shape[-1] if value.shape[-1] != query.shape[-1] else None,
        "dtype": str(query.dtype).removeprefix("torch."),
        "device": query.device.type if query.device.type != "cpu" else None,
        "is_causal": params.is_causal or None,
        "scale": None if params.scale is None or params.scale == 1 / sqrt(query.shape[-1]) else params.scale,
        "window_size": None if params.window_size == OPEN_WINDOW else params.window_size,
        "softcap": params.softcap or None,
        "sinks": None if params.sinks is None else True,
        "alibi": None if params.alibi_slopes is None else "bh"[-params.alibi_slopes.dim() :],
        "layout": None if query.is_contiguous() else "transposed",
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
        fields["mask"] = "boolean" if is_boolean else "additive"
        fields["mask_dims"] = "".join(
            letter if size > 1 else "1" for letter, size in zip("bhqk", mask.shape, strict=True)
        )
        if not is_boolean and mask.dtype != params.query.dtype:
            fields["mask_dtype"] = str(mask.dtype).removeprefix("torch.")
    return fields


def _of_sequences(params: SDPAParams) -> dict[str, Any]:
    heads, kv_heads = params.query.shape[1], params.key.shape[-2]
    fields: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads if kv_heads != heads else None}
    used = None if params.seqused_k is None else tuple(params.seqused_k.tolist())
    fields["lengths_q"] = _lengths(params.cu_seq_q)[:LONGEST]
    if params.block_table is not None:
        fields["page_size"] = params.key.shape[1]
    if params.cu_seq_k is None:
        fields["lengths_k"] = (used or ())[:LONGEST]
    else:
        fields["lengths_k"] = _lengths(params.cu_seq_k)[:LONGEST]
        fields["used"] = None if used is None else used[:LONGEST]
    return fields


def _lengths(starts: Tensor) -> tuple[int, ...]:
    return tuple(starts.diff().tolist())
