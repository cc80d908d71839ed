"""What traces, exports and fakes a call: torch.compile, torch.export, fake tensors, opcheck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import attnplug
from attnplug import Feature
from attnplug._accuracy import Outcome
from attnplug._call.prepare import prepare_dense
from attnplug._registry.discovery import get_registry
from attnplug._run.operator import arguments_of, operator_of
from attnplug.testing._call import Call, compare
from attnplug.testing._checks import check
from attnplug.testing._failure import failing, failure
from attnplug.testing._inputs import Inputs
from attnplug.testing._subject import Subject

Attend = Callable[[dict[str, Any]], Any]
_UNDECLARED_LSE = (
    "a graph takes it for empty, as there is no fake that describes it; declare Feature.LSE, or return None for lse, "
    "and what backward needs behind it"
)


def _attend(subject: Subject, call: Call, inputs: Inputs) -> tuple[Attend, dict[str, Tensor], dict[str, Tensor]]:
    """Return the call as a function of its tensors, these tensors, and those of them that are leaves."""
    arguments, leaves = call.with_leaves(inputs)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    constants: dict[str, Any] = {name: value for name, value in arguments.items() if name not in tensors}
    name = subject.name

    def attend(tensors: dict[str, Any]) -> Any:
        return attnplug.scaled_dot_product_attention(**tensors, **constants, impl=name)

    return attend, tensors, leaves


def _outcome(call: Call, inputs: Inputs, returned: Any, leaves: dict[str, Tensor]) -> Outcome:
    out, lse = returned if call.lse else (returned, None)
    return Outcome(out.detach(), None if lse is None else lse.detach(), call.backward(inputs, out, lse, leaves))


def _calls(subject: Subject) -> list[Call]:
    calls = [subject.call(gradients=subject.gradients)]
    if subject.has(Feature.CAUSAL):
        calls.append(subject.call(is_causal=True, lse=subject.has(Feature.LSE)))
    return calls


@check()
def check_compile(subject: Subject) -> None:
    """torch.compile(fullgraph=True) traces the call, forward and backward, and gives the same."""
    for call, inputs in subject.taken(_calls(subject)):
        attend, tensors, leaves = _attend(subject, call, inputs)
        torch._dynamo.reset()
        with failing(call, "under torch.compile: "):
            compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
            outcome = _outcome(call, inputs, compiled(tensors), leaves)
        compare(subject.name, call, inputs, outcome)


@check(full=True, dtypes="first")
def check_compile_with_inductor(subject: Subject) -> None:
    """The same with torch.compile's own backend, for lengths that change from call to call."""
    torch._dynamo.reset()  # one function's code has a limited number of compilations
    for queries, keys in ((40, 40), (33, 50), (17, 90)):
        call, inputs = subject.one(subject.call(queries=queries, keys=keys, gradients=subject.gradients))
        attend, tensors, leaves = _attend(subject, call, inputs)
        with failing(call, "under torch.compile: "):
            outcome = _outcome(call, inputs, torch.compile(attend, fullgraph=True)(tensors), leaves)
        compare(subject.name, call, inputs, outcome)


@check()
def check_export(subject: Subject) -> None:
    """torch.export takes a module that makes the call, and the exported program gives the same."""

    class Module(torch.nn.Module):
        def forward(self, tensors: dict[str, Tensor]) -> Any:
            return attend(tensors)

    for call, inputs in subject.taken([each.but(gradients=()) for each in _calls(subject)]):
        attend, tensors, _ = _attend(subject, call, inputs)
        with failing(call, "under torch.export: "):
            exported = torch.export.export(Module(), (tensors,))
            outcome = _outcome(call, inputs, exported.module()(tensors), {})
        compare(subject.name, call, inputs, outcome)


@check()
def check_fake_tensors(subject: Subject) -> None:
    """With fake tensors, which have no memory, out and lse have the shapes, dtypes and device of real ones."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for call, inputs in subject.taken(_calls(subject)):
        attend, tensors, _ = _attend(subject, call, inputs)
        real = attend(tensors)
        with failing(call, "with fake tensors: "), FakeTensorMode() as mode:
            fake = attend({name: mode.from_tensor(tensor) for name, tensor in tensors.items()})
        for name, made, wanted in zip(("out", "lse"), _both(fake), _both(real), strict=False):
            if (made.shape, made.dtype, made.device) != (wanted.shape, wanted.dtype, wanted.device):
                raise failure(
                    call,
                    f"fake {name}: {tuple(made.shape)} {made.dtype}, real: {tuple(wanted.shape)} {wanted.dtype}",
                )


def _both(returned: Any) -> tuple[Tensor, ...]:
    return returned if isinstance(returned, tuple) else (returned,)


@check()
def check_operator(subject: Subject) -> None:
    """The operator that stands for the kernel in a graph passes torch.library.opcheck."""
    call, inputs = subject.one(subject.call(gradients=subject.gradients, lse=subject.has(Feature.LSE)))
    entry = get_registry().get(subject.name)
    kernel = entry.load()
    if kernel is None or kernel.composite:
        subject.ran = 0
        subject.uncovered.append("is traced into, and needs no operator")
        return
    params, _ = prepare_dense(call.params(inputs))
    operator, arguments = operator_of(entry).forward, arguments_of(params)
    if kernel.fake is None and not subject.has(Feature.LSE) and operator(*arguments)[1].numel():
        raise failure(call, "forward returns an lse that is not declared", _UNDECLARED_LSE)
    with failing(call, "opcheck: "):
        torch.library.opcheck(operator, arguments)
    _compare_strides(call, operator, arguments)


def _compare_strides(call: Call, operator: Any, arguments: tuple[Any, ...]) -> None:
    """Compare the strides that a graph relies on with real ones; opcheck of older releases does so on a GPU alone."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = operator(*arguments)
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(each) if isinstance(each, Tensor) else each for each in arguments))
    for name, made, wanted in zip(("out", "lse", "saved"), fake, real, strict=True):
        strides = [_significant_strides(each if name == "saved" else [each]) for each in (made, wanted)]
        if strides[0] != strides[1]:
            raise failure(call, f"fake {name}: strides {strides[0]}, real: {strides[1]}")


def _significant_strides(tensors: list[Tensor]) -> list[tuple[int, ...]]:
    """Return the strides of each tensor that say where an element is: those of one element along a dimension do not."""
    return [
        tuple(stride if size > 1 else 0 for size, stride in zip(each.shape, each.stride(), strict=True))
        for each in tensors
        if each.numel()
    ]
