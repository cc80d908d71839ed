"""Results held against the contract's rule, where a test has a reference of its own.

A test that has none calls `attnplug.testing.assert_right`, which computes one. The numbers are imported from the
private module of the rule, because there must be no others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnplug._accuracy.rule import GRADIENT, LSE, OUT, tolerance

__all__ = ["GRADIENT", "OUT", "assert_lse_right", "assert_right", "plain", "plain_in_each_order"]


def assert_right(
    actual: Tensor, ref: Any, low: Tensor | tuple[Tensor, ...], factor: float = OUT, sums: float = 0.0
) -> None:
    """Assert that a result is as near to `ref` as the rule asks.

    Args:
        actual: what an implementation returned.
        ref: the same call in float64, a tensor or an array.
        low: the plain formula run in the input's own dtype. Where few numbers are compared, the largest error of one
            order of rounding is a matter of luck: of several, the worst counts.
        factor: `OUT` or `GRADIENT`.
        sums: the largest sum of absolute values that an element is made of; without it the rule is stricter.
    """
    lows = low if isinstance(low, tuple) else (low,)
    dtype = lows[0].dtype
    assert actual.dtype == dtype, f"dtype {actual.dtype}, expected {dtype}"
    ref = torch.as_tensor(ref).to(actual.device, torch.float64)
    assert all(actual.shape == ref.shape == each.shape for each in lows)
    low_error = max(_largest(each.double() - ref) for each in lows)
    allowed = tolerance(factor, low_error, ref, dtype, sums, dtype)
    error = _largest(actual.double() - ref)
    assert error <= allowed, f"largest error {error:.3g}, allowed {allowed:.3g}"


def assert_lse_right(actual: Tensor, ref: Any, dtype: torch.dtype) -> None:
    """Assert that a lse, for inputs of `dtype`, is near `ref`, relative to `max(1, |lse|)`."""
    allowed = LSE[dtype]
    ref = torch.as_tensor(ref).to(actual.device, torch.float64)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(actual.isinf(), ref.isinf())
    finite = ~ref.isinf()
    error = _largest((actual.double() - ref)[finite] / ref[finite].abs().clamp(min=1))
    assert error <= allowed, f"largest relative error of lse {error:.3g}, allowed {allowed:.3g}"


def plain(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Return `softmax(q k.T / sqrt(E) + mask) v`, every operation in the input's own dtype."""
    logits = query @ key.mT * query.shape[-1] ** -0.5
    return torch.softmax(logits if attn_mask is None else logits + attn_mask, dim=-1) @ value


def plain_in_each_order(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Return what `plain` returns, rounded in the orders that kernels have.

    The scale comes after the product, before it, or by halves into query and key; the division after the product
    over keys, or before.
    """
    root = query.shape[-1] ** -0.25
    results = [plain(query, key, value, attn_mask)]
    for logits in (query * root**2 @ key.mT, (query * root) @ (key * root).mT):
        logits = logits if attn_mask is None else logits + attn_mask
        weights = torch.exp(logits - logits.amax(-1, keepdim=True))
        results += [weights @ value / weights.sum(-1, keepdim=True), torch.softmax(logits, dim=-1) @ value]
    return tuple(results)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
