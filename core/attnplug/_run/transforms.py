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
from attnplug._run.contract import (
    DIFFERENTIABLE,
    TENSORS,
    KernelCall,
    Result,
    no_forward_derivatives,
    no_second_derivatives,
    run_forward,
    tensors_of,
)
from attnplug._run.operator import OperatorCall, is_watched, operator_of
from attnplug._types import SDPAParams


def is_transformed() -> bool:
    """Whether a transform of `torch.func`, or a level of forward-mode derivatives, is around this call."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor has no memory of its own, because a transform has wrapped it.

    `is_transformed` does not see one that has ended, nor `is_grads_batched` of `torch.autograd.grad`.
    """
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def run_transformed(entry: Entry, params: SDPAParams) -> Result:
    """Run the chosen kernel so that the transforms around this call see it; returns `out` and `lse`.

    Raises:
        GradientError: the kernel has no rule for one of them.
    """
    if entry.kernel.composite:
        return refusing_lse_gradient(entry, params, *_run_composite(entry, params)[:2])
    if _is_functionalized():  # by which no autograd.Function can be seen, but an operator is
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
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return interpreter is not None and interpreter.key() == torch._C._functorch.TransformType.Functionalize


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
        given = (*tensors, grad_out, grad_lse, out, lse, *saved)
        grads = _Backward.apply(call, wanted, *given)
        return (None, *grads, *(None for _ in TENSORS[len(DIFFERENTIABLE) :]))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise GradientError(no_forward_derivatives(ctx.call.entry))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: KernelCall, *tensors: Tensor | None) -> Any:
        _refuse_equal_draws(call, info.randomness)
        return _one_by_one(info.batch_size, in_dims[1:], tensors, lambda each: _Forward.apply(call, *each))


class _Backward(torch.autograd.Function):
    """The kernel's backward: one gradient, or None where none is wanted, for each of `DIFFERENTIABLE`."""

    apply: Any  # PyTorch's has no types

    @staticmethod
    def forward(call: KernelCall, wanted: tuple[bool, ...], *given: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, (grad_out, grad_lse, out, lse, *saved) = given[: len(TENSORS)], given[len(TENSORS) :]
        assert out is not None
        with torch.no_grad():
            return tuple(call.backward(tensors, wanted, grad_out, grad_lse, out, lse, tuple(saved)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.call = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise GradientError(no_second_derivatives(ctx.call.entry))

    jvp = backward

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: KernelCall, wanted: tuple[bool, ...], *given: Any) -> Any:
        return _one_by_one(info.batch_size, in_dims[2:], given, lambda each: _Backward.apply(call, wanted, *each))


def _one_by_one(size: int, dims: tuple[Any, ...], tensors: tuple[Any, ...], run: Any) -> tuple[Any, Any]:
    """Run on each element of the dimensions that `vmap` took away; return the results stacked, and where."""
    elements = (
        [
            tensor if dim is None else tensor.select(dim, position).contiguous()
            for tensor, dim in zip(tensors, dims, strict=True)
        ]
        for position in range(size)
    )
    results = list(zip(*map(run, elements), strict=True))
    stacked = tuple(None if column[0] is None else torch.stack(column) for column in results)
    return stacked, tuple(None if tensor is None else 0 for tensor in stacked)


def _refuse_equal_draws(call: KernelCall, randomness: str) -> None:
    """Raise where `vmap` asks for what dropout cannot give."""
    if call.constant("dropout") == 0 or randomness == "different":
        return
    asked = "called random operations" if randomness == "error" else "asked for the same randomness in each element"
    raise RuntimeError(
        f"vmap: implementation {call.entry.name!r} with dropout_p > 0 {asked}; it draws anew for each: "
        f"vmap(..., randomness='different')"
    )
