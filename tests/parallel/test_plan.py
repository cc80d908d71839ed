"""The plan of a ring, in integers: every pair that may be seen is computed once, and nothing else is sent.

The plan is private. It is tested by itself, because so it can be held against masks for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnplug
from attnplug import Capabilities, Feature, ImplSpec, SDPAParams, parallel
from attnplug.parallel._plan import Layout, steps
from attnplug.parallel._ranges import Block, Range, parts_of, total
from spoiled_kernels import Formula

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


def wider(block: Block) -> Iterator[Block]:
    """Yield the block without each of its limits."""
    left, right = block.window
    if block.is_causal:
        yield replace(block, is_causal=False)
    if left >= 0:
        yield replace(block, window=(-1, right))
    if right >= 0:
        yield replace(block, window=(left, -1))


def check(layout: Layout, sequence_of: list[int] | None = None) -> None:
    """Hold what all ranks compute against what the mask says, and what they send against what is needed."""
    lower_right = bool(layout.starts)  # kernels of packed sequences count from there
    computed: dict[tuple[int, int], int] = {}
    for rank in range(layout.ranks):
        queries = positions(layout.ranges(rank))
        for step in steps(layout, rank):
            keys = positions(layout.ranges(step.source, of_keys=True))
            taken = [keys[row] for row in positions(step.taken)]
            used = set()
            for block in step.blocks:
                seen = pairs_of(block, lower_right)
                for opened in wider(block) if not block.lengths else ():
                    assert seen < pairs_of(opened, lower_right), "a kernel is asked for a limit that hides nothing"
                for row, column in seen:
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


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(12, 40), st.booleans(), st.tuples(SIDES, SIDES))
def test_each_pair_that_may_be_seen_is_computed_once(
    ranks: int, length: int, is_causal: bool, window: tuple[int, int]
) -> None:
    check(Layout(ranks, length, length, is_causal, window))


@settings(max_examples=60)
@given(st.integers(1, 5), st.lists(st.integers(0, 20), min_size=1, max_size=6), st.booleans(), st.tuples(SIDES, SIDES))
def test_the_same_holds_for_packed_sequences(
    ranks: int, lengths: list[int], is_causal: bool, window: tuple[int, int]
) -> None:
    lengths = [*lengths, 12]
    starts = tuple(sum(lengths[:n]) for n in range(len(lengths) + 1))
    sequence_of = [n for n, length in enumerate(lengths) for _ in range(length)]
    check(Layout(ranks, starts[-1], starts[-1], is_causal, window, starts), sequence_of)


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


@dataclass
class Schedule:
    """What one rank sends and receives, in the order in which it starts to; each batch is one message each way."""

    batches: list[dict[tuple[str, int], int]]

    def pair(self, kind: str, peer: int) -> list[int]:
        """Return the sizes of the messages to (`isend`) or from (`irecv`) a peer."""
        return [batch[kind, peer] for batch in self.batches if (kind, peer) in batch]


def schedules(ranks: int, run: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> list[Schedule]:
    """Run, as each rank of a group that is not there, and return what would have been sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    found = []
    for rank in range(ranks):
        batches: list[dict[tuple[str, int], int]] = []

        def start(operations: list[Any], batches: list[dict[tuple[str, int], int]] = batches) -> list[Any]:
            batches.append({(each.op.__name__, each.group_peer): each.tensor.numel() for each in operations})
            assert len(batches[-1]) == len(operations)
            for each in operations:
                if each.op is dist.irecv:
                    each.tensor.zero_()
            return [SimpleNamespace(wait=lambda: None) for _ in operations]

        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(dist, "batch_isend_irecv", start)
                run(dist.group.WORLD)
        finally:
            dist.destroy_process_group()
        found.append(Schedule(batches))
    return found


def check_order(found: list[Schedule]) -> None:
    """Hold what each rank sends against what the others expect, also where batches of a rank are done one by one."""
    everybody = range(len(found))
    for rank in everybody:
        for peer in everybody:
            assert found[rank].pair("isend", peer) == found[peer].pair("irecv", rank)
    done = [0 for _ in everybody]
    waiting = [set(schedule.batches[0]) if schedule.batches else set() for schedule in found]
    progress = True
    while progress:
        progress = False
        for rank in everybody:
            for kind, peer in [*waiting[rank]]:
                if kind == "isend" and ("irecv", rank) in waiting[peer]:
                    waiting[rank].remove((kind, peer))
                    waiting[peer].remove(("irecv", rank))
                    progress = True
        for rank in everybody:
            if not waiting[rank] and done[rank] < len(found[rank].batches):
                done[rank] += 1
                progress = True
                if done[rank] < len(found[rank].batches):
                    waiting[rank] = set(found[rank].batches[done[rank]])
    assert done == [len(schedule.batches) for schedule in found], "ranks wait for each other"


class EqualLengths(Formula):
    shape_dependent = True

    @staticmethod
    def supports(params: SDPAParams) -> str:
        return "" if params.query.shape[2] == params.key.shape[2] else "takes equal lengths alone"


class OwnStatisticsOfSoftcap:
    """Its backward computes from the out and lse that it is given, but for calls with softcap."""

    @staticmethod
    def logits(params: SDPAParams) -> Tensor:
        logits = params.scale * params.query @ params.key.mT
        return params.softcap * torch.tanh(logits / params.softcap) if params.softcap else logits

    @classmethod
    def forward(cls, params: SDPAParams) -> tuple[Tensor, Tensor]:
        logits = cls.logits(params)
        return torch.softmax(logits, -1) @ params.value, torch.logsumexp(logits, -1)

    @classmethod
    def backward(cls, params: SDPAParams, grad_out: Tensor, grad_lse: Any, out: Tensor, lse: Tensor) -> Any:
        if params.softcap:
            out, lse = cls.forward(params)
        logits = cls.logits(params)
        weights = torch.exp(logits - lse[..., None])
        of_logits = params.scale * weights * (grad_out @ params.value.mT - (grad_out * out).sum(-1, keepdim=True))
        if params.softcap:
            of_logits = of_logits * (1 - (logits / params.softcap) ** 2)
        return of_logits @ params.key, of_logits.mT @ params.query, weights.mT @ grad_out


@pytest.mark.parametrize(
    ("kernel", "taken", "declined", "reason"),
    [
        (EqualLengths, {"length": 16}, {"length": 13}, "takes equal lengths alone"),
        (OwnStatisticsOfSoftcap, {}, {"softcap": 2.0}, "its backward computes out and lse anew"),
    ],
)
def test_a_kernel_that_cannot_compute_each_block_of_each_rank_is_declined_before_any_message(
    monkeypatch: pytest.MonkeyPatch, kernel: Any, taken: dict[str, Any], declined: dict[str, Any], reason: str
) -> None:
    features = (Feature.LSE, Feature.SOFTCAP)
    spec = ImplSpec(name="mine", kernel=kernel, backend=None, capabilities=Capabilities(features=features))

    def attend(group: Any, **arguments: Any) -> None:
        whole = torch.ones(1, 1, arguments.get("length", 16), 2)
        part = parallel.shard_sequence(whole, group=group).requires_grad_(kernel is OwnStatisticsOfSoftcap)
        parallel.ring_attention(part, part, part, group=group, impl="mine", **arguments)

    def attend_declined(group: Any) -> None:
        with pytest.raises(attnplug.NoImplementationError, match=reason):
            attend(group, **declined)

    attnplug.register_impl(spec)
    try:
        assert all(schedule.batches for schedule in schedules(2, lambda group: attend(group, **taken), monkeypatch))
        assert not any(schedule.batches for schedule in schedules(2, attend_declined, monkeypatch))
    finally:
        attnplug.unregister_impl("mine")


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.integers(2, 8), st.integers(16, 60), st.booleans(), st.tuples(SIDES, SIDES), st.booleans())
def test_each_ranks_messages_come_in_the_order_in_which_their_receiver_waits_for_them(
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    length: int,
    is_causal: bool,
    window: tuple[int, int],
    is_packed: bool,
) -> None:
    pytest.importorskip("attnplug_math_ref")

    def run(group: Any) -> None:
        part = parallel.shard_sequence(torch.ones(1, 1, length, 2), group=group, is_causal=is_causal).requires_grad_()
        given: dict[str, Any] = {"group": group, "is_causal": is_causal, "window_size": window, "impl": "math_ref"}
        if is_packed:
            starts, tokens = torch.tensor([0, length // 5, length // 2, length], dtype=torch.int32), part[0, 0][:, None]
            out = parallel.ring_varlen_attn(tokens, tokens, tokens, starts, **given)
        else:
            out = parallel.ring_attention(part, part, part, length=length, **given)
        out.sum().backward()

    check_order(schedules(ranks, run, monkeypatch))
