"""When a result is right: the one tolerance rule, the contract's, for every implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OUT, GRADIENT = 2.0, 3.0


def assert_right(actual: Tensor, ref: Any, low: Tensor, factor: float = OUT) -> None:
    """Assert `max|actual - ref| <= factor * max|low - ref| + 2 * max|ref + 0.3 - 0.3 - ref|`.

    Args:
        actual: what an implementation returned.
        ref: the same call in float64, a tensor or an array.
        low: the plain formula run in the input's own dtype, which is what one may hope for; the last term
            is computed in this dtype.
        factor: `OUT` or `GRADIENT`.
    """
    assert actual.dtype == low.dtype, f"dtype {actual.dtype}, expected {low.dtype}"
    ref = torch.as_tensor(ref).to(actual.device, torch.float64)
    assert actual.shape == ref.shape == low.shape
    rounded = ref.to(low.dtype)
    tolerance = factor * _largest(low.double() - ref) + 2 * _largest((rounded + 0.3 - 0.3 - rounded).double())
    error = _largest(actual.double() - ref)
    assert error <= tolerance, f"largest error {error:.3g}, allowed {tolerance:.3g}"


def assert_lse_right(actual: Tensor, ref: Any, dtype: torch.dtype) -> None:
    """Assert that a lse, for inputs of `dtype`, is near `ref`, relative to `max(1, |lse|)`."""
    allowed = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-3)
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


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
