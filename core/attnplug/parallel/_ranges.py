"""Which queries of one rank see which keys of another: integers alone, so that both compute the same.

A *range* is `(start, stop)`. Ranks hold ranges of positions of the whole sequence; a rank's *rows* are the indices into
what it holds, its ranges one after the other. Everything here is a pure function of lengths and of the mask.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

Range = tuple[int, int]
OPEN = -1


@dataclass(frozen=True)
class Block:
    """Some rows of queries and some of keys that one call of a kernel covers.

    Attributes:
        queries: rows of the rank that computes.
        keys: rows of the rank that holds them, and, in a `Step`, of what is received from it.
        is_causal: as in the call, within the block.
        window: as in the call, within the block.
        lengths: of the packed sequences in the block; empty in a dense call, and where there is one sequence.
    """

    queries: Range
    keys: Range
    is_causal: bool = False
    window: tuple[int, int] = (OPEN, OPEN)
    lengths: tuple[int, ...] = ()

    @property
    def is_full(self) -> bool:
        """Whether each query sees each key."""
        return not (self.is_causal or self.lengths) and self.window == (OPEN, OPEN)


def size(part: Range) -> int:
    return part[1] - part[0]


def total(ranges: Sequence[Range]) -> int:
    """Return how many rows ranges have together."""
    return sum(stop - start for start, stop in ranges)


def parts_of(rank: int, ranks: int, length: int, folded: bool) -> tuple[Range, ...]:
    """Return the ranges of positions that a rank holds.

    Contiguous, it is part `rank` of `ranks`; folded, the parts `rank` and `2 * ranks - 1 - rank` of `2 * ranks`, so
    that each rank has as much causal work as any other. Parts are cut as `torch.tensor_split` cuts: where the length
    does not divide, the first parts have one more.
    """
    parts = 2 * ranks if folded else ranks
    least, more = divmod(length, parts)

    def part(number: int) -> Range:
        start = number * least + min(number, more)
        return start, start + least + (number < more)

    return joined([part(rank), part(parts - 1 - rank)] if folded else [part(rank)])


def joined(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """Return ascending ranges with those that touch or overlap made one, and without empty ones."""
    found: list[Range] = []
    for start, stop in ranges:
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        elif start < stop:
            found.append((start, stop))
    return tuple(found)


def visible(queries: Range, keys: Range, is_causal: bool, window: tuple[int, int], lower_right: bool) -> Block | None:
    """Return the smallest block of positions that has all that these queries see of these keys; None for nothing.

    Query `i` sees key `j` if `i - left <= j <= i + right`, where causality says `right = 0` and -1 is open. Kernels
    count from the corner of a block, the upper left or the lower right one, so the window is moved there. Once what
    sees nothing is cut off, its sides are never below 0.
    """
    left, right = window
    if is_causal:
        right = 0
    (first, last), (start, stop) = queries, keys
    if left != OPEN:
        start, last = max(start, first - left), min(last, stop + left)
    if right != OPEN:
        stop, first = min(stop, last + right), max(first, start - right)
    if start >= stop or first >= last:
        return None
    ahead = first - start - ((stop - start) - (last - first) if lower_right else 0)
    limits_right = right != OPEN and stop - 1 > first + right
    limits_left = left != OPEN and start < last - 1 - left
    side = right + ahead
    causal = limits_right and side == 0
    moved = (left - ahead if limits_left else OPEN, side if limits_right and not causal else OPEN)
    return Block((first, last), (start, stop), causal, moved)


def dense_blocks(
    queries: Sequence[Range],
    keys: Sequence[Range],
    is_causal: bool,
    window: tuple[int, int],
) -> tuple[Block, ...]:
    """Return blocks of rows that cover what these queries see of these keys, each pair once."""
    if tuple(queries) == tuple(keys) and window == (OPEN, OPEN):  # positions ascend with rows
        rows = (0, total(queries))
        return (Block(rows, rows, is_causal),)
    found: list[Block] = []
    for part, first in _with_rows(queries):
        of_part: list[Block] = []
        for source, start in _with_rows(keys):
            block = visible(part, source, is_causal, window, lower_right=False)
            if block is not None:
                _append(of_part, _in_rows(block, first - part[0], start - source[0]))
        for block in of_part:
            _append(found, block)
    return tuple(found)


def packed_blocks(
    queries: Sequence[Range],
    keys: Sequence[Range],
    is_causal: bool,
    window: tuple[int, int],
    starts: Sequence[int],
) -> tuple[Block, ...]:
    """Return the same for sequences packed one after the other, which start at `starts` and end at its last.

    Two ranges that do not overlap have at most one sequence in common.
    """
    found: list[Block] = []
    same = tuple(queries) == tuple(keys)
    if same:
        rows = (0, total(queries))
        lengths = tuple(size(piece) for part in queries for piece in _sequences(part, starts))
        found.append(Block(rows, rows, is_causal, window, lengths))
    for part, first in _with_rows(queries):
        for source, start in _with_rows(keys):
            if same and part == source:
                continue
            before, after = sorted((part, source))
            whole = _sequence_at(before[1] - 1, starts)
            if whole[1] <= after[0]:
                continue
            block = visible(_common(part, whole), _common(source, whole), is_causal, window, lower_right=True)
            if block is not None:
                found.append(_in_rows(block, first - part[0], start - source[0]))
    return tuple(found)


def moved_into(block: Block, taken: Sequence[Range]) -> Block:
    """Return a block whose keys are rows of what was taken, these rows one after the other."""
    offset = 0
    for start, stop in taken:
        if start <= block.keys[0] and block.keys[1] <= stop:
            return replace(block, keys=(block.keys[0] - start + offset, block.keys[1] - start + offset))
        offset += stop - start
    raise AssertionError(f"{block.keys} is not among {taken}")


def _append(blocks: list[Block], block: Block) -> None:
    """Append a block, or make it one with the last, if both are full and touch."""
    if blocks and block.is_full and blocks[-1].is_full:
        last = blocks[-1]
        if last.queries == block.queries and last.keys[1] == block.keys[0]:
            blocks[-1] = Block(block.queries, (last.keys[0], block.keys[1]))
            return
        if last.keys == block.keys and last.queries[1] == block.queries[0]:
            blocks[-1] = Block((last.queries[0], block.queries[1]), block.keys)
            return
    blocks.append(block)


def _with_rows(ranges: Sequence[Range]) -> Iterator[tuple[Range, int]]:
    """Yield each range, and the row that it starts at."""
    row = 0
    for part in ranges:
        yield part, row
        row += size(part)


def _in_rows(block: Block, of_queries: int, of_keys: int) -> Block:
    (first, last), (start, stop) = block.queries, block.keys
    return replace(block, queries=(first + of_queries, last + of_queries), keys=(start + of_keys, stop + of_keys))


def _sequences(part: Range, starts: Sequence[int]) -> Iterator[Range]:
    """Yield what a range has of each sequence that it has something of."""
    for start, stop in pairwise(starts):
        piece = max(start, part[0]), min(stop, part[1])
        if piece[0] < piece[1]:
            yield piece


def _sequence_at(position: int, starts: Sequence[int]) -> Range:
    number = bisect_right(starts, position)
    return starts[number - 1], starts[number]


def _common(part: Range, other: Range) -> Range:
    return max(part[0], other[0]), min(part[1], other[1])
