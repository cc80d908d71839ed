"""A backward that a kernel prepared runs for calls that repeat one, gives what backward gives, and for no others."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import attnplug
from attnplug import Capabilities, Feature, GradientError, ImplSpec, KernelError, SDPAParams
from repeated import Q

SHAPE: tuple[int, ...] = Q.shape
SEQUENCES, LENGTH = 2, 6
STARTS = torch.tensor([0, 6, 12], dtype=torch.int32)


@pytest.fixture(autouse=True, params=[SHAPE, (12, 4, 8)], ids=["dense", "packed"])
def packed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the calls of a test are of packed sequences."""
    monkeypatch.setattr(sys.modules[__name__], "SHAPE", request.param)
    return len(SHAPE) == 3


def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    if query.dim() == 3:
        given = [tensor.unflatten(0, (SEQUENCES, LENGTH)).transpose(1, 2) for tensor in (query, key, value)]
        out, lse = attention(*given)
        return out.transpose(1, 2).flatten(0, 1), lse.transpose(0, 1).flatten(1)
    logits = query @ key.mT * query.shape[-1] ** -0.5
    return torch.softmax(logits, -1) @ value, torch.logsumexp(logits, -1)


def gradients(params: SDPAParams, grad_out: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Tensor, ...]:
    if torch.is_autocast_enabled("cpu"):
        raise AssertionError("backward runs under autocast")
    with torch.enable_grad():
        given = [t.to_dense().detach().requires_grad_() for t in (params.query, params.key, params.value)]
        out, lse = attention(*given)
        grads = [grad_out, grad_lse] if grad_lse is not None else [grad_out]
        return torch.autograd.grad([out, lse][: len(grads)], given, grads)  # type: ignore[arg-type]


class Trains:
    """Counts what runs; what it prepares runs only for tensors that are exactly like those that it was given."""

    def __init__(self, answer: Callable[..., Any] = gradients) -> None:
        self.backwards = self.asked = self.runs = 0
        self.answer = answer

    def forward(self, params: SDPAParams) -> Any:
        return *attention(params.query, params.key, params.value), params.query * 2

    def prepare(self, params: SDPAParams) -> Any:
        return lambda *tensors: self.forward(SDPAParams(*tensors[:3]))

    def prepare_packed(self, params: SDPAParams) -> Any:
        return self.prepare(params)

    def backward(
        self, params: SDPAParams, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, twice: Tensor
    ) -> Any:
        self.backwards += 1
        return gradients(params, grad_out, grad_lse)

    def prepare_backward(self, params: SDPAParams, grad_out: Tensor, out: Tensor, lse: Tensor, twice: Tensor) -> Any:
        self.asked += 1
        besides = (params.cu_seq_q, params.cu_seq_k, *[None] * 4) if params.is_varlen else ()
        told = [described(t) for t in (params.query, params.key, params.value, *besides, grad_out, out, lse, twice)]
        assert {tensor.layout for tensor in (params.query, params.key, params.value)} == {torch.strided}
        wanted = [tensor.requires_grad for tensor in (params.query, params.key, params.value)]

        def run(*tensors: Tensor) -> Any:
            assert [described(tensor) for tensor in tensors] == told
            self.runs += 1
            answer = self.answer(SDPAParams(*tensors[:3]), tensors[-4])
            if isinstance(answer, tuple) and len(answer) == 3:
                return tuple(each if want else None for each, want in zip(answer, wanted, strict=True))
            return answer

        return run


def described(tensor: Tensor | None) -> Any:
    return tensor is not None and described_as_tensor(tensor)


def described_as_tensor(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.layout, type(tensor), tensor.is_neg()


@contextmanager
def registered(kernel: Any) -> Iterator[Callable[..., Any]]:
    capabilities = Capabilities(features={Feature.LSE, Feature.LSE_GRADIENT, Feature.VARLEN})
    attnplug.register_impl(ImplSpec(name="trains", kernel=kernel, backend=None, capabilities=capabilities))
    try:
        if len(SHAPE) == 3:  # of a kind of packed sequences the second call is what the first is else
            for options in ({}, {"return_lse": True}):
                attend(*leaves(), **options, impl="trains")
        yield partial(attend, impl="trains")
    finally:
        attnplug.unregister_impl("trains")


def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    if query.dim() == 3:
        return attnplug.varlen_attn(query, key, value, STARTS, STARTS, LENGTH, LENGTH, **options)
    return attnplug.scaled_dot_product_attention(query, key, value, **options)


def leaves(count: int = 3) -> list[Tensor]:
    return [torch.randn(SHAPE).requires_grad_() for _ in range(count)]


def assert_right(
    attend: Callable[..., Any],
    grad_out: Tensor,
    wanted: tuple[int, ...] = (0, 1, 2),
    needed: tuple[int, ...] = (0, 1, 2),
) -> None:
    given = leaves()
    for number, tensor in enumerate(given):
        tensor.requires_grad_(number in needed)
    chosen = [given[number] for number in wanted]
    found = torch.autograd.grad(attend(*given), chosen, grad_out)
    expected = torch.autograd.grad(attention(*given)[0], chosen, grad_out)
    torch.testing.assert_close(found, expected)


def test_calls_that_repeat_one_run_what_the_kernel_prepared_for_backward() -> None:
    with registered(kernel := Trains()) as attend:
        for _ in range(5):
            assert_right(attend, torch.randn(SHAPE))
    assert (kernel.asked, kernel.runs, kernel.backwards) == (1, 4, 1)  # the first call is not yet one that repeats


def test_each_layout_of_a_gradient_has_a_backward_of_its_own() -> None:
    made: list[Callable[[], Tensor]] = [
        lambda: torch.randn(SHAPE),
        lambda: torch.randn(SHAPE).mT.contiguous().mT,
        lambda: torch.randn(()).expand(SHAPE),
        lambda: torch.randn(SHAPE).transpose(0, 1).contiguous().transpose(0, 1),
    ]
    with registered(kernel := Trains()) as attend:
        for make in (*made, *reversed(made), *made):
            assert_right(attend, make())
    assert kernel.asked == len(made) and kernel.runs + kernel.backwards == 3 * len(made)


def test_gradients_in_ever_new_layouts_are_right() -> None:
    with registered(kernel := Trains()) as attend:
        for _ in range(2):
            for space in range(20):
                assert_right(attend, torch.randn(*SHAPE[:-1], SHAPE[-1] + space)[..., : SHAPE[-1]])
    assert kernel.runs + kernel.backwards == 40 and kernel.backwards > 0 < kernel.runs


def test_which_gradients_are_wanted_may_differ_each_time() -> None:
    with registered(kernel := Trains()) as attend:
        for wanted in ((0, 1, 2), (0,), (1, 2), (2,)) * 3:
            assert_right(attend, torch.randn(SHAPE), wanted, needed=wanted)
            assert_right(attend, torch.randn(SHAPE), wanted)
    assert kernel.asked == 4


def test_a_graph_of_the_gradients_is_refused_as_ever() -> None:
    with registered(Trains()) as attend:
        for _ in range(3):
            assert_right(attend, torch.randn(SHAPE))
        given = leaves()
        grads = torch.autograd.grad(attend(*given).square().sum(), given, create_graph=True)
        with pytest.raises(GradientError, match="'trains' has no second derivatives"):
            grads[0].sum().backward()


def test_a_gradient_through_lse_runs_backward() -> None:
    with registered(kernel := Trains()) as attend:
        for number in range(6):
            given = leaves()
            out, lse = attend(*given, return_lse=True)
            expected, expected_lse = attention(*given)
            losses = [
                out.sum() + lse.square().sum() * (number % 2) for out, lse in ((out, lse), (expected, expected_lse))
            ]
            torch.testing.assert_close(*[torch.autograd.grad(loss, given) for loss in losses])
        ran = kernel.backwards, kernel.runs
        (given := leaves())
        torch.testing.assert_close(
            *[
                torch.autograd.grad(lse.sum(), given[:2])
                for lse in (attend(*given, return_lse=True)[1], attention(*given)[1])
            ]
        )
        assert (kernel.backwards, kernel.runs) == (ran[0] + 1, ran[1])


@pytest.mark.parametrize(
    "unpack",
    [
        lambda tensor: tensor.clone(),
        lambda tensor: tensor if tensor.dim() == 1 else tensor.mT.contiguous().mT,
        lambda tensor: tensor.to_sparse() if tensor.shape == SHAPE else tensor,
    ],
    ids=["alike", "laid out otherwise", "sparse"],
)
def test_hooks_of_saved_tensors_may_give_other_tensors_back(unpack: Any) -> None:
    with registered(Trains()) as attend:
        for hooked in (False, False, True, True, False):
            given, grad_out = leaves(), torch.randn(SHAPE)
            with saved_tensors_hooks(lambda tensor: tensor, unpack if hooked else lambda tensor: tensor):
                out = attend(*given)
            torch.testing.assert_close(
                torch.autograd.grad(out, given, grad_out), torch.autograd.grad(attention(*given)[0], given, grad_out)
            )


def test_under_autocast_or_a_transform_backward_runs_as_ever() -> None:
    with registered(kernel := Trains()) as attend:
        for _ in range(3):
            assert_right(attend, torch.randn(SHAPE))
        runs = kernel.runs
        for _ in range(2):
            given, grad_out = leaves(), torch.randn(SHAPE)
            out = attend(*given)
            expected = torch.autograd.grad(attention(*given)[0], given, grad_out)
            with torch.autocast("cpu", torch.bfloat16):
                found = torch.autograd.grad(out, given, grad_out)
            torch.testing.assert_close(found, expected)
        given, grads = leaves(), torch.randn(3, *SHAPE)
        found = torch.autograd.grad(attend(*given), given, grads, is_grads_batched=True)
        torch.testing.assert_close(
            found, torch.autograd.grad(attention(*given)[0], given, grads, is_grads_batched=True)
        )
        assert kernel.runs == runs
        assert_right(attend, torch.randn(SHAPE))
        assert kernel.runs == runs + 1


def test_a_gradient_that_is_negated_in_memory_is_read_as_what_it_is() -> None:
    with registered(Trains()) as attend:
        for _ in range(3):
            assert_right(attend, torch.randn(SHAPE))
            assert_right(attend, torch.randn(SHAPE, dtype=torch.complex64).conj().imag)


def test_a_checkpoint_of_calls_that_repeat_one_gives_their_gradients() -> None:
    with registered(kernel := Trains()) as attend:
        for _ in range(4):
            assert_right(lambda *given: checkpoint(attend, *given, use_reentrant=False), torch.randn(SHAPE))
    assert kernel.runs == 3


def test_a_kernel_may_have_backward_called_after_all() -> None:
    with registered(kernel := Trains(lambda params, grad_out: None)) as attend:
        for _ in range(4):
            assert_right(attend, torch.randn(SHAPE))
    assert (kernel.asked, kernel.runs, kernel.backwards) == (1, 3, 4)


def test_a_kernel_that_prepares_nothing_for_backward_is_asked_once() -> None:
    class Declines(Trains):
        def prepare_backward(self, *given: Any) -> Any:
            self.asked += 1

    with registered(kernel := Declines()) as attend:
        for _ in range(4):
            assert_right(attend, torch.randn(SHAPE))
    assert (kernel.asked, kernel.backwards) == (1, 4)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda params, grad_out: grad_out, "'trains': backward must return"),
        (lambda params, grad_out: (grad_out, grad_out), "'trains': backward must return .*, got tuple of 2"),
        (
            lambda params, grad_out: (grad_out[:1], grad_out, grad_out),
            "'trains': the gradient of query must have shape",
        ),
        (lambda params, grad_out: (grad_out, None, grad_out), "'trains': backward returned no gradient of key"),
    ],
)
def test_what_a_prepared_backward_returns_is_checked(answer: Any, message: str) -> None:
    with registered(Trains(answer)) as attend:
        assert_right(attend, torch.randn(SHAPE))
        with pytest.raises(KernelError, match=message):
            attend(*leaves()).sum().backward()


def test_a_gradient_that_is_missing_later_is_no_zero() -> None:
    with registered(kernel := Trains()) as attend:
        for _ in range(3):
            assert_right(attend, torch.randn(SHAPE))
        kernel.answer = lambda params, grad_out: (grad_out, None, grad_out)
        with pytest.raises(KernelError, match="'trains': backward returned no gradient of key"):
            attend(*leaves()).sum().backward()
        query, key, value = leaves()
        attend(query, key.requires_grad_(False), value).sum().backward()


def test_what_is_prepared_for_backward_must_be_a_function() -> None:
    class Wrong(Trains):
        def prepare_backward(self, *given: Any) -> Any:
            return 3

    with registered(Wrong()) as attend:
        assert_right(attend, torch.randn(SHAPE))
        with pytest.raises(KernelError, match="'trains': prepare_backward must return a function or None, got int"):
            attend(*leaves()).sum().backward()


def test_verification_sees_the_gradients_of_a_prepared_backward() -> None:
    def wrong(params: SDPAParams, grad_out: Tensor) -> Any:
        query, *others = gradients(params, grad_out)
        return query * 1.5, *others

    found: list[Any] = []
    with registered(Trains(wrong)) as attend, attnplug.verify(1.0, on_mismatch=found.append):
        for _ in range(3):
            attend(*leaves()).square().sum().backward()
    assert len(found) == 2


def test_pytorchs_function_is_itself_in_a_prepared_backward(packed: bool) -> None:
    def answer(params: SDPAParams, grad_out: Tensor) -> Any:
        with torch.enable_grad():
            tokens = [t.detach().requires_grad_() for t in (params.query, params.key, params.value)]
            given = [t.unflatten(0, (SEQUENCES, LENGTH)).transpose(1, 2) for t in tokens] if packed else tokens
            out = torch.nn.functional.scaled_dot_product_attention(*given)
            return torch.autograd.grad(out.transpose(1, 2).flatten(0, 1) if packed else out, tokens, grad_out)

    with registered(kernel := Trains(answer)) as attend, attnplug.patch_torch():
        for _ in range(3):
            with attnplug.record() as calls:
                attend(*leaves()).sum().backward()
            assert [call.impl for call in calls] == ["trains"]
    assert kernel.runs == 2


def test_a_prepared_backward_keeps_no_tensor_alive() -> None:
    with registered(Trains()) as attend:
        references = []
        for _ in range(3):
            given, grad_out = leaves(), torch.randn(SHAPE)
            torch.autograd.grad(attend(*given), given, grad_out)
            references += [weakref.ref(tensor) for tensor in (*given, grad_out)]
            del given, grad_out
        gc.collect()
        assert all(reference() is None for reference in references)


def test_a_call_whose_lse_nobody_asked_for_may_save_something_else_for_it() -> None:
    class Saves(Trains):
        def prepare(self, params: SDPAParams) -> Any:
            if params.return_lse:
                return super().prepare(params)

            def run(*tensors: Tensor) -> Any:
                out, lse, _ = self.forward(SDPAParams(*tensors[:3]))
                return out, None, lse

            return run

        def backward(self, params: SDPAParams, grad_out: Any, grad_lse: Any, out: Tensor, lse: Any, *saved: Any) -> Any:
            self.backwards += 1
            assert (saved[0] if lse is None else lse).shape == params.lse_shape
            return gradients(params, grad_out, grad_lse)

        def prepare_backward(self, params: SDPAParams, grad_out: Tensor, out: Tensor, lse: Any, *saved: Any) -> Any:
            assert (lse is None) is (saved[0].shape == params.lse_shape)
            self.asked += 1

            def run(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Any:
                grad_out, _, kept = others[-4:-1]
                self.runs += 1
                assert (kept is None) is (lse is None)
                return gradients(SDPAParams(query, key, value), grad_out)

            return run

    with registered(kernel := Saves()) as attend:
        for _ in range(4):
            assert_right(attend, torch.randn(SHAPE))
            assert_right(lambda *given: attend(*given, return_lse=True)[0], torch.randn(SHAPE))
            given = leaves()
            torch.autograd.grad(attend(*given).sum(), given, create_graph=True)  # which backward is called for
    assert kernel.asked == 2 and kernel.runs == 6


def test_a_gradient_goes_through_a_tensor_that_a_transform_left_behind() -> None:
    left: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        left.append(tensor * 1)
        return tensor.sum()

    source = torch.randn(SHAPE).requires_grad_()
    torch.func.grad(keep)(source)
    with registered(Trains()) as attend:
        for _ in range(3):
            given = leaves()[:2]
            losses = [out.sum() for out in (attend(left[0], *given), attention(left[0], *given)[0])]
            torch.testing.assert_close(
                *[torch.autograd.grad(loss, [source, *given], retain_graph=True) for loss in losses]
            )
