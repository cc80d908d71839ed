"""Models and modules over several ranks: the loss and the gradients of one rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import shared_models as ranks_do
from ranks import World

pytest.importorskip("attnplug_math_ref")
pytest.importorskip("transformers")
Worlds = Callable[[int], World]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_a_module_of_ones_own_gives_what_one_rank_gives(world: Worlds, ranks: int, method: str) -> None:
    world(ranks).run(ranks_do.bound, method)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "mesh"), [("ring", None), ("ulysses", None), ("usp", (2, 2))])
def test_a_llama_trained_over_four_ranks_has_the_loss_and_gradients_of_one(
    world: Worlds, method: str, mesh: tuple[int, int] | None
) -> None:
    world(4).run(ranks_do.trained, method, mesh)


@pytest.mark.slow
def test_a_batch_whose_length_does_not_divide_trains_too(world: Worlds) -> None:
    world(4).run(ranks_do.trained, "ring", None, 29, "math_ref")


@pytest.mark.slow
def test_parameters_may_be_sharded_over_the_same_ranks(world: Worlds) -> None:
    world(4).run(ranks_do.fully_sharded)


@pytest.mark.slow
def test_heads_may_be_sharded_along_another_dimension_of_the_mesh(world: Worlds) -> None:
    world(4).run(ranks_do.with_tensor_parallel)


@pytest.mark.slow
def test_padding_is_an_error(world: Worlds) -> None:
    for text in world(4).run(ranks_do.fails_on_padding):
        assert text == "attention_mask: batches over several ranks are dense; leave out padding and masks"


def test_a_model_is_let_go_once_its_handle_is_removed_and_mistakes_are_errors(world: Worlds) -> None:
    for again, unknown, method, holds in world(2).run(ranks_do.handed_back):
        assert again == "module: LlamaForCausalLM runs over several ranks already; remove() that handle first"
        assert unknown.startswith("impl: unknown implementation 'mathref'; did you mean 'math_ref'? Available: ")
        assert method == "method: unknown None. Accepted: ring, ulysses, usp"
        assert (
            holds == "module: ModuleList has no forward to bind; bind each module that it holds, or one that calls them"
        )


def test_what_is_interrupted_at_any_line_leaves_nothing(world: Worlds) -> None:
    world(2).run(ranks_do.interrupted)


def test_what_one_rank_has_of_a_call_is_not_verified(world: Worlds) -> None:
    for (reason,) in world(2).run(ranks_do.verified):
        assert reason.endswith(" computes a part of a call, and other ranks the rest")


@pytest.mark.slow
def test_a_compiled_model_gives_what_it_gives_uncompiled(world: Worlds) -> None:
    world(2).run(ranks_do.compiled)
