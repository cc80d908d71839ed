"""Results over parts of the keys, made one by their lse: the softmax over all keys is a weighted sum of them.

With `lse` of all parts, part `b` has the weight `exp(lse_b - lse)`. Sums are made in float32, or float64 for float64.
A row that has seen no key yet has an lse of minus infinity, and every weight of it is 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def weights(part: Tensor, whole: Tensor) -> Tensor:
    """Return `exp(part - whole)`, 0 where `whole` is minus infinity."""
    return torch.exp(part - whole.masked_fill(whole == -math.inf, 0.0))


class Merged:
    """What has been merged so far of rows `(..., rows, Ev)`, with the lse of each row in `(..., rows)`."""

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        self.out, self.lse = out, lse
        self._touched = False

    @classmethod
    def nothing(cls, query: Tensor, size: int, dtype: torch.dtype) -> Merged:
        """Return the result over no keys for a query of shape `(..., rows, E)`."""
        rows = query.shape[:-1]
        return cls(query.new_zeros(*rows, size, dtype=dtype), query.new_full(rows, -math.inf, dtype=dtype))

    def add(self, first: int, last: int, out: Tensor, lse: Tensor) -> None:
        """Merge the result of some rows over keys that they have not seen yet."""
        rows = slice(first, last)
        if not self._touched and last - first == self.lse.shape[-1]:
            self.out.copy_(out)
            self.lse.copy_(lse)
            self._touched = True
            return
        self._touched = True
        merged = torch.logaddexp(self.lse[..., rows], lse)
        self.out[..., rows, :].lerp_(out.to(self.out.dtype), weights(lse, merged).unsqueeze(-1))
        self.lse[..., rows] = merged

    def add_sinks(self, sinks: Tensor) -> None:
        """Add `sinks (Hq,)`, one more logit in each row's denominator, with no value; rows are `(..., Hq, rows)`."""
        merged = torch.logaddexp(self.lse, sinks.to(self.lse.dtype)[:, None])
        self.out.mul_(weights(self.lse, merged).unsqueeze(-1))
        self.lse = merged
