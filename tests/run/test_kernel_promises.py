"""A kernel that breaks its promise is an error that names it: what it returned never reaches the user.

The implementations are registered by the tests themselves, each beside one that keeps its promises.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import attnplug
from attnplug import Capabilities, Feature, ImplSpec, KernelError, SDPAParams, SDPBackend


def formula(params: Any) -> tuple[Tensor, Tensor]:
    """Attention with softcap and mask, made of PyTorch's operators."""
    logits = params.scale * params.query @ params.key.mT
    if params.softcap:
        logits = params.softcap * torch.tanh(logits / params.softcap)
    if params.attn_mask is not None:
        logits = logits + params.attn_mask
    return torch.softmax(logits, -1) @ params.value, torch.logsumexp(logits, -1)


def inputs(requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, 5, 8)
    query, key, value = (torch.randn(shape, generator=generator, requires_grad=requires_grad) for _ in range(3))
    return query, key, value


@pytest.fixture
def register() -> Iterator[Callable[..., None]]:
    """Registers implementations for the length of a test; `sound` is one that keeps its promises."""
    names = []

    def register(name: str, kernel: Any, priority: int = -300) -> None:
        attnplug.register_impl(
            ImplSpec(
                name=name,
                kernel=kernel,
                backend=SDPBackend.MATH,
                capabilities=Capabilities(features=frozenset(Feature)),
                priority=priority,
            )
        )
        names.append(name)

    register("sound", SimpleNamespace(forward=formula, composite=True), priority=1000)
    yield register
    for name in names:
        attnplug.unregister_impl(name)


def assert_others_work() -> None:
    """Plain calls, another implementation and a built-in one give what PyTorch gives, gradients too."""
    theirs = inputs(requires_grad=True)
    expected = F.scaled_dot_product_attention(*theirs)
    gradients = torch.autograd.grad(expected.sum(), theirs)
    for impl in (None, "sound", "aten_math"):
        mine = inputs(requires_grad=True)
        out = attnplug.scaled_dot_product_attention(*mine, impl=impl)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), mine), gradients)


# Forwards that return something wrong -------------------------------------------------------------------

Returned = Callable[[Tensor, Tensor], Any]

WRONG_RESULTS: dict[str, tuple[Returned, str]] = {
    "nothing": (lambda out, lse: None, "got None"),
    "no_tuple": (lambda out, lse: out, "Tensor"),
    "a_list": (lambda out, lse: [out, lse], "tuple"),
    "no_value": (lambda out, lse: (), "tuple of 0"),
    "one_value": (lambda out, lse: (out,), "tuple of 1"),
    "no_out": (lambda out, lse: (None, lse), "out .*NoneType"),
    "an_array": (lambda out, lse: (out.detach().numpy(), lse), "out .*ndarray"),
    "another_layout": (
        lambda out, lse: (out.transpose(1, 2), lse),
        r"out .*\(1, 2, 5, 8\), got \(1, 5, 2, 8\)",
    ),
    "another_rank": (lambda out, lse: (out.flatten(0, 1), lse), r"out .*got \(2, 5, 8\)"),
    "too_few_queries": (lambda out, lse: (out[:, :, :1], lse), r"out .*got \(1, 2, 1, 8\)"),
    "too_wide": (lambda out, lse: (F.pad(out, (0, 8)), lse), r"out .*got \(1, 2, 5, 16\)"),
    "another_dtype": (lambda out, lse: (out.double(), lse), "out .*float32, got torch.float64"),
    "half_a_dtype": (lambda out, lse: (out.half(), lse), "out .*float32, got torch.float16"),
    "another_device": (lambda out, lse: (out.to("meta"), lse), "out .*cpu, got meta"),
    "no_lse": (lambda out, lse: (out, None), "lse .*NoneType"),
    "lse_as_a_column": (lambda out, lse: (out, lse[..., None]), r"lse .*\(1, 2, 5\), got \(1, 2, 5, 1\)"),
    "lse_of_other_rows": (lambda out, lse: (out, lse.mT), r"lse .*got \(1, 5, 2\)"),
    "lse_of_another_dtype": (lambda out, lse: (out, lse.bfloat16()), "lse .*float32, got torch.bfloat16"),
    "lse_elsewhere": (lambda out, lse: (out, lse.to("meta")), "lse .*cpu, got meta"),
}


def no_backward_yet(params: Any, grad_out: Any, grad_lse: Any, out: Any, lse: Any, *saved: Any) -> Any:
    raise AssertionError("forward should have failed")


@pytest.mark.parametrize("name", WRONG_RESULTS)
def test_wrong_result_is_an_error_that_names_the_implementation(register: Any, name: str) -> None:
    returned, reason = WRONG_RESULTS[name]
    register("wrong", lambda params: returned(*formula(params)))
    for _ in range(2):  # decided, and by the decision that was kept
        with pytest.raises(KernelError, match=f"(?s)'wrong'.*{reason}"):
            attnplug.scaled_dot_product_attention(*inputs(), return_lse=True, impl="wrong")
    with attnplug.sdpa_kernel("wrong"), pytest.raises(KernelError, match="'wrong'"):
        attnplug.scaled_dot_product_attention(*inputs(), return_lse=True)
    assert_others_work()


def test_an_lse_that_nobody_asked_for_is_checked_too(register: Any) -> None:
    """Backward is given it."""
    register("wrong", lambda params: (formula(params)[0], formula(params)[1].mT))
    with pytest.raises(KernelError, match=r"'wrong'.*lse .*got \(1, 5, 2\)"):
        attnplug.scaled_dot_product_attention(*inputs(), impl="wrong")


@pytest.mark.parametrize("kind", [{"composite": True}, {"backward": no_backward_yet}])
@pytest.mark.parametrize("name", WRONG_RESULTS)
def test_wrong_result_is_an_error_when_gradients_are_wanted(register: Any, name: str, kind: dict[str, Any]) -> None:
    returned, reason = WRONG_RESULTS[name]
    register("wrong", SimpleNamespace(forward=lambda params: returned(*formula(params)), **kind))
    with pytest.raises(KernelError, match=f"(?s)'wrong'.*{reason}"):
        attnplug.scaled_dot_product_attention(*inputs(requires_grad=True), return_lse=True, impl="wrong")


@pytest.mark.parametrize("composite", [False, True])
def test_wrong_result_is_an_error_of_compiled_functions_too(register: Any, composite: bool) -> None:
    def forward(params: Any) -> Any:
        out, lse = formula(params)
        return out.double(), lse

    register("wrong", SimpleNamespace(forward=forward, composite=composite))

    @torch.compile(backend="eager")
    def compiled(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return attnplug.scaled_dot_product_attention(query, key, value, impl="wrong")

    with pytest.raises(KernelError, match="'wrong'"):
        compiled(*inputs())


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: None, "TypeError: .*"),
        (tuple, "ValueError: .*"),
    ],
)
def test_a_fake_that_fails_is_named_where_a_graph_needs_it_and_stops_no_call(
    register: Any, returned: Any, said: str
) -> None:
    register("wrong", SimpleNamespace(forward=formula, fake=lambda params: returned()))

    def attend(*tensors: Tensor) -> Any:
        return attnplug.scaled_dot_product_attention(*tensors, impl="wrong")

    message = f"implementation 'wrong': fake raised {said}"
    with pytest.warns(attnplug.PluginWarning, match=f"{message}; such calls run uncompiled"):
        out = torch.compile(attend, backend="eager")(*inputs())
    torch.testing.assert_close(out, attend(*inputs()))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message), pytest.warns(attnplug.PluginWarning):
        torch.compile(attend, backend="eager", fullgraph=True)(*inputs())


def test_wrong_result_of_the_active_implementation_does_not_fall_back_in_silence(register: Any) -> None:
    register("wrong", lambda params: (formula(params)[0].double(), None))
    attnplug.activate_flash_attention_impl("wrong")
    try:
        with pytest.raises(KernelError, match="'wrong'"):
            attnplug.scaled_dot_product_attention(*inputs())
    finally:
        attnplug.restore_flash_attention_impl()
    assert_others_work()


def test_wrong_result_of_variable_length_calls_is_an_error(register: Any) -> None:
    query = torch.randn(5, 2, 8)
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    good = torch.randn(5, 2, 8), torch.randn(2, 5)
    for name, result in {
        "padded": (torch.randn(2, 3, 2, 8), good[1]),
        "heads_first": (good[0].transpose(0, 1), good[1]),
        "lse_by_token": (good[0], good[1].mT),
    }.items():
        register(name, lambda params, result=result: result)
        with pytest.raises(KernelError, match=f"'{name}'"):
            attnplug.varlen_attn(query, query, query, offsets, offsets, 3, 3, return_lse=True, impl=name)


def test_saved_values_that_are_no_tensors_are_an_error_that_names_the_implementation(register: Any) -> None:
    kernel = SimpleNamespace(forward=lambda params: (*formula(params), 3), backward=no_backward_yet)
    register("wrong", kernel)
    with pytest.raises(KernelError, match="'wrong'"):
        attnplug.scaled_dot_product_attention(*inputs(requires_grad=True), impl="wrong")


# Backwards that return something wrong ------------------------------------------------------------------

Gradients = Callable[..., Any]

WRONG_GRADIENTS: dict[str, tuple[Gradients, str]] = {
    "nothing": (lambda q, k, v, m, s: None, "got None"),
    "one_tensor": (lambda q, k, v, m, s: q, "Tensor"),
    "two": (lambda q, k, v, m, s: (q, k), "got tuple of 2"),
    "six": (lambda q, k, v, m, s: (q, k, v, m, s, s), "got tuple of 6"),
    "no_query": (lambda q, k, v, m, s: (None, k, v, m, s), "query"),
    "no_key": (lambda q, k, v, m, s: (q, None, v, m, s), "key"),
    "no_value": (lambda q, k, v, m, s: (q, k, None, m, s), "value"),
    "no_mask": (lambda q, k, v, m, s: (q, k, v, None, s), "attn_mask"),
    "no_mask_nor_sinks": (lambda q, k, v, m, s: (q, k, v), "attn_mask"),
    "no_sinks": (lambda q, k, v, m, s: (q, k, v, m), "sinks"),
    "a_number": (lambda q, k, v, m, s: (0.0, k, v, m, s), "query .*float"),
    "an_array": (lambda q, k, v, m, s: (q, np.zeros((1, 2, 5, 8)), v, m, s), "key .*ndarray"),
    "one_query": (lambda q, k, v, m, s: (q[:, :, :1], k, v, m, s), r"query .*got \(1, 2, 1, 8\)"),
    "another_layout": (lambda q, k, v, m, s: (q, k, v.transpose(1, 2), m, s), r"value .*got \(1, 5, 2, 8\)"),
    "another_dtype": (lambda q, k, v, m, s: (q, k.double(), v, m, s), "key .*got torch.float64"),
    "another_device": (lambda q, k, v, m, s: (q, k, v.to("meta"), m, s), "value .*got meta"),
    "mask_of_other_keys": (lambda q, k, v, m, s: (q, k, v, m[..., :3], s), "attn_mask"),
    "mask_is_a_number": (lambda q, k, v, m, s: (q, k, v, 1.0, s), "attn_mask"),
    "mask_elsewhere": (lambda q, k, v, m, s: (q, k, v, m.to("meta"), s), "attn_mask"),
    "sinks_of_other_heads": (lambda q, k, v, m, s: (q, k, v, m, s[:1]), r"sinks .*got \(1,\)"),
}


def with_backward(returned: Gradients) -> SimpleNamespace:
    """A kernel whose backward gives zeros of the right kinds to `returned`, and returns what that does."""

    def backward(params: Any, grad_out: Any, grad_lse: Any, out: Any, lse: Any, *saved: Any) -> Any:
        tensors = (params.query, params.key, params.value, params.attn_mask, params.sinks)
        return returned(*(tensor if tensor is None else torch.zeros_like(tensor) for tensor in tensors))

    return SimpleNamespace(forward=formula, backward=backward)


@pytest.mark.parametrize("name", WRONG_GRADIENTS)
def test_wrong_gradient_is_an_error_that_names_the_implementation(register: Any, name: str) -> None:
    returned, reason = WRONG_GRADIENTS[name]
    register("wrong", with_backward(returned))
    mask, sinks = torch.zeros(5, 5, requires_grad=True), torch.zeros(2, requires_grad=True)
    out = attnplug.scaled_dot_product_attention(*inputs(requires_grad=True), attn_mask=mask, sinks=sinks, impl="wrong")
    with pytest.raises(KernelError, match=f"(?s)'wrong'.*{reason}"):
        out.sum().backward()
    assert mask.grad is None and sinks.grad is None
    assert_others_work()


def test_gradients_that_nobody_wants_may_be_none_or_missing(register: Any) -> None:
    register("lazy", with_backward(lambda q, k, v, m, s: (q, None, v)))
    query, key, value = inputs(requires_grad=True)
    mask = torch.zeros(5, 5)
    out = attnplug.scaled_dot_product_attention(query, key.detach(), value, attn_mask=mask, impl="lazy")
    out.sum().backward()
    assert query.grad is not None and value.grad is not None and key.grad is None and mask.grad is None


# `supports` that fails ----------------------------------------------------------------------------------


def raises(params: Any) -> Any:
    raise RuntimeError("no luck today")


class Unshown(BaseException):
    """Neither an `Exception`, as a panic of Rust's is not, nor one that can be shown."""

    def __str__(self) -> str:
        raise RuntimeError


def panics(params: Any) -> Any:
    raise Unshown


@pytest.mark.parametrize(
    ("supports", "reason"),
    [
        (raises, "no luck today"),
        (panics, "Unshown: its message cannot be shown"),
        (sys.exit, "SystemExit"),
        (lambda params: 3, "3"),
        (lambda params: object(), "object"),
    ],
)
def test_supports_that_fails_is_a_refusal_with_its_reason(register: Any, supports: Any, reason: str) -> None:
    register("wrong", SimpleNamespace(forward=formula, composite=True, supports=supports), priority=2000)
    tensors = inputs()
    with attnplug.sdpa_kernel(["wrong", "sound"], set_priority=True):
        with attnplug.record() as calls:
            attnplug.scaled_dot_product_attention(*tensors, softcap=2.0)
        explanation = attnplug.explain(*tensors, softcap=2.0)
    assert calls[0].impl == "sound"
    assert any(reason in why for why in calls[0].passed_over["wrong"])
    assert explanation.chosen == "sound" and reason in " ".join(str(explanation).split())
    with pytest.raises(attnplug.NoImplementationError, match=reason):
        attnplug.scaled_dot_product_attention(*tensors, impl="wrong")


def test_what_is_unavailable_here_cannot_be_activated_and_declines_every_call(register: Any) -> None:
    kernel = SimpleNamespace(forward=formula, composite=True, unavailable=lambda: "needs another compiler")
    register("wrong", kernel, priority=2000)
    for _ in range(2):
        with pytest.raises(attnplug.NoImplementationError, match="needs another compiler"):
            attnplug.activate_flash_attention_impl("wrong")
        assert attnplug.current_flash_attention_impl() is None
        with pytest.raises(attnplug.NoImplementationError, match="needs another compiler"):
            attnplug.scaled_dot_product_attention(*inputs(), impl="wrong")
    (record,) = (record for record in attnplug.list_impls() if record.name == "wrong")
    assert (record.status, record.reason) == ("unavailable", "needs another compiler")
    with attnplug.sdpa_kernel(["wrong", "sound"], set_priority=True):
        assert attnplug.explain(*inputs(), softcap=2.0).chosen == "sound"


def test_a_feature_that_this_machines_libraries_lack_declines_the_calls_that_ask_for_it(register: Any) -> None:
    lacking = {Feature.SOFTCAP: "needs Wrong 3.0 for softcap, found 2.1"}

    def lacks(device: torch.device, dtype: torch.dtype) -> dict[Feature, str]:
        return lacking if dtype is torch.float32 else {}

    register("wrong", SimpleNamespace(forward=formula, composite=True, lacks=lacks), priority=2000)
    attnplug.scaled_dot_product_attention(*inputs(), impl="wrong")
    with pytest.raises(attnplug.NoImplementationError, match=r"needs Wrong 3.0 for softcap, found 2.1"):
        attnplug.scaled_dot_product_attention(*inputs(), softcap=2.0, impl="wrong")
    assert attnplug.can_use_impl("wrong", SDPAParams(*(tensor.bfloat16() for tensor in inputs()), softcap=2.0))


def test_lacks_that_raises_declines_with_what_it_raised(register: Any) -> None:
    def lacks(device: torch.device, dtype: torch.dtype) -> dict[Feature, str]:
        raise OSError("no such library")

    register("wrong", SimpleNamespace(forward=formula, composite=True, lacks=lacks), priority=2000)
    with pytest.raises(attnplug.NoImplementationError, match=r"lacks\(\) raised OSError: no such library"):
        attnplug.scaled_dot_product_attention(*inputs(), impl="wrong")


def test_notes_of_a_call_that_is_taken_stand_in_its_explanation(register: Any) -> None:
    def notes(params: SDPAParams) -> str:
        return f"runs in tiles of {params.query.shape[-1]}"

    def supports(params: SDPAParams) -> str:
        return "has no softcap" if params.softcap else ""

    kernel = SimpleNamespace(forward=formula, composite=True, supports=supports, notes=notes)
    register("noting", kernel, priority=2000)
    query, key, value = inputs()
    explanation = attnplug.explain(query, key, value, impl="noting")
    said = f"runs in tiles of {query.shape[-1]}"
    assert explanation.candidates[0].notes == (said,) and explanation.candidates[0].reasons == ()
    assert said in " ".join(str(explanation).split())
    assert attnplug.can_use_impl("noting", SDPAParams(query, key, value)).notes == (said,)
    declined = attnplug.can_use_impl("noting", SDPAParams(query, key, value, softcap=2.0))
    assert (declined.reasons, declined.notes) == (("has no softcap",), ())


def test_notes_that_raise_are_told_and_stop_no_call(register: Any) -> None:
    register("noting", SimpleNamespace(forward=formula, composite=True, notes=lambda params: 1 / 0), priority=2000)
    attnplug.scaled_dot_product_attention(*inputs(), impl="noting")
    (note,) = attnplug.explain(*inputs(), impl="noting").candidates[0].notes
    assert note == "notes() raised ZeroDivisionError: division by zero"
