"""Kernels under `torch.func` (grad, vmap and what is made of them) and under forward-mode derivatives.

A kernel made of PyTorch operators is run as it stands, and they transform it. For an opaque one the
transforms need rules: `vmap` runs it once for each element, since a kernel has no dimension to spare, and
what has no rule (forward-mode and second derivatives) raises, rather than giving a zero.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnplug._errors import GradientError
from attnplug._registry.registry import Entry
from attnplug._run.autograd import refusing_lse_gradient
from attnplug._run.batched import Transform, backward_of_wrapped, one_by_one, refuse_equal_draws, transforms_around
from attnplug._run.constant_lse import constant_lse, refusal, without_gradient
from attnplug._run.contract import (
    DIFFERENTIABLE,
    TENSORS,
    BackwardInputs,
    KernelCall,
    Result,
    no_forward_derivatives,
    run_forward,
    tensors_of,
)
from attnplug._run.operator import OperatorCall, is_watched, operator_of
from attnplug._types import SDPAParams


def is_transformed() -> bool:
    """Whether a transform of `torch.func`, or a level of forward-mode derivatives, is around this call."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_mapped_alone() -> bool:
    """Whether `vmap` is all that is around this call."""
    return forward_ad._current_level < 0 and {*transforms_around()} == {Transform.Vmap}


def run_transformed(entry: Entry, params: SDPAParams) -> Result:
    """Run the chosen kernel so that the transforms around this call see it; returns `out` and `lse`.

    Raises:
        GradientError: the kernel has no rule for one of them.
    """
    if entry.kernel.composite:
        out, lse = _run_composite(entry, params)[:2]
        dual = forward_ad._current_level >= 0
        if lse is not None and params.return_lse and _is_functionalized() and not dual:  # as below
            return out, without_gradient(constant_lse(), refusal(entry), params, lse)
        return refusing_lse_gradient(entry, params, out, lse)
    if _is_functionalized():  # by which no autograd.Function can be seen, but an operator is
        if forward_ad._current_level >= 0:  # whose tangents an operator would lose
            raise GradientError(no_forward_derivatives(entry))
        return operator_of(entry).run(params)
    kind = OperatorCall if is_watched(_innermost(params.query)) else KernelCall
    returned = _Forward.apply(kind.of(entry, params), *tensors_of(params))
    return returned[0], returned[1] if params.return_lse else None


def _run_composite(entry: Entry, params: SDPAParams) -> tuple[Any, ...]:
    """Run a kernel made of PyTorch operators, of which one may have no forward-mode derivatives."""
    try:
        return run_forward(entry, params)
    except NotImplementedError as error:  # PyTorch's, which names the operator, but neither kernel nor way out
        if re.search("forward[- ](mode )?AD", str(error)) is None:
            raise
        raise GradientError(no_forward_derivatives(entry)) from error


def _innermost(tensor: Tensor) -> Tensor:
    """Return the tensor that the transforms have wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _is_functionalized() -> bool:
    """Whether the innermost transform is `torch.func.functionalize`."""
    return transforms_around()[-1:] == [Transform.Functionalize]


class _Forward(torch.autograd.Function):
    """The kernel's forward."""

    apply: Any  # PyTorch's has no types

    @staticmethod
    def forward(call: KernelCall, *tensors: Tensor | None) -> tuple[Any, ...]:
        return call.forward(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *grad_saved: Tensor | None) -> Any:
        call: KernelCall = ctx.call
        everything = ctx.saved_tensors  # which a checkpoint lets one ask for once
        tensors, (out, lse, *saved) = everything[: len(TENSORS)], everything[len(TENSORS) :]
        wanted = tuple(ctx.needs_input_grad[1 : 1 + len(DIFFERENTIABLE)])
        grads = backward_of_wrapped(call, BackwardInputs(tensors, wanted, grad_out, grad_lse, out, lse, saved))
        return (None, *grads, *(None for _ in TENSORS[len(DIFFERENTIABLE) :]))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise GradientError(no_forward_derivatives(ctx.call.entry))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: KernelCall, *tensors: Tensor | None) -> Any:
        refuse_equal_draws(call, info.randomness)
        return one_by_one(info.batch_size, in_dims[1:], tensors, lambda each: _Forward.apply(call, *each))
