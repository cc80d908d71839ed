"""Which tokens of packed sequences take part: what a kernel that writes nothing for the others is corrected by.

Nothing here looks at a length on the host, so nothing waits for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnplug_efficient_cuda import layout


@dataclass(frozen=True)
class Tokens:
    """The sequence of each token, its position there, and whether it lies beyond the last one.

    A token of no sequence has the last one's number, and a position beyond its end.
    """

    sequence: Tensor
    position: Tensor
    outside: Tensor

    @classmethod
    def of(cls, cumulative: Tensor, count: int) -> Tokens:
        token = torch.arange(count, dtype=torch.int32, device=cumulative.device)
        sequences = cumulative.shape[0] - 1
        sequence = torch.searchsorted(layout.compact(ends(cumulative)), token, right=True)
        outside = sequence == sequences
        sequence = sequence.clamp(max=sequences - 1)
        return cls(sequence, token - cumulative.index_select(0, sequence), outside)

    def each(self, of_sequence: Tensor) -> Tensor:
        """Return what `of_sequence` says of each token's sequence."""
        return of_sequence.index_select(0, self.sequence)


def starts(cumulative: Tensor) -> Tensor:
    """Return where each sequence starts."""
    return cumulative.narrow(0, 0, cumulative.shape[0] - 1)


def ends(cumulative: Tensor) -> Tensor:
    """Return where each sequence ends."""
    return cumulative.narrow(0, 1, cumulative.shape[0] - 1)


def blind(tokens: Tokens, used: Tensor, shift: Tensor, band: tuple[int, int]) -> Tensor:
    """Return `(Tq,)`, True for queries that see no key.

    Args:
        tokens: of the queries.
        used: `(sequences,)`, how many keys there are.
        shift: `(sequences,)`, the key position at which the first query stands.
        band: the keys to the left and right of the diagonal that are seen; -1 is open. The right is 0 or open.
    """
    left, right = band
    last = tokens.each(used) - 1
    first = torch.zeros_like(last)
    diagonal = tokens.position + tokens.each(shift)
    if right == 0:
        last = torch.minimum(last, diagonal)
    if left >= 0:
        first = (diagonal - left).clamp(min=0)
    return (last < first) | tokens.outside


def unused(tokens: Tokens, used: Tensor, queries: Tensor) -> Tensor:
    """Return `(Tk,)`, True for keys beyond those that are used, of a sequence without queries, or of none."""
    return (tokens.position >= tokens.each(used)) | (tokens.each(queries) == 0) | tokens.outside


def clear(tensor: Tensor, nothing: Tensor) -> Tensor:
    """Return `(T, H, E)` with zeros for the tokens of which `nothing (T,)` is True."""
    return tensor.masked_fill(nothing.view(-1, 1, 1), 0.0)
