"""Models of diffusers, which know nothing of attnplug, give what the library's own attention gives.

diffusers chooses attention by itself, from a closed list of names, and by attention processors; most of them end
in `torch.nn.functional.scaled_dot_product_attention`. So the drop-in is the way in: a scope, an activation or a
binding, and never a name of diffusers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attnplug
import forked
from attnplug import FallbackWarning, SDPBackend
from tiny_diffusers import diffusers, flux_model, unet_model

IMPLS = ["torch", "aten_flash", "aten_math", "math_ref"]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unet() -> tuple[Any, dict[str, Tensor]]:
    """A denoiser of images: self-attention among places, and cross-attention to padded text."""
    model = unet_model()
    seen = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    inputs = {
        "sample": random(2, 4, 4, 4, seed=1),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": random(2, 5, 16, seed=2),
        "encoder_attention_mask": seen,
    }
    return model, inputs


def flux() -> tuple[Any, dict[str, Tensor]]:
    """A transformer in which image and text attend to each other, through the library's dispatcher."""
    model = flux_model()
    inputs = {
        "hidden_states": random(2, 6, 4, seed=1),
        "encoder_hidden_states": random(2, 3, 16, seed=2),
        "pooled_projections": random(2, 16, seed=3),
        "timestep": torch.tensor([0.2, 0.7], dtype=torch.float64),
        "img_ids": torch.arange(18.0).view(6, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    return model, inputs


CALLS: dict[Callable[[], Any], int] = {unet: 8, flux: 2}
"""How often each model computes attention."""


def build(make: Callable[[], Any]) -> tuple[Any, dict[str, Tensor]]:
    """Return a model in float64 whose random weights make its attention far from uniform."""
    torch.manual_seed(0)
    model, inputs = make()
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.25)
    return model, inputs


def train_step(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return the output and the gradient of every parameter that takes part."""
    model.zero_grad()
    out = model(**inputs).sample
    (out * random(*out.shape, seed=4)).sum().backward()
    return [out.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


@contextmanager
def library_s_own_math(model: Any) -> Iterator[None]:
    """Let diffusers compute attention as a formula: its processor of products and softmax, or its MATH backend."""
    if isinstance(model, diffusers.UNet2DConditionModel):
        from diffusers.models.attention_processor import AttnProcessor

        before = model.attn_processors
        model.set_attn_processor(AttnProcessor())
        yield
        model.set_attn_processor(before)
    else:
        with diffusers.attention_backend("_native_math"):
            yield


def expected_step(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    with library_s_own_math(model):
        return train_step(model, inputs)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 10
    largest = max(tensor.abs().max().item() for tensor in expected)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11 * largest)


def skip_unless_installed(impl: str) -> None:
    if impl not in attnplug.list_flash_attention_impls():
        pytest.skip(f"{impl} is not installed")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("make", CALLS)
def test_a_scope_makes_every_attention_run_that_implementation(make: Any, impl: str) -> None:
    skip_unless_installed(impl)
    model, inputs = build(make)
    expected = expected_step(model, inputs)
    with attnplug.patch_torch(), attnplug.sdpa_kernel(impl), attnplug.record() as calls:
        found = train_step(model, inputs)
    assert [call.impl for call in calls] == [impl] * CALLS[make]
    assert_same(found, expected)


@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize("make", CALLS)
def test_an_activation_holds_for_every_attention_until_it_is_restored(make: Any, impl: str) -> None:
    skip_unless_installed(impl)
    model, inputs = build(make)
    expected, before = expected_step(model, inputs), train_step(model, inputs)
    attnplug.activate_flash_attention_impl(impl)
    with attnplug.record() as calls:
        found = train_step(model, inputs)
    attnplug.restore_flash_attention_impl()
    assert [call.impl for call in calls] == [impl] * CALLS[make]
    assert_same(found, expected)
    assert all(map(torch.equal, train_step(model, inputs), before))


@pytest.mark.parametrize("make", CALLS)
def test_with_nothing_selected_the_results_are_those_without_the_drop_in_bit_for_bit(make: Any) -> None:
    model, inputs = build(make)
    expected = train_step(model, inputs)
    with attnplug.patch_torch():
        assert all(map(torch.equal, train_step(model, inputs), expected))


def test_what_an_implementation_declines_is_pytorch_s_own_result_and_said_once_per_reason() -> None:
    """One that knows no masks: cross-attention to padded text stays with PyTorch, self-attention does not."""

    def maskless(params: attnplug.SDPAParams) -> tuple[Tensor, None]:
        return torch.softmax(params.query @ params.key.mT * params.scale, -1) @ params.value, None

    attnplug.register_impl(attnplug.ImplSpec(name="maskless", kernel=maskless, backend=SDPBackend.EFFICIENT_ATTENTION))
    model, inputs = build(unet)
    with torch.no_grad():
        expected = model(**inputs).sample
        attnplug.activate_flash_attention_impl("maskless")
        with attnplug.record() as calls, pytest.warns(FallbackWarning, match="'maskless'") as said:
            found = model(**inputs).sample
    assert sorted(call.impl for call in calls) == ["maskless"] * 4 + ["torch"] * 4
    assert len([warning for warning in said if issubclass(warning.category, FallbackWarning)]) == 1
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


def test_cross_attention_alone_may_be_bound() -> None:
    model, inputs = build(unet)
    expected = expected_step(model, inputs)
    cross = [module for name, module in model.named_modules() if name.endswith(".attn2")]
    with ExitStack() as stack:
        stack.enter_context(attnplug.patch_torch())
        for module in cross:
            stack.callback(attnplug.bind(module, "aten_math").remove)
        with attnplug.record() as calls:
            found = train_step(model, inputs)
    assert [call.impl for call in calls] == ["torch", "aten_math"] * len(cross)
    assert_same(found, expected)


def test_the_mask_of_padded_text_matters_in_the_unet() -> None:
    """Otherwise the comparisons above could not see it lost."""
    model, inputs = build(unet)
    seeing_all = inputs | {"encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool)}
    with torch.no_grad(), attnplug.patch_torch(), attnplug.sdpa_kernel("aten_math"):
        difference = (model(**inputs).sample - model(**seeing_all).sample).abs().amax((1, 2, 3))
    assert difference[0] < 1e-12 < 1e-3 < difference[1]


def test_a_drop_in_that_was_there_before_the_library_acts_and_ends_like_one_that_came_after() -> None:
    """The other tests import diffusers first; nothing that it keeps from its import may be or become stale."""
    program = """
import attnplug
handle = attnplug.patch_torch()
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn as attention
query = torch.randn(1, 5, 2, 8)
def ran(**arguments):
    with attnplug.sdpa_kernel("aten_math"), attnplug.record() as calls:
        attention(query, query, query, **arguments)
    return [call.impl for call in calls]
assert ran() == ran(backend="native") == ["aten_math"]
handle.remove()
assert ran() == ran(backend="native") == []
"""
    done = forked.run(program)
    assert done.returncode == 0, done.stderr


def test_arguments_of_the_library_s_dispatcher_reach_the_kernel() -> None:
    from diffusers.models.attention_dispatch import dispatch_attention_fn as attention

    seen: list[attnplug.SDPAParams] = []

    def spy(params: attnplug.SDPAParams) -> tuple[Tensor, None]:
        seen.append(params)
        return params.query.new_zeros(*params.query.shape[:-1], params.value.shape[-1]), None

    capabilities = attnplug.Capabilities(features=frozenset(attnplug.Feature))
    attnplug.register_impl(attnplug.ImplSpec(name="spy", kernel=spy, backend=None, capabilities=capabilities))
    query, key, value = torch.randn(2, 5, 4, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8)
    visible = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    with attnplug.patch_torch(), attnplug.sdpa_kernel("spy"):
        attention(query, key, value, visible, dropout_p=0.25, scale=0.5, enable_gqa=True)
        attention(query, query, query, is_causal=True)
    masked, causal = seen
    assert masked.query.shape == (2, 4, 5, 8) and masked.key.shape == (2, 2, 6, 8)
    assert (masked.dropout, masked.scale, masked.enable_gqa, masked.is_causal) == (0.25, 0.5, True, False)
    assert torch.equal(masked.attn_mask.view(2, 6), visible)
    assert causal.is_causal and causal.attn_mask is None


def test_checkpointed_blocks_recompute_in_backward_what_ran_in_the_scope_of_forward() -> None:
    model, inputs = build(flux)
    expected = expected_step(model, inputs)
    contexts = functools.partial(checkpoint, use_reentrant=False, context_fn=attnplug.checkpoint_contexts)
    model.train().enable_gradient_checkpointing(contexts)
    model.zero_grad()
    with attnplug.patch_torch():
        with attnplug.sdpa_kernel("aten_math"), attnplug.record() as forward:
            out = model(**inputs).sample
        with attnplug.record() as recomputed:
            (out * random(*out.shape, seed=4)).sum().backward()
    assert [call.impl for call in (*forward, *recomputed)] == ["aten_math"] * 4
    assert_same([out.detach()] + [p.grad for p in model.parameters() if p.grad is not None], expected)


def test_a_compiled_model_follows_two_scopes_and_compiles_once_for_each() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    model, inputs = build(flux)
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    operators = {
        "aten_math": "torch._scaled_dot_product_attention_math(",
        "aten_flash": "torch._scaled_dot_product_flash_attention_for_cpu(",
    }
    with torch.no_grad(), attnplug.patch_torch():
        expected = model(**inputs).sample
        for scope in (*operators, *operators):
            with attnplug.sdpa_kernel(scope):
                torch.testing.assert_close(compiled(**inputs).sample, expected, rtol=1e-8, atol=1e-11)
    found = [[graph.code.count(name) for name in operators.values()] for graph in counter.graphs]
    assert found == [[CALLS[flux], 0], [0, CALLS[flux]]]


@pytest.mark.parametrize("scope", [None, "aten_math"])
def test_guidance_that_watches_for_pytorch_s_function_still_finds_it(scope: str | None) -> None:
    """diffusers leaves attention scores out by a mode that compares with the function's name of the moment."""
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode

    query, value = torch.randn(2, 1, 2, 4, 8)
    with attnplug.patch_torch(), ExitStack() as stack:
        if scope is not None:
            stack.enter_context(attnplug.sdpa_kernel(scope))
        with AttentionScoreSkipFunctionMode():
            assert torch.equal(torch.nn.functional.scaled_dot_product_attention(query, query, value), value)
