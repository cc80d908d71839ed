"""Which tokens of packed sequences take part: what a kernel that writes nothing for the others is corrected by.

Nothing here looks at a length on the host, so nothing waits for the GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnplug_efficient_cuda import layout


class Tokens(NamedTuple):
    """Tokens of packed sequences.

    A token of no sequence has the last one's number, and a position beyond its end.

    Attributes:
        cumulative: lengths of the sequences.
        token: the number of each token.
        sequence: the number of its sequence.
        outside: whether it lies beyond the last sequence.
    """

    cumulative: Tensor
    token: Tensor
    sequence: Tensor
    outside: Tensor

    @classmethod
    def of(cls, cumulative: Tensor, count: int) -> Tokens:
        token = torch.arange(count, dtype=torch.int32, device=cumulative.device)
        sequences = cumulative.shape[0] - 1
        sequence = torch.searchsorted(layout.compact(ends(cumulative)), token, right=True)
        return cls(cumulative, token, sequence.clamp(max=sequences - 1), sequence == sequences)

    def each(self, of_sequence: Tensor) -> Tensor:
        """Return what `of_sequence` says of each token's sequence."""
        return of_sequence.index_select(0, self.sequence)

    def positions(self) -> Tensor:
        """Return where each token stands in its sequence."""
        return self.token - self.each(self.cumulative)


def starts(cumulative: Tensor) -> Tensor:
    """Return where each sequence starts."""
    return cumulative.narrow(0, 0, cumulative.shape[0] - 1)


def ends(cumulative: Tensor) -> Tensor:
    """Return where each sequence ends."""
    return cumulative.narrow(0, 1, cumulative.shape[0] - 1)


def blind(tokens: Tokens, used: Tensor, band: tuple[int, int], queries: Tensor | None) -> Tensor:
    """Return `(Tq,)`, True for queries that see no key.

    Args:
        tokens: of the queries.
        used: `(sequences,)`, how many keys there are.
        band: the keys to the left and right of the diagonal that are seen; -1 is open. The right is 0 or open.
        queries: `(sequences,)`, how many there are, the last at the last key; None if the first is at the first key.
    """
    left, right = band
    seen = tokens.each(used)  # the number of keys up to the last that is seen
    if band == (-1, -1):
        return (seen <= 0) | tokens.outside
    diagonal = tokens.positions()
    if queries is not None:
        diagonal = diagonal + tokens.each(used - queries)
    if right == 0:
        seen = torch.minimum(seen, diagonal + 1)
    if left >= 0:
        seen = seen - (diagonal - left).clamp(min=0)
    return (seen <= 0) | tokens.outside


def unused(tokens: Tokens, used: Tensor, queries: Tensor) -> Tensor:
    """Return `(Tk,)`, True for keys beyond those that are used, of a sequence without queries, or of none."""
    return (tokens.positions() >= tokens.each(used)) | (tokens.each(queries) == 0) | tokens.outside


def clear(tensor: Tensor, nothing: Tensor) -> Tensor:
    """Return `(T, H, E)` with zeros for the tokens of which `nothing (T,)` is True."""
    return tensor.masked_fill(nothing.view(-1, 1, 1), 0.0)
