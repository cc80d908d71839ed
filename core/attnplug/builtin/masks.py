"""Masks in the one form that PyTorch's leaf kernels read: added to the logits."""

from __future__ import annotations

import torch
from torch import Tensor


def as_additive(attn_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return `attn_mask` as a floating mask: True becomes 0 and False minus infinity.

    The leaf kernels do not convert: given a boolean mask they would add it as 0 and 1.
    """
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return as_wide(attn_mask, dtype)
    zeros = torch.zeros_like(attn_mask, dtype=dtype)
    return zeros.masked_fill_(attn_mask.logical_not(), float("-inf"))


def as_wide(attn_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a float32 mask for float64 queries as float64: PyTorch's CPU kernel reads its bytes as float64."""
    if attn_mask is not None and dtype == torch.float64 and attn_mask.dtype == torch.float32:
        return attn_mask.to(dtype)
    return attn_mask
