"""What a rank does in a ring, step by step: whom it sends what, from whom it gets what, and what it computes then.

At step `t` rank `r` of `n` gets keys from rank `r - t` and sends to rank `r + t`, each what the other needs and no
more: with causality, half a block to those after it, and with a window as far as it reaches. Nothing is passed on, so
that gradients of keys go straight back to their owner, as the kernel rounded them, and are added up there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from attnplug.parallel._ranges import (
    OPEN,
    Block,
    Range,
    dense_blocks,
    joined,
    moved_into,
    packed_blocks,
    parts_of,
    total,
)


@dataclass(frozen=True)
class Layout:
    """A sequence over the ranks of a group, and which query sees which key.

    Attributes:
        ranks: of the group.
        queries: their number on all ranks.
        keys: likewise.
        is_causal, window: as in the call; a causal sequence is folded.
        starts: where packed sequences start, and the end; empty in a dense call.
    """

    ranks: int
    queries: int
    keys: int
    is_causal: bool = False
    window: tuple[int, int] = (OPEN, OPEN)
    starts: tuple[int, ...] = ()

    def ranges(self, rank: int, of_keys: bool = False) -> tuple[Range, ...]:
        """Return the positions that a rank holds."""
        return parts_of(rank, self.ranks, self.keys if of_keys else self.queries, self.is_causal)

    def blocks(self, rank: int, source: int) -> tuple[Block, ...]:
        """Return what a rank computes with the keys of another, in the rows of each."""
        queries, keys = self.ranges(rank), self.ranges(source, of_keys=True)
        if self.starts:
            return packed_blocks(queries, keys, self.is_causal, self.window, self.starts)
        return dense_blocks(queries, keys, self.is_causal, self.window)

    def needed(self, rank: int, source: int) -> tuple[Range, ...]:
        """Return the rows of another rank's keys that a rank needs."""
        return joined(sorted(block.keys for block in self.blocks(rank, source)))


@dataclass(frozen=True)
class Step:
    """One step of one rank.

    Attributes:
        source: the rank whose keys are used.
        target: the rank that is given some of this rank's keys meanwhile.
        taken: rows of the source.
        given: rows of this rank.
        blocks: what is computed; their keys are rows of what was taken.
    """

    source: int
    target: int
    taken: tuple[Range, ...]
    given: tuple[Range, ...]
    blocks: tuple[Block, ...]


@lru_cache(maxsize=256)
def steps(layout: Layout, rank: int) -> tuple[Step, ...]:
    """Return what a rank does. The first step needs its own keys alone, and sends nothing.

    Steps with nothing to send are there too: messages of two ranks are matched by their order, which must be the same
    at both ends, and backward's keys of one step come before its gradients of the step before.
    """
    own = (0, total(layout.ranges(rank, of_keys=True)))
    found = [Step(rank, rank, (own,), (), layout.blocks(rank, rank))]
    for distance in range(1, layout.ranks):
        source, target = (rank - distance) % layout.ranks, (rank + distance) % layout.ranks
        taken, given = layout.needed(rank, source), layout.needed(target, rank)
        blocks = tuple(moved_into(block, taken) for block in layout.blocks(rank, source))
        found.append(Step(source, target, taken, given, blocks))
    return tuple(found)


@lru_cache(maxsize=256)
def kinds(layout: Layout) -> tuple[Block, ...]:
    """Return one block of each kind that any rank computes: a kernel must take them all, or none runs on any rank."""
    found: dict[tuple[object, ...], Block] = {}
    for rank in range(layout.ranks):
        for source in range(layout.ranks):
            for block in layout.blocks(rank, source):
                lengths = block.queries[1] - block.queries[0], block.keys[1] - block.keys[0]
                kind = (block.is_causal, block.window, bool(block.lengths), lengths[0] == lengths[1])
                found.setdefault(kind, block)
    return tuple(found.values())
