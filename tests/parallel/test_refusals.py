"""What cannot be right is an error, and before any message; a rank that fails or hangs is named by the others."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import shared_sequences as ranks_do
from ranks import World

pytest.importorskip("attnplug_math_ref")
Worlds = Callable[[int], World]


def error_of(world: World, function: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """Return what both ranks raise, and see that they still understand each other."""
    world.start(function, *arguments, **named)
    texts = {str(result) for result in world.results()}
    assert len(texts) == 1, texts
    world.run(ranks_do.dense, impl="math_ref", is_causal=True)
    return texts.pop()


def apart(folder: Path, count: int) -> list[World]:
    """Return so many worlds that nothing else uses, for calls that fail all at once.

    What takes long is to wait for as long as the group does. A few start at a time, as they wait for no longer to meet.
    """
    worlds: list[World] = []
    while len(worlds) < count:
        begun = len(worlds)
        for number in range(begun, min(begun + 4, count)):
            (own := folder / str(number)).mkdir()
            worlds.append(World(3, own, timeout=timedelta(seconds=10)))
        for world in worlds[begun:]:
            world.run(ranks_do.register, "opaque")
    return worlds


def ended(world: World, ranks: int) -> list[Any]:
    """Return what so many ranks of a world returned, and end it."""
    results = world.results(ranks=ranks)
    for process in world.processes:
        process.kill()
        process.join()
    return results


def test_a_kernel_without_lse_is_declined_before_any_message(world: Worlds) -> None:
    text = error_of(world(2), ranks_do.dense, impl="aten_math")
    assert text.startswith("NoImplementationError: ")
    assert "aten_math: does not support return_lse" in text
    assert "ulysses_attention, of the same arguments, takes any implementation" in text


def test_a_backward_that_does_not_use_what_it_is_given_is_declined_before_any_message(world: Worlds) -> None:
    world(2).run(ranks_do.register, "own_statistics")
    text = error_of(world(2), ranks_do.dense, impl="own_statistics")
    assert "its backward computes out and lse anew for the keys of one rank" in text


def test_a_kernel_that_declines_the_call_on_which_its_backward_is_tested_is_declined_with_its_reason(
    world: Worlds,
) -> None:
    world(2).run(ranks_do.register, "long")
    text = error_of(world(2), ranks_do.dense, impl="long", length=160)
    assert "declines the call of 64 positions on which its backward is tested: takes more than 64 queries" in text


def test_a_gradient_of_lse_that_the_kernel_does_not_give_is_an_error_before_any_message(world: Worlds) -> None:
    text = error_of(world(2), ranks_do.dense, impl="aten_flash", is_causal=True, lse_gradient=True)
    assert text == (
        "GradientError: implementation 'aten_flash' gives no gradient through lse; detach lse, or use one that does"
    )


def test_a_kernel_without_the_feature_is_declined_with_its_reason(world: Worlds) -> None:
    text = error_of(world(2), ranks_do.dense, impl="aten_flash", is_causal=True, softcap=2.0)
    assert "aten_flash: does not support softcap" in text


def test_dropout_that_a_kernel_cannot_repeat_is_declined(world: Worlds) -> None:
    text = error_of(world(2), ranks_do.dense, impl="aten_flash", dropout_p=0.1)
    assert "aten_flash: does not support dropout" in text


def test_heads_that_do_not_divide_are_an_error_that_says_what_would(world: Worlds) -> None:
    text = error_of(world(2), ranks_do.dense, "ulysses", heads=(9, 3))
    assert text == (
        "ValueError: query, key: 2 ranks cannot share 9 query heads and 3 key/value heads evenly; 3 ranks would do, "
        "or ring_attention, which leaves heads together"
    )
    text = error_of(world(2), ranks_do.dense, "ulysses", heads=(4, 1))
    assert text.endswith("evenly; use ring_attention, which leaves heads together")


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("short", "ValueError: a sequence of 3 positions cannot be cut into 4 parts for 2 ranks"),
        (
            "length",
            "ValueError: query: rank {} of 2 has 8 positions, and its share of 24 is 12; cut with shard_sequence",
        ),
        (
            "group",
            "TypeError: group: expected a torch.distributed.ProcessGroup or a DeviceMesh of one dimension, got str",
        ),
        ("not a member", "ValueError: group: this rank is not a member of the group; only members call"),
        ("mesh", "TypeError: mesh: expected a DeviceMesh of two dimensions, (ring, heads), got str"),
        ("starts", "ValueError: cu_seq: expected values that start at 0 and never decrease, got [0, 9, 5]"),
        ("impl", "TypeError: impl: expected the name of an implementation or None, got list"),
        ("mask", "ValueError: attn_mask: "),
        ("scale", "TypeError: scale: "),
        ("method", "ValueError: method: unknown 'rings'; did you mean 'ring'? Accepted: ring, ulysses, usp"),
    ],
)
def test_wrong_arguments_are_named(world: Worlds, what: str, text: str) -> None:
    world(2).start(ranks_do.mistaken, what)
    for rank, result in enumerate(world(2).results()):
        assert str(result).startswith(text.format(rank))


UNLIKE = [
    ("is_causal", True, "is_causal: is {} here and {} on rank {}", ("False", "True")),
    ("dtype", "float16", "query, key, value: is {} here and {} on rank {}", ("torch.float32", "torch.float16")),
    ("dtype", "bfloat16", "query, key, value: is {} here and {} on rank {}", ("torch.float32", "torch.bfloat16")),
    ("batch", 2, "batch of query: is {} here and {} on rank {}", ("1", "2")),
    ("heads", 12, "heads of query and of key: is {} here and {} on rank {}", ("[6, 6]", "[12, 12]")),
    ("window_size", (2, 2), "window_size: is {} here and {} on rank {}", ("[-1, -1]", "[2, 2]")),
]
PACKED = [("packed", True, "packed sequences: is {} here and {} on rank {}", ("False", "True"))]
UNLIKE_BY_METHOD = {"ring": UNLIKE + PACKED, "ulysses": UNLIKE}


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([(method, *UNLIKE[0]) for method in UNLIKE_BY_METHOD], id="is_causal"),
        *(
            pytest.param([(method, *each) for each in unlike[1:]], id=method, marks=pytest.mark.slow)
            for method, unlike in UNLIKE_BY_METHOD.items()
        ),
    ],
)
def test_ranks_that_call_differently_are_told_before_any_message(tmp_path: Path, cases: list[tuple[Any, ...]]) -> None:
    """They would read each other's messages amiss: gloo ends a process, and what the other returns is anything."""
    worlds = apart(tmp_path, len(cases))
    for world, (method, name, value, *_) in zip(worlds, cases, strict=True):
        world.start(ranks_do.unlike, method, name, value)
    for world, (method, name, _, text, values) in zip(worlds, cases, strict=True):
        results = [str(result) for result in ended(world, 3)]
        told = {
            f"ValueError: {text.format(*values, 2)}",
            *(f"ValueError: {text.format(*values[::-1], r)}" for r in (0, 1)),
        }
        said = [result for result in results if any(result.startswith(each) for each in told)]
        assert said and len(results) == 3, (method, name, results)
        for result in results:
            assert result in said or result.startswith("ParallelError: rank"), (method, name, results)


def test_ranks_that_called_alike_leave_nothing_in_the_store(world: Worlds) -> None:
    """Or the next group of that name would be compared with this one; and a store would grow with each group."""
    for before, after in world(2).run(ranks_do.first_calls_in_a_group):
        assert before == after


FAILED = "rank 1 of the group failed with OSError: this rank is broken"
GONE = "rank 1 of the group does not answer"
QUICK = [("ring", "raises", "forward"), ("ring", "is killed", "backward")]
OTHERS = {
    how: [
        (method, how, when)
        for method in ("ring", "ulysses")
        for when in ("forward", "backward")
        if (method, how, when) not in QUICK
    ]
    for how in ("raises", "is killed", "stops")
}


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(QUICK, id="raises or is killed"),
        *(pytest.param(cases, id=how, marks=pytest.mark.slow) for how, cases in OTHERS.items()),
    ],
)
def test_the_others_name_a_rank_that(tmp_path: Path, cases: list[tuple[str, str, str]]) -> None:
    worlds = apart(tmp_path, len(cases))
    for world, (method, how, when) in zip(worlds, cases, strict=True):
        world.start(ranks_do.failing, method, 1, how, when)
    for world, (method, how, when) in zip(worlds, cases, strict=True):
        results = ended(world, 3 if how == "raises" else 2)
        # what a kernel raises when autograd calls it, between messages of its own, stays on its rank
        text = FAILED if how == "raises" and (method, when) != ("ulysses", "backward") else GONE
        for rank in (0, 2):
            assert str(results[rank]).startswith(f"ParallelError: {text}"), (method, how, when, results)
