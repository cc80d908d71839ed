"""Compiled autograd, which traces backward, sees an opaque kernel as one operator, and nothing of what verifies it."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import attnplug
from attnplug import Capabilities, Feature, GradientError, ImplSpec, MismatchError, SDPAParams

attend: Any = attnplug.scaled_dot_product_attention
KEPT = 7.0


class Opaque:
    """Attention whose backward reads memory by its address, where a fake tensor has none."""

    factor = 1

    @staticmethod
    def forward(params: SDPAParams) -> tuple[Tensor, ...]:
        logits = params.scale * params.query @ params.key.mT
        lse = torch.logsumexp(logits, -1)
        return torch.exp(logits - lse[..., None]) @ params.value, lse, torch.full((1,), KEPT)

    @classmethod
    def backward(
        cls, params: SDPAParams, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, kept: Tensor
    ) -> tuple[Tensor, ...]:
        assert ctypes.c_float.from_address(kept.data_ptr()).value == KEPT
        query, key, value = params.query, params.key, params.value
        weights = torch.exp(params.scale * query @ key.mT - lse[..., None])
        delta = (grad_out * out).sum(-1) - (0 if grad_lse is None else grad_lse)
        grad_logits = cls.factor * params.scale * weights * (grad_out @ value.mT - delta[..., None])
        return grad_logits @ key, grad_logits.mT @ query, cls.factor * weights.mT @ grad_out


class Described(Opaque):
    """The same, which says what its forward returns."""

    @staticmethod
    def fake(params: SDPAParams) -> tuple[Tensor, ...]:
        query = params.query
        return torch.empty_like(query), query.new_empty(query.shape[:-1]), query.new_empty(1)


class Twice(Opaque):
    """The same with gradients twice as large."""

    factor = 2


def register(name: str, kernel: Any, *features: Feature) -> None:
    capabilities = Capabilities(features=(Feature.LSE, *features))
    attnplug.register_impl(ImplSpec(name=name, kernel=kernel, backend=None, capabilities=capabilities))


def compiled(backend: Any = "eager", fullgraph: bool = True) -> Any:
    return compiled_autograd._enable(torch.compile(backend=backend, fullgraph=fullgraph))


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3)]


def loss(*given: Tensor, impl: str, with_lse: bool) -> Tensor:
    if not with_lse:
        return attend(*given, impl=impl).square().sum()
    out, lse = attend(*given, impl=impl, return_lse=True)
    return out.square().sum() + lse.sum()


def assert_gradients(given: list[Tensor], with_lse: bool, factor: int = 1) -> None:
    expected = torch.autograd.grad(loss(*(again := tensors()), impl="math_ref", with_lse=with_lse), again)
    for tensor, gradient in zip(given, expected, strict=True):
        torch.testing.assert_close(tensor.grad, factor * gradient)


@pytest.mark.parametrize(
    ("impl", "with_lse"),
    [("opaque", False), ("opaque", True), ("described", True), ("math_ref", True), ("aten_math", False)],
)
def test_a_backward_is_one_graph_that_is_compiled_once(impl: str, with_lse: bool) -> None:
    register("opaque", Opaque, Feature.LSE_GRADIENT)
    register("described", Described, Feature.LSE_GRADIENT)
    counter = CompileCounterWithBackend("eager")
    for _ in range(3):
        given = tensors()
        result = loss(*given, impl=impl, with_lse=with_lse)
        with compiled(counter):
            result.backward()
        assert_gradients(given, with_lse)
    assert counter.frame_count == 1


def test_a_compiled_backward_is_that_of_the_kernel_that_ran_forward() -> None:
    register("one", Opaque)
    register("other", Twice)
    for impl, factor in (("one", 1), ("other", 2), ("one", 1)):
        given = tensors()
        result = loss(*given, impl=impl, with_lse=False)
        with compiled():
            result.backward()
        assert_gradients(given, False, factor)
    attnplug.unregister_impl("one")
    register("one", Twice)
    given = tensors()
    result = loss(*given, impl="one", with_lse=False)
    with compiled():
        result.backward()
    assert_gradients(given, False, 2)


@pytest.mark.parametrize("with_lse", [False, True])
def test_a_compiled_backward_is_given_the_call_that_forward_was_given(with_lse: bool) -> None:
    seen = []

    class Seen(Opaque):
        @classmethod
        def backward(cls, params: SDPAParams, *given: Any) -> tuple[Tensor, ...]:
            seen.append({name: value for name, value in vars(params).items() if not isinstance(value, Tensor)})
            return super().backward(params, *given)

    register("seen", Seen, Feature.LSE_GRADIENT)
    loss(*tensors(), impl="seen", with_lse=with_lse).backward()
    result = loss(*tensors(), impl="seen", with_lse=with_lse)
    with compiled():
        result.backward()
    assert seen[0] == seen[1] and seen[0]["return_lse"] is with_lse


def test_a_checkpoint_in_a_compiled_backward_repeats_its_choice() -> None:
    register("opaque", Opaque)
    given = tensors()
    with attnplug.sdpa_kernel("opaque"):
        out = checkpoint(attend, *given, use_reentrant=False, context_fn=attnplug.checkpoint_contexts)
    with attnplug.record() as calls, compiled(fullgraph=False):
        out.square().sum().backward()
    assert_gradients(given, False)
    assert [call.impl for call in calls] == ["opaque"]


def test_what_a_kernel_has_no_gradient_for_is_an_error_in_a_compiled_backward_too() -> None:
    register("opaque", Opaque)
    given = tensors()
    _, lse = attend(*given, impl="opaque", return_lse=True)
    with pytest.raises(GradientError, match="'opaque' gives no gradient through lse"), compiled(fullgraph=False):
        lse.sum().backward()
    out = attend(*given, impl="opaque")
    with pytest.raises(GradientError, match="'opaque' has no second derivatives"), compiled(fullgraph=False):
        (gradient,) = torch.autograd.grad(out.square().sum(), given[0], create_graph=True)
        gradient.sum().backward()


def test_under_fullgraph_what_a_kernel_has_no_gradient_for_is_said_by_the_error_of_the_trace() -> None:
    register("opaque", Opaque)
    given = tensors()
    out, lse = attend(*given, impl="opaque", return_lse=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="'opaque' gives no gradient through lse"), compiled():
        (out.sum() + lse.sum()).backward()
    out = attend(*given, impl="opaque")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="'opaque' has no second derivatives"), compiled():
        (gradient,) = torch.autograd.grad(out.square().sum(), given[0], create_graph=True)
        gradient.sum().backward()


@pytest.mark.parametrize("impl", ["opaque", "torch"])
def test_gradients_of_a_compiled_backward_are_verified_by_code_that_is_not_compiled(impl: str) -> None:
    register("opaque", Opaque)
    counter = CompileCounterWithBackend("eager")
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        given = tensors()
        result = loss(*given, impl=impl, with_lse=False)
        with compiled(counter, fullgraph=False):
            result.backward()
    assert_gradients(given, False)
    assert (watched.results, watched.gradients, dict(watched.skipped)) == (1, 1, {})
    assert counter.frame_count <= 5  # the pieces between the comparisons; compiled, these would be dozens


def test_a_wrong_gradient_is_found_in_a_compiled_backward() -> None:
    register("doubled_gradients", Twice)
    with attnplug.verify(1.0, on_mismatch="raise"):
        result = loss(*tensors(), impl="doubled_gradients", with_lse=False)
        with pytest.raises(MismatchError, match="gradient of query"), compiled(fullgraph=False):
            result.backward()
