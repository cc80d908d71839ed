"""Gradients of sampled calls are compared when backward runs, whatever else a program does with the tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attnplug
from attnplug import MismatchError, MismatchWarning
from spoiled_kernels import Formula, WrongGradient, WrongOut, register, tensors

attend: Any = attnplug.scaled_dot_product_attention


@pytest.mark.parametrize("impl", ["torch", "aten_flash", "aten_math", "math_ref"])
def test_gradients_are_compared_and_stay_what_they_are(impl: str) -> None:
    given = tensors(requires_grad=True)
    plain = torch.autograd.grad(attend(*given, is_causal=True, impl=impl).sin().sum(), given)
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        out = attend(*given, is_causal=True, impl=impl)
    found = torch.autograd.grad(out.sin().sum(), given)
    assert all(map(torch.equal, found, plain))
    assert (watched.results, watched.gradients, dict(watched.skipped)) == (1, 1, {})


def test_a_wrong_gradient_is_found_in_backward() -> None:
    impl = register(WrongGradient)
    given = tensors(17, requires_grad=True)
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        loss = attend(*given, impl=impl).sum()
    assert watched.wrong == 0
    with pytest.raises(MismatchError, match="gradient of key: largest error"):
        loss.backward()
    (mismatch,) = watched.mismatches
    assert (mismatch.name, "gradients=('query', 'key', 'value')" in mismatch.call) == ("key", True)


def test_a_warning_of_wrong_results_is_none_of_wrong_gradients() -> None:
    class Wrong(WrongOut, WrongGradient):
        pass

    impl = register(Wrong)
    given = tensors(17, requires_grad=True)
    with attnplug.verify(1.0):
        with pytest.warns(MismatchWarning, match="out: largest error"):
            loss = attend(*given, impl=impl).sum()
        with pytest.warns(MismatchWarning, match="gradient of key"):
            loss.backward()


def test_an_implementation_that_loses_a_gradient_is_found() -> None:
    class Detached(Formula):
        composite = True
        backward = None

        @classmethod
        def forward(cls, params: attnplug.SDPAParams) -> tuple[Any, ...]:
            out, lse = super().forward(params)
            return out + 0 * params.value.sum() - (out - out.detach()), lse

    impl = register(Detached)
    given = tensors(requires_grad=True)
    with attnplug.verify(1.0, on_mismatch=lambda mismatch: None) as watched:
        attend(*given, impl=impl).sum().backward()
    assert {mismatch.name for mismatch in watched.mismatches} == {"query", "key", "value"}


def test_gradients_of_masks_sinks_and_lse_are_compared() -> None:
    query, key, value = tensors(5, 7, requires_grad=True)
    mask, sinks = torch.randn(5, 7, requires_grad=True), torch.zeros(2, requires_grad=True)
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        out, lse = attend(query, key, value, mask, sinks=sinks, return_lse=True, impl="math_ref")
        (out.sum() + lse.square().sum()).backward()
    assert (watched.gradients, dict(watched.skipped)) == (1, {})


def test_gradients_of_packed_sequences_are_compared() -> None:
    packed, starts = torch.randn(9, 2, 8, requires_grad=True), torch.tensor([0, 4, 9], dtype=torch.int32)
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        attnplug.varlen_attn(packed, packed, packed, starts, starts, 5, 5, is_causal=True).sum().backward()
    assert watched.gradients == 1


def used_twice(x: Tensor) -> Tensor:
    return attend(x, x, x) * x + attend(x, x, 2 * x)


def of_views(x: Tensor) -> Tensor:
    query, key, value = torch.stack([x, x + 1, x - 1]).unbind()
    return attend(query.transpose(1, 2).contiguous().transpose(1, 2), key.unsqueeze(1)[:, 0], value[:, :, ::1])


def of_three_dimensions(x: Tensor) -> Tensor:
    return attend(x[0], x[0], x[0])


def out_changed_in_place(x: Tensor) -> Tensor:
    return attend(x, x, x, impl="aten_math").mul_(2)


def with_a_hook(x: Tensor) -> Tensor:
    out = attend(x, x, x)
    out.register_hook(lambda gradient: gradient * 3)
    return out


def checkpointed(x: Tensor) -> Tensor:
    return checkpoint(lambda x: attend(x, x, x), x.sin(), use_reentrant=False)


def checkpointed_reentrantly(x: Tensor) -> Tensor:
    return checkpoint(lambda x: attend(x, x, x), x.sin(), use_reentrant=True)


def without_autograd_in_between(x: Tensor) -> Tensor:
    with torch.no_grad():
        kept = attend(x, x, x)
    return attend(x, x, x) * kept


def saved_elsewhere(x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        return attend(x, x, x)


PROGRAMS = [
    used_twice,
    of_views,
    of_three_dimensions,
    out_changed_in_place,
    with_a_hook,
    checkpointed,
    checkpointed_reentrantly,
    without_autograd_in_between,
    saved_elsewhere,
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_program_gives_the_same_gradients_and_no_alarm(program: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    program(x).sin().sum().backward()
    plain, x.grad = x.grad, None
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        program(x).sin().sum().backward()
    torch.testing.assert_close(x.grad, plain)  # sums of what one tensor gets as several arguments have no order
    assert watched.gradients >= 1


def test_each_backward_of_a_retained_graph_is_compared() -> None:
    given = tensors(requires_grad=True)
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        out = attend(*given)
    for factor in (1.0, 2.0, 3.0):
        (factor * out).sum().backward(retain_graph=True)
    assert watched.gradients == 3


def test_a_gradient_of_some_arguments_alone_is_compared() -> None:
    query, key, value = tensors(requires_grad=True)
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        torch.autograd.grad(attend(query, key, value).sum(), key)
        attend(query.detach(), key.detach(), value).sum().backward()
    assert watched.gradients == 2


def test_inputs_changed_in_place_are_a_reason_and_no_error() -> None:
    key, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8, requires_grad=True)
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        out = attend(key, key, value, impl="aten_math")
        key.mul_(2)  # which the gradient of value does not need
        out.sum().backward()
    assert list(watched.skipped) == ["gradients: query was changed in place between forward and backward"]


def test_gradients_that_are_summed_over_broadcast_dimensions_are_a_reason() -> None:
    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        attend(x, x[:, :1], x[:, :1]).sum().backward()
    assert list(watched.skipped) == ["gradients: the gradient of key is summed over dimensions that are broadcast"]


def test_second_derivatives_are_right_and_no_alarm() -> None:
    x = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        assert torch.autograd.gradgradcheck(lambda x: attend(x, x, x, impl="math_ref"), x)
    assert watched.gradients >= 1


def test_a_gradient_in_the_loss_is_a_reason_and_no_alarm() -> None:
    query, key, value = tensors(requires_grad=True)
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        out = attend(query, key, value, impl="math_ref")
        (gradient,) = torch.autograd.grad(out.sum(), query, create_graph=True)
        (out.sum() + gradient.square().sum()).backward()
    assert watched.gradients == 1
    assert list(watched.skipped) == ["gradients: of a call that was differentiated with create_graph=True before"]


@pytest.mark.parametrize("impl", ["torch", "aten_flash", "math_ref"])
def test_many_gradients_at_once_are_a_reason_and_no_error(impl: str) -> None:
    given = tensors(requires_grad=True)
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        out = attend(*given, impl=impl)
    grads = torch.randn(2, *out.shape)
    found = torch.autograd.grad(out, given, grads, is_grads_batched=True)
    torch.testing.assert_close(found, torch.autograd.grad(attend(*given), given, grads, is_grads_batched=True))
    assert (watched.results, watched.gradients) == (1, 0)
    assert list(watched.skipped) == ["gradients: many at once, as is_grads_batched or torch.func.vmap has them"]


def test_a_backward_that_failed_leaves_nothing_to_the_next_one() -> None:
    class FailsOnce(Formula):
        failed = False

        @classmethod
        def backward(cls, *given: Any) -> tuple[Tensor, ...]:
            if not cls.failed:
                cls.failed = True
                raise torch.OutOfMemoryError("of the test")
            return super().backward(*given)

    impl = register(FailsOnce)
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        out, lse = attend(*tensors(requires_grad=True), return_lse=True, impl=impl)
        with pytest.raises(torch.OutOfMemoryError):
            (out.sum() + lse.sum()).backward(retain_graph=True)
        out.sum().backward()
    assert watched.gradients == 1


def test_memory_of_a_sampled_call_goes_with_its_graph() -> None:
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        x = torch.randn(1, 2, 5, 8, requires_grad=True)
        gone = weakref.ref(x)
        with attnplug.verify(1.0):
            out = attend(x, x, x)
            out.sum().backward(retain_graph=True)
        del x, out
        assert gone() is None
    finally:
        gc.enable()


def test_a_kernel_that_is_wrong_for_some_lengths_is_caught_within_the_steps_that_the_rate_promises() -> None:
    """Of 16 lengths it is wrong for those above 16 keys; with 4 layers half of the calls are wrong, 2 each step."""
    impl = register(WrongGradient)
    rate, wrong_calls_per_step, missed = 0.05, 2, 1e-6
    promised = math.ceil(math.log(missed) / math.log(1 - rate) / wrong_calls_per_step)
    layers = [torch.nn.Linear(8, 8) for _ in range(4)]
    lengths = torch.Generator().manual_seed(0)
    with attnplug.verify(rate, on_mismatch="raise", seed=1) as watched, pytest.raises(MismatchError, match="of key"):
        for _ in range(promised):
            x = torch.randn(1, 2, int(torch.randint(9, 25, (), generator=lengths)), 8)
            for layer in layers:
                x = attend(layer(x), layer(x), x, impl=impl)
            x.sum().backward()
    assert watched.calls <= 4 * promised


def test_each_element_of_a_compiled_vmap_is_verified() -> None:
    impl = register(Formula)
    mapped = torch.func.vmap(lambda query, key: attend(query, key, key, impl=impl), (1, None))
    query, key = torch.randn(2, 3, 2, 5, 8).requires_grad_(), torch.randn(2, 2, 5, 8).requires_grad_()
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        torch.compile(mapped, backend="aot_eager", fullgraph=True)(query, key).sin().sum().backward()
    assert (watched.results, watched.gradients, watched.skipped) == (3, 3, {})
