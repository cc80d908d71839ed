"""Results over parts of the keys, made one by their lse: the softmax over all keys is a weighted sum of them.

With `lse` of all parts, part `b` has the weight `exp(lse_b - lse)`. Sums are made in float32, or float64 for float64.
A row that has seen no key yet has an lse of minus infinity, and every weight of it is 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 16 * 2**20
"""Bytes of sums that are merged at once: with what is merged, less than the last cache of a server's CPU or GPU."""


def weights(part: Tensor, whole: Tensor) -> Tensor:
    """Return `exp(part - whole)`, 0 where `whole` is minus infinity."""
    return torch.exp(part - whole.masked_fill(whole == -math.inf, 0.0))


class Merged:
    """What has been merged so far of rows `(..., rows, Ev)`, with the lse of each row in `(..., rows)`.

    Args:
        rows: the shape of lse.
        size: `Ev`.
        dtype: of the sums.
    """

    def __init__(self, rows: tuple[int, ...], size: int, dtype: torch.dtype) -> None:
        self._shape, self._dtype = (*rows, size), dtype
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, first: int, last: int, out: Tensor, lse: Tensor) -> None:
        """Merge the result of some rows over keys that they have not seen yet."""
        rows = slice(first, last)
        if self._out is None or self._lse is None:
            if last - first == self._shape[-2]:
                self._out, self._lse = out.to(self._dtype, copy=True), lse.to(self._dtype, copy=True)
                return
            self._out = out.new_zeros(self._shape, dtype=self._dtype)
            self._lse = lse.new_full(self._shape[:-1], -math.inf, dtype=self._dtype)
        merged = torch.logaddexp(self._lse[..., rows], lse)
        _move(self._out[..., rows, :], out, weights(lse, merged).unsqueeze(-1))
        self._lse[..., rows] = merged

    def result(self, query: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return out and lse, with `sinks (Hq,)`, one more logit in each denominator, of rows `(..., Hq, rows)`."""
        if self._out is None or self._lse is None:  # no block: these rows see nothing
            self._out = query.new_zeros(self._shape, dtype=self._dtype)
            self._lse = query.new_full(self._shape[:-1], -math.inf, dtype=self._dtype)
        if sinks is None:
            return self._out, self._lse
        merged = torch.logaddexp(self._lse, sinks.to(self._dtype)[:, None])
        return self._out.mul_(weights(self._lse, merged).unsqueeze(-1)), merged


def _move(sums: Tensor, part: Tensor, weight: Tensor) -> None:
    """Add `weight * (part - sums)` to sums, in place.

    A few rows at a time, so that `part` in the dtype of the sums is written to, and read from, the cache alone: memory
    sees 10 bytes for each number of a half type, rather than 18.
    """
    if part.dtype == sums.dtype:
        sums.lerp_(part, weight)
        return
    rows = max(1, CHUNK * sums.shape[-2] // (sums.numel() * sums.element_size()))
    for some, of_part, of_weight in zip(
        sums.split(rows, -2), part.split(rows, -2), weight.split(rows, -2), strict=True
    ):
        some.lerp_(of_part.to(sums.dtype), of_weight)
