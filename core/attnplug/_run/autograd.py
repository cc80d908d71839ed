"""From an author's forward and backward to autograd, for every kernel that runs in eager code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from attnplug._call.autocast import any_autocast
from attnplug._errors import GradientError
from attnplug._registry.registry import Entry
from attnplug._run.batched import backward_of_wrapped, is_wrapped
from attnplug._run.contract import (
    DIFFERENTIABLE,
    TENSORS,
    BackwardInputs,
    KernelCall,
    Order,
    Result,
    declares,
    no_lse_gradient,
    no_second_derivatives,
    run_forward,
    tensors_of,
)
from attnplug._run.operator import backward_in_trace, count_modes, is_jit_tracing
from attnplug._types import Feature, SDPAParams


def run(entry: Entry, params: SDPAParams, grad: bool) -> Result:
    """Run the chosen kernel and return `out` and `lse`, differentiable where `grad` is true.

    Raises:
        KernelError: the kernel returned something else than it must.
    """
    looked_into = entry.kernel.composite and is_jit_tracing()  # its operators are what `torch.jit.trace` can keep
    if grad and entry.kernel.backward is not None and not looked_into:
        order = Order.of(params)
        once = _Once(KernelCall.of(entry, params), order, lambda *_: run_forward(entry, params))
        out, lse = _Attention.apply(once, *order.own(tensors_of(params)))
        return out, lse
    out, lse = run_forward(entry, params)[:2]
    return refusing_lse_gradient(entry, params, out, lse) if grad else (out, lse)


def refusing_lse_gradient(entry: Entry, params: SDPAParams, out: Tensor, lse: Tensor | None) -> Result:
    """Return `out`, and `lse` such that asking for its gradient raises unless the kernel declares one."""
    if lse is not None and params.return_lse and not declares(entry, Feature.LSE_GRADIENT):
        lse = _RefuseTangentsToo.apply(
            no_lse_gradient(entry), 1, lse.detach(), *tensors_of(params)[: len(DIFFERENTIABLE)]
        )
    return out, lse


class Recorded(Protocol):
    """A call that autograd records.

    Attributes:
        call: what it is besides its tensors.
        order: of its tensors, which autograd is told of: those that it has. How many are saved, and in which order, is
            thus the same whether it was prepared or not, as checkpoints want it.
        forward: returns `(out, lse, *saved)` of them.
        backward: returns their gradients, or None to leave that to `call`. Given are which are wanted, the gradient of
            out, and all that was saved. It is called where lse has no gradient, no graph is recorded, and autocast is
            off.
    """

    call: KernelCall
    order: Order
    forward: Callable[..., tuple[Any, ...]]
    backward: Callable[..., Any]


@dataclass
class _Once:
    """A call for which nothing was prepared."""

    call: KernelCall
    order: Order
    forward: Callable[..., tuple[Any, ...]]

    def backward(self, *given: Any) -> None:
        """Leave it to the call."""


class _Attention(torch.autograd.Function):
    """A kernel's forward and backward. What ran forward runs backward, whatever is selected by then."""

    apply: Any  # PyTorch's has no types

    @staticmethod
    def forward(ctx: Any, one: Recorded, *tensors: Tensor | None) -> tuple[Any, Any]:
        out, lse, *saved = one.forward(*tensors)
        ctx.one = one
        ctx.save_for_backward(*tensors, out, lse, *saved)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        one: Recorded = ctx.one
        call, order = one.call, one.order
        everything = ctx.saved_tensors  # which a checkpoint lets one ask for once
        recording, tracing = torch.is_grad_enabled(), is_compiling()
        dual = forward_ad._current_level >= 0  # in which a gradient may have a tangent, which no kernel reads
        watched = not tracing and count_modes() > 0  # by what must see an operator, wherever forward ran
        if not (grad_out is None or grad_lse is not None or recording or tracing or dual or watched or any_autocast()):
            found = one.backward(ctx.needs_input_grad[1:], grad_out, *everything)
            if found is not None:
                return None, *found
        tensors, (out, lse, *saved) = order.whole(everything[: order.count]), everything[order.count :]
        wanted = order.whole(ctx.needs_input_grad[1:], False)[: len(DIFFERENTIABLE)]
        given = BackwardInputs(tensors, wanted, grad_out, grad_lse, out, lse, saved)
        differentiates = recording and declares(call.entry, Feature.SECOND_DERIVATIVES)
        opaque = not call.entry.kernel.composite
        if differentiates:
            grads = call.backward(given)
        elif not tracing and (
            (opaque and dual) or ((opaque or recording) and (is_wrapped(grad_out) or is_wrapped(grad_lse)))
        ):
            grads = backward_of_wrapped(call, given)
        else:
            as_operator = tracing or (opaque and watched)
            grads = backward_in_trace(call, given) if as_operator else call.backward(given)
            if recording:
                inputs = *tensors[: len(DIFFERENTIABLE)], grad_out, grad_lse
                grads = _refuse_second_derivatives(call.entry, grads, inputs)
        return None, *order.own((*grads, *_ABSENT))


record_repeated: Callable[..., Result] = super(torch.autograd.Function, _Attention).apply
"""Return `out` and `lse`, given a `Recorded` and its tensors, none of which a transform of `torch.func` has wrapped.

`_Attention.apply` would look for such tensors, which takes 5 us.
"""


_ABSENT = (None,) * len(TENSORS)


class _Refuse(torch.autograd.Function):
    """Pass `count` tensors through, and raise where someone asks for their gradient."""

    apply: Any  # PyTorch's has no types
    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, count: int, *tensors: Any) -> Any:
        passed = tuple(tensor.view_as(tensor) for tensor in tensors[:count])
        return passed[0] if count == 1 else passed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise GradientError(ctx.message)


class _RefuseTangentsToo(_Refuse):
    """The same, which raises in forward mode, too. Dynamo traces none that has a `jvp`."""

    jvp = _Refuse.backward


def _refuse_second_derivatives(entry: Entry, grads: list[Tensor | None], inputs: Any) -> list[Tensor | None]:
    present = [grad for grad in grads if grad is not None]
    if not present:
        return grads
    passed = _Refuse.apply(no_second_derivatives(entry), len(present), *present, *inputs)
    wrapped = iter(passed if isinstance(passed, tuple) else (passed,))
    return [None if grad is None else next(wrapped) for grad in grads]
