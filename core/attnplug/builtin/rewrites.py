"""Workarounds for what PyTorch gets wrong: each returns an equivalent call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import pad

from attnplug import SDPAParams
from attnplug._tracing import holds_in_trace
from attnplug.builtin.masks import as_wide

BATCH, HEADS, QUERIES = -4, -3, -2
ALIGNMENT = 16
"""Bytes of the widest load of CUDA kernels: tensors, and their rows, must start at a multiple of it."""


def with_positive_scale(params: SDPAParams) -> SDPAParams:
    """Return a call of the same logits: the sign, or the zero, goes into the queries."""
    return params.with_positive_scale()[0]


def with_values_of_zero(params: SDPAParams) -> SDPAParams:
    """Return a call without dropout of the same result and gradients, which are 0."""
    everywhere = torch.ones((), dtype=torch.bool, device=params.value.device)
    return replace(params, value=params.value.masked_fill(everywhere, 0.0), dropout=0.0)


def with_a_mask_of_double(params: SDPAParams) -> SDPAParams:
    return replace(params, attn_mask=as_wide(params.attn_mask, params.query.dtype))


def with_a_mask_of_two_dimensions(params: SDPAParams) -> SDPAParams:
    return replace(params, attn_mask=torch.atleast_2d(params.attn_mask))


def with_a_mask_of_dense_rows(params: SDPAParams) -> SDPAParams:
    mask = params.attn_mask
    return replace(params, attn_mask=_copied(mask.expand(*mask.shape[:-1], params.key.shape[-2]), False))


def with_hidden_keys(params: SDPAParams) -> SDPAParams:
    """Return a call with eight keys more, which the mask hides from each query."""
    mask = params.attn_mask
    hidden = False if mask.dtype is torch.bool else float("-inf")
    key, value = (pad(tensor, (0, 0, 0, 8)) for tensor in (params.key, params.value))
    return replace(params, key=key, value=value, attn_mask=pad(mask, (0, 8), value=hidden))


def with_another_query(params: SDPAParams) -> SDPAParams:
    """Return a call with the last query twice; the caller drops the last row of the result."""
    query, mask = params.query, params.attn_mask
    if mask is not None:
        if mask.shape[-2] == 1:
            mask = mask.expand(*mask.shape[:-2], query.shape[-2] + 1, mask.shape[-1])
        else:
            mask = torch.cat([mask, mask.narrow(-2, mask.shape[-2] - 1, 1)], -2)
    return replace(params, query=torch.cat([query, query.narrow(-2, query.shape[-2] - 1, 1)], -2), attn_mask=mask)


def with_a_fifth_dimension(params: SDPAParams) -> SDPAParams:
    """Return a call for which PyTorch has only its formula, which needs the memory of all logits.

    The caller removes the dimension again.
    """
    mask = params.attn_mask
    query, key, value = (tensor.unsqueeze(0) for tensor in (params.query, params.key, params.value))
    return replace(params, query=query, key=key, value=value, attn_mask=None if mask is None else mask.unsqueeze(0))


def with_dropout_between_steps(params: SDPAParams) -> SDPAParams:
    """Return a call with a probability larger by one or two units in the last place, the same in float32."""
    return replace(params, dropout=params.dropout * (1 + 2**-52))


def divisible(params: SDPAParams) -> int | None:
    """Return along which dimension of its query a dense call can be halved; None for one causal head, one query."""
    shape = params.query.shape
    if holds(shape[BATCH] > 1):
        return BATCH
    if holds(shape[HEADS] > 1):
        return HEADS
    return QUERIES if not params.is_causal and holds(shape[QUERIES] > 1) else None


def halves(params: SDPAParams, dim: int) -> tuple[SDPAParams, SDPAParams]:
    """Return a dense call as two, of the first and of the other batches, heads or queries."""
    whole, groups = params.query.shape[dim], params.key.shape[dim]
    if dim != HEADS or groups == 1:
        groups = whole
    first = groups // 2 * (whole // groups)  # query heads that share keys stay together

    def part(tensor: Tensor | None, second: bool) -> Tensor | None:
        if tensor is None or tensor.dim() < -dim or tensor.shape[dim] == 1:
            return tensor  # which broadcasts
        size = tensor.shape[dim]
        at = first * size // whole
        return tensor.narrow(dim, at, size - at) if second else tensor.narrow(dim, 0, at)

    def half(second: bool) -> SDPAParams:
        names = ("query", "attn_mask") if dim == QUERIES else ("query", "key", "value", "attn_mask")
        tensors: dict[str, Any] = {name: part(getattr(params, name), second) for name in names}
        return replace(params, **tensors)

    return half(False), half(True)


def aligned(params: SDPAParams) -> SDPAParams:
    """Return the call with copies of what is misaligned. PyTorch pads the rows of a mask by itself."""
    query, key, value = (_copied(tensor, is_aligned(tensor)) for tensor in (params.query, params.key, params.value))
    mask = params.attn_mask
    if mask is not None:
        mask = _copied(mask, starts_aligned(mask))
    return replace(params, query=query, key=key, value=value, attn_mask=mask)


def _copied(tensor: Tensor, is_right: bool) -> Tensor:
    return tensor if is_right else tensor.clone(memory_format=torch.contiguous_format)


def is_aligned(tensor: Tensor) -> bool:
    """Whether the widest loads can read the rows of a tensor: their numbers are dense, and each starts aligned."""
    if not starts_aligned(tensor):
        return False
    elements = ALIGNMENT // tensor.element_size()
    *strides, step = tensor.stride()
    ask = holds if is_compiling() else bool  # once, and not for each dimension
    for at, stride in enumerate(strides):
        if not ask(stride % elements == 0) and not ask(tensor.shape[at] == 1):
            return False
    return ask(step == 1) or ask(tensor.shape[-1] == 1)


def starts_aligned(tensor: Tensor) -> bool:
    """Whether a tensor starts aligned; the memory that it lies in does, as all of PyTorch's.

    A trace cannot ask, and assumes it. Of a graph's inputs Inductor copies those that are not; views that are made
    in the graph, and inputs of other backends, are not checked.
    """
    return is_compiling() or tensor.storage_offset() * tensor.element_size() % ALIGNMENT == 0


def holds(comparison: bool) -> bool:
    """Whether a comparison of sizes holds: in a trace as `holds_in_trace` says."""
    return holds_in_trace(comparison) if is_compiling() else comparison
