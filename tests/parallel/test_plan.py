"""The plan of a ring, in integers: every pair that may be seen is computed once, and nothing else is sent."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnplug.parallel._plan import Layout, steps
from attnplug.parallel._ranges import Block, Range, parts_of, total

SIDES = st.integers(-1, 40)


def positions(ranges: tuple[Range, ...]) -> list[int]:
    return [position for start, stop in ranges for position in range(start, stop)]


def sees(i: int, j: int, is_causal: bool, window: tuple[int, int]) -> bool:
    left, right = window
    return (not is_causal or j <= i) and (left < 0 or j >= i - left) and (right < 0 or j <= i + right)


def pairs_of(block: Block, lower_right: bool) -> set[tuple[int, int]]:
    """Return the rows of queries and of taken keys that a kernel would compute for a block."""
    (first, last), (start, stop) = block.queries, block.keys
    pieces = [(0, last - first, 0, stop - start)]
    if block.lengths:
        ends = [sum(block.lengths[:n]) for n in range(len(block.lengths) + 1)]
        pieces = [(a, b, a, b) for a, b in pairwise(ends)]
    found = set()
    for a, b, c, d in pieces:
        off = (d - c) - (b - a) if lower_right else 0
        for i in range(b - a):
            found |= {
                (first + a + i, start + c + j) for j in range(d - c) if sees(i + off, j, block.is_causal, block.window)
            }
    return found


def check(layout: Layout, sequence_of: list[int] | None = None) -> None:
    """Hold what all ranks compute against what the mask says, and what they send against what is needed."""
    lower_right = layout.lower_right or bool(layout.starts)
    computed: dict[tuple[int, int], int] = {}
    for rank in range(layout.ranks):
        queries = positions(layout.ranges(rank))
        for step in steps(layout, rank):
            keys = positions(layout.ranges(step.source, of_keys=True))
            taken = [keys[row] for row in positions(step.taken)]
            used = set()
            for block in step.blocks:
                for row, column in pairs_of(block, lower_right):
                    pair = queries[row], taken[column]
                    computed[pair] = computed.get(pair, 0) + 1
                    used.add(column)
            assert step.source == rank or used == set(range(len(taken))), "a key was sent that nobody sees"
            sent = [other.given for other in steps(layout, step.source) if other.target == rank and other.given]
            assert step.source == rank or sent == ([step.taken] if step.taken else [])
    expected = {
        (i, j)
        for i in range(layout.queries)
        for j in range(layout.keys)
        if sees(i, j, layout.is_causal, layout.window) and (sequence_of is None or sequence_of[i] == sequence_of[j])
    }
    assert computed == dict.fromkeys(expected, 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(12, 40), st.booleans(), st.tuples(SIDES, SIDES), st.booleans())
def test_each_pair_that_may_be_seen_is_computed_once(
    ranks: int, length: int, is_causal: bool, window: tuple[int, int], lower_right: bool
) -> None:
    check(Layout(ranks, length, length, is_causal, window, lower_right))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(0, 20), min_size=1, max_size=6), st.booleans(), st.tuples(SIDES, SIDES))
def test_the_same_holds_for_packed_sequences(
    ranks: int, lengths: list[int], is_causal: bool, window: tuple[int, int]
) -> None:
    lengths = [*lengths, 12]
    starts = tuple(sum(lengths[:n]) for n in range(len(lengths) + 1))
    sequence_of = [n for n, length in enumerate(lengths) for _ in range(length)]
    check(Layout(ranks, starts[-1], starts[-1], is_causal, window, True, starts), sequence_of)


@given(st.integers(1, 9), st.integers(1, 200), st.booleans())
def test_parts_cover_a_sequence_once_and_differ_by_two_positions_at_most(ranks: int, length: int, folded: bool) -> None:
    parts = [parts_of(rank, ranks, length, folded) for rank in range(ranks)]
    assert sorted(position for part in parts for position in positions(part)) == list(range(length))
    assert max(map(total, parts)) - min(map(total, parts)) <= (2 if folded else 1)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_folded_ranks_have_equal_work_and_a_causal_ring_sends_three_quarters_of_a_full_one(ranks: int) -> None:
    layout = Layout(ranks, 16 * ranks, 16 * ranks, is_causal=True)
    work = {
        sum(len(pairs_of(block, False)) for step in steps(layout, rank) for block in step.blocks)
        for rank in range(ranks)
    }
    assert len(work) == 1
    received = [sum(total(step.taken) for step in steps(layout, rank)[1:]) for rank in range(ranks)]
    assert sum(received) == 3 * ranks * (ranks - 1) * 16 // 4


def test_keys_pass_no_further_than_a_window_reaches() -> None:
    layout = Layout(8, 8 * 16, 8 * 16, window=(16, 0))
    taken = [[(step.source, total(step.taken)) for step in steps(layout, rank)[1:] if step.taken] for rank in range(8)]
    assert taken == [[]] + [[(rank - 1, 16)] for rank in range(1, 8)]
