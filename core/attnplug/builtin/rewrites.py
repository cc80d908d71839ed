"""The ways round what PyTorch gets wrong: each returns a call of the same result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import pad

from attnplug import SDPAParams
from attnplug.builtin.masks import as_wide

BATCH, HEADS, QUERIES = -4, -3, -2
ALIGNMENT = 16
"""Bytes of the widest load of CUDA kernels: tensors, and their rows, must start at a multiple of it."""


def with_positive_scale(params: SDPAParams) -> SDPAParams:
    """Return a call of the same logits: the sign, or the zero, goes into the queries."""
    assert params.scale is not None
    sign = -1 if params.scale < 0 else 0
    return replace(params, query=params.query * sign, scale=-params.scale or 1.0)


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
    """Return a call with the last query twice; what calls PyTorch leaves the row of the second out."""
    query, mask = params.query, params.attn_mask
    if mask is not None:
        if mask.shape[-2] == 1:
            mask = mask.expand(*mask.shape[:-2], query.shape[-2] + 1, mask.shape[-1])
        else:
            mask = torch.cat([mask, mask.narrow(-2, mask.shape[-2] - 1, 1)], -2)
    return replace(params, query=torch.cat([query, query.narrow(-2, query.shape[-2] - 1, 1)], -2), attn_mask=mask)


def with_a_fifth_dimension(params: SDPAParams) -> SDPAParams:
    """Return a call that PyTorch has only its formula for; what calls it takes the dimension away."""
    mask = params.attn_mask
    query, key, value = (tensor.unsqueeze(0) for tensor in (params.query, params.key, params.value))
    return replace(params, query=query, key=key, value=value, attn_mask=None if mask is None else mask.unsqueeze(0))


def with_dropout_between_steps(params: SDPAParams) -> SDPAParams:
    """Return a call with the next larger probability, which is the same in the float32 of kernels."""
    return replace(params, dropout=params.dropout * (1 + 2**-52))


def batch_or_heads(params: SDPAParams) -> int:
    return BATCH if params.query.shape[BATCH] > 1 else HEADS


def halves(params: SDPAParams, dim: int) -> tuple[SDPAParams, SDPAParams]:
    """Return a dense call as two, of the first and of the other batches, heads or queries."""

    def part(tensor: Tensor | None, second: bool) -> Tensor | None:
        if tensor is None or tensor.dim() < -dim or tensor.shape[dim] == 1:
            return tensor  # which broadcasts
        size = tensor.shape[dim]
        return tensor.narrow(dim, size // 2, size - size // 2) if second else tensor.narrow(dim, 0, size // 2)

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
    for at, stride in enumerate(strides):
        if stride % elements and tensor.shape[at] != 1:
            return False
    return step == 1 or tensor.shape[-1] == 1


def starts_aligned(tensor: Tensor) -> bool:
    """Whether a tensor starts aligned; the memory that it lies in does, as all of PyTorch's.

    A trace has no storage to ask, and would break where it does; Inductor copies inputs that are not aligned.
    """
    return is_compiling() or tensor.storage_offset() * tensor.element_size() % ALIGNMENT == 0
