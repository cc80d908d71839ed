"""Calls over several ranks give what one rank gives, by the contract's rule: forward, backward and every feature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import forked
import shared_sequences as ranks_do
from ranks import World

pytest.importorskip("attnplug_math_ref")
Worlds = Callable[[int], World]

# 2 and 3 ranks by default, 4 and 8 in the slow tests: ranks that are odd, even, and that make part lists long.
RANKS = [2, 3, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]

RING: dict[str, dict[str, Any]] = {
    "causal, gradients from each block's own lse": {"impl": "math_ref", "is_causal": True},
    "causal, gradients from the global lse": {"impl": "aten_flash", "is_causal": True},
    "causal, by whatever is chosen": {"is_causal": True},
    "full": {"impl": "math_ref"},
    "full, gradients from the global lse": {"impl": "aten_flash"},
    "a length that does not divide, causal": {"impl": "aten_flash", "is_causal": True, "length": 53},
    "a length that does not divide, full": {"impl": "aten_flash", "length": 43},
    "one head of keys": {"impl": "math_ref", "is_causal": True, "heads": (4, 1)},
    "values of another size": {"impl": "math_ref", "is_causal": True, "sizes": (16, 8)},
    "bfloat16": {"impl": "aten_flash", "is_causal": True, "dtype": torch.bfloat16},
    "float64": {"impl": "math_ref", "is_causal": True, "dtype": torch.float64},
    "sinks, once": {"impl": "aten_flash", "is_causal": True, "sinks": True},
    "sinks and the gradient of lse": {"impl": "math_ref", "sinks": True, "lse_gradient": True},
    "softcap and scale": {"impl": "math_ref", "is_causal": True, "softcap": 3.0, "scale": 0.5},
    "a window that reaches one part": {"impl": "math_ref", "is_causal": True, "window_size": (4, -1)},
    "a window that reaches several": {"impl": "math_ref", "is_causal": True, "window_size": (19, -1), "length": 53},
    "a window on both sides": {"impl": "math_ref", "window_size": (7, 13), "length": 51},
    "a window on the right": {"impl": "math_ref", "window_size": (-1, 9)},
    "more queries than keys": {"impl": "math_ref", "keys": 31, "length": 48},
    "keys that do not exist": {"impl": "math_ref", "seqused_k": torch.tensor([30, 0], dtype=torch.int32)},
    "the same, causal": {"impl": "math_ref", "is_causal": True, "seqused_k": torch.tensor([5, 40], dtype=torch.int32)},
    "an opaque kernel": {"impl": "opaque", "is_causal": True},
}


def run_all(world: World, function: Callable[..., Any], cases: dict[str, dict[str, Any]]) -> None:
    """Run each case, and say which failed."""
    wrong = {}
    for name, arguments in cases.items():
        try:
            world.run(function, **arguments)
        except AssertionError as error:
            wrong[name] = str(error)
    assert not wrong, "\n".join(f"{name}: {error}" for name, error in wrong.items())


@pytest.mark.parametrize("ranks", RANKS)
def test_a_ring_gives_what_one_rank_gives(world: Worlds, ranks: int) -> None:
    world(ranks).run(ranks_do.register, "opaque")
    run_all(world(ranks), ranks_do.dense, RING)


@pytest.mark.parametrize("ranks", RANKS)
def test_packed_sequences_cut_across_ranks_give_what_one_rank_gives(world: Worlds, ranks: int) -> None:
    lengths = {"some": [13, 20, 2, 30], "one": [65], "an empty one": [13, 0, 20, 2, 30], "many": [3] * 20}
    run_all(
        world(ranks),
        ranks_do.packed,
        {
            f"{name}, {more}": {"lengths": each, "impl": "math_ref", **more}
            for name, each in lengths.items()
            for more in ({"is_causal": True}, {}, {"is_causal": True, "window_size": (6, -1)}, {"window_size": (5, 8)})
        },
    )


def test_nothing_is_kept_of_a_packed_call_that_a_cuda_graph_captures_nor_copied_from_the_host(world: Worlds) -> None:
    """Its memory is the graph's, which may also outlive what is kept; and the device cannot be waited for."""
    assert world(2).run(ranks_do.packed_while_a_graph_is_captured) == [0, 0]


@pytest.mark.parametrize("ranks", RANKS)
def test_heads_that_are_shared_give_what_one_rank_gives(world: Worlds, ranks: int) -> None:
    heads = (2 * ranks, ranks)
    masked = {
        "attn_mask": torch.randn(2, heads[0], 41, 41).requires_grad_(),
        "alibi_slopes": torch.rand(heads[0]),
        "sinks": True,
    }
    cases: dict[str, dict[str, Any]] = {
        "causal": {"impl": "math_ref", "is_causal": True},
        "through the operators of PyTorch": {"impl": "aten_flash", "is_causal": True},
        "a length that does not divide": {"impl": "math_ref", "length": 43, "lse_gradient": True},
        "a mask of each head, slopes and sinks": {"impl": "math_ref", "length": 41, **masked},
        "a window": {"impl": "math_ref", "is_causal": True, "window_size": (5, -1)},
        "more queries than keys": {"impl": "math_ref", "keys": 32, "length": 48},
    }
    for case in cases.values():
        case |= {"method": "ulysses", "heads": heads}
    cases["more queries than keys"] |= {"length": 8 * ranks, "keys": 4 * ranks}
    run_all(world(ranks), ranks_do.dense, cases)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "mesh"), [(4, (2, 2)), (8, (4, 2)), (8, (2, 4))])
def test_a_ring_of_shared_heads_gives_what_one_rank_gives(world: Worlds, ranks: int, mesh: tuple[int, int]) -> None:
    cases: dict[str, dict[str, Any]] = {
        "causal": {"impl": "aten_flash", "is_causal": True},
        "full": {"impl": "aten_flash"},
        "uneven, a window and sinks": {"is_causal": True, "length": 77, "window_size": (9, -1), "sinks": True},
    }
    for case in cases.values():
        case |= {"method": "usp", "mesh": mesh, "heads": (8, 4), "impl": case.get("impl", "math_ref")}
    run_all(world(ranks), ranks_do.dense, cases)


@pytest.mark.parametrize("method", ["ring", "ulysses"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_dropout_draws_once_for_each_pair_and_differently_on_each_rank(
    world: Worlds, method: str, is_causal: bool
) -> None:
    for share, repeated_on_ranks, repeated_in_time in world(2).run(ranks_do.dropped, method, "math_ref", is_causal):
        assert abs(share - 0.4) < 0.05
        assert not repeated_on_ranks
        assert not repeated_in_time


def test_dropout_of_dtensors_is_another_on_each_share_and_the_same_on_replicas(world: Worlds) -> None:
    assert world(2).run(ranks_do.dropped_from_dtensors) == [(False, True)] * 2


def test_nothing_is_made_on_the_default_device_where_the_call_is_on_another(world: Worlds) -> None:
    world(2).run(ranks_do.beside_another_default_device)


def test_the_queries_dtype_is_that_of_autocast_and_a_checkpoint_repeats_the_choice(world: Worlds) -> None:
    world(2).run(ranks_do.under_autocast)
    world(2).run(ranks_do.checkpointed)


def test_a_scope_chooses_and_a_recording_tells_the_kernel_of_the_blocks(world: Worlds) -> None:
    assert world(2).run(ranks_do.recorded) == [["aten_flash"]] * 2
    chosen = ["indeterministic", "aten_flash", "indeterministic"]
    assert world(2).run(ranks_do.recorded_under_a_flag) == [chosen] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("method", "ranks"), [("ring", 2), ("ulysses", 4), ("usp", 4)])
def test_compiled_calls_are_one_graph_and_give_the_same(world: Worlds, method: str, ranks: int) -> None:
    """Two are enough for a ring, which is one operator of the graph; heads are exchanged by operators of PyTorch's."""
    world(ranks).run(ranks_do.register, "opaque")
    world(ranks).run(ranks_do.compiled, method)


@pytest.mark.slow
def test_dtensors_sharded_by_batch_or_heads_pass_through_a_ring(world: Worlds) -> None:
    world(4).run(ranks_do.register, "opaque")
    world(4).run(ranks_do.sharded)


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_a_group_that_is_destroyed_is_not_kept(world, method):
    assert world(2).run(ranks_do.is_held_when_destroyed, method) == [False, False]


AGAIN = """
import gc, torch, torch.distributed as dist
from attnplug.parallel import ring_attention

def attend(part, group):
    return ring_attention(part, part, part, group=group)

compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
part = torch.randn(1, 2, 8, 4, requires_grad=True)
for _ in range(2):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    out = compiled(part, dist.group.WORLD)
    torch.testing.assert_close(out, attend(part, dist.group.WORLD))
    out.sum().backward()
    dist.destroy_process_group()
    gc.collect()
"""


def test_a_compiled_function_runs_in_a_group_that_was_destroyed_and_made_again() -> None:
    """Both have the name that PyTorch gives a first group."""
    done = forked.run(AGAIN, warm="dynamo")
    assert done.returncode == 0, done.stderr
