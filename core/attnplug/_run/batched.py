"""Opaque kernels under `vmap`, which gives them many tensors in one that has no memory: a loop.

There are two kinds: that of `torch.func`, which takes rules, and the one before it, behind `is_grads_batched` of
`torch.autograd.grad` and `vectorize` of `torch.autograd.functional`, which knows PyTorch's operators alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from attnplug._errors import GradientError
from attnplug._run.contract import TENSORS, BackwardInputs, Given, KernelCall, no_second_derivatives

_NO_ELEMENTS = "vmap: a kernel that is run once for each element cannot be run for a dimension of size 0"
_LEVELS = 64
"""How many the older `vmap` has."""


Transform: Any = torch._C._functorch.TransformType


def transforms_around() -> list[Any]:
    """Return the kinds of the transforms of `torch.func` around this call, the innermost last."""
    return [interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or ()]


def is_wrapped(tensor: Tensor | None) -> bool:
    """Whether a tensor has no memory of its own, because a transform has wrapped it.

    `is_transformed` does not see one that has ended, nor `is_grads_batched` of `torch.autograd.grad`.
    """
    functorch = torch._C._functorch
    return tensor is not None and (
        functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor)
    )


def backward_of_wrapped(call: KernelCall, given: BackwardInputs) -> list[Tensor | None]:
    """Do what `KernelCall.backward` does, where a transform may have wrapped tensors; it refuses second derivatives.

    Only gradients can be the older `vmap`'s, which a kernel's forward never runs under.
    """
    tensors, wanted, *others, saved = given
    grads = given.grad_out, given.grad_lse
    level = 0 if is_compiling() else max(map(_legacy_level, grads))  # Dynamo, which cannot ask, takes no such tensors
    if not level:
        return [*_Backward.apply(call, wanted, *tensors, *others, *saved)]
    length = max(0 if grad is None else _exposed(grad, level).shape[0] for grad in grads)
    columns = [[None] * length if grad is None else _exposed(grad, level, length).unbind() for grad in grads]
    found = [
        backward_of_wrapped(call, given._replace(grad_out=grad_out, grad_lse=grad_lse))
        for grad_out, grad_lse in zip(*columns, strict=True)
    ]
    return [
        None if column[0] is None else torch._add_batch_dim(torch.stack(column), 0, level)
        for column in zip(*found, strict=True)
    ]


def _legacy_level(tensor: Tensor | None) -> int:
    """Return the innermost level of the older `vmap` that a tensor has; 0 without any.

    How many are in use cannot be asked in every thread that runs backward.
    """
    level = 0
    while tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor):
        level += 1
        if level > _LEVELS:  # the one with no elements, which looks as if it were not there
            raise RuntimeError(_NO_ELEMENTS)
        exposed = _exposed(tensor, level)
        if exposed.shape[0]:
            tensor = exposed
    return level


def _exposed(tensor: Tensor, level: int, length: int = 0) -> Tensor:
    """Return a tensor with the elements of one level in its first dimension, `length` times the same if it has none."""
    return torch._remove_batch_dim(tensor, level, length, 0)


class _Backward(torch.autograd.Function):
    """The kernel's backward: one gradient, or None where none is wanted, for each of `DIFFERENTIABLE`."""

    apply: Any  # PyTorch's has no types

    @staticmethod
    def forward(call: KernelCall, wanted: tuple[bool, ...], *given: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            return tuple(call.backward(_inputs(wanted, given)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.call = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise GradientError(no_second_derivatives(ctx.call.entry))

    jvp = backward

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: KernelCall, wanted: tuple[bool, ...], *given: Any) -> Any:
        def run(each: Given) -> list[Tensor | None]:
            return backward_of_wrapped(call, _inputs(wanted, each))

        return one_by_one(info.batch_size, in_dims[2:], given, run)


def _inputs(wanted: tuple[bool, ...], given: tuple[Any, ...]) -> BackwardInputs:
    """Return what `KernelCall.backward` takes, from all its tensors one after the other."""
    tensors, (grad_out, grad_lse, out, lse, *saved) = given[: len(TENSORS)], given[len(TENSORS) :]
    return BackwardInputs(tensors, wanted, grad_out, grad_lse, out, lse, saved)


def one_by_one(size: int, dims: tuple[Any, ...], tensors: tuple[Any, ...], run: Any) -> tuple[Any, Any]:
    """Run on each element of the dimensions that `vmap` took away; return the results stacked, and where."""
    elements = (
        [
            tensor if dim is None else tensor.select(dim, position).contiguous()
            for tensor, dim in zip(tensors, dims, strict=True)
        ]
        for position in range(size)
    )
    if not size:  # there is nothing to run, and so nobody who says what comes out; PyTorch's own kernels refuse it, too
        raise RuntimeError(_NO_ELEMENTS)
    results = list(zip(*map(run, elements), strict=True))
    # What only some elements have `stack` refuses.
    stacked = tuple(None if all(item is None for item in column) else torch.stack(column) for column in results)
    return stacked, tuple(None if tensor is None else 0 for tensor in stacked)


def refuse_equal_draws(call: KernelCall, randomness: str) -> None:
    """Raise where `vmap` asks for what dropout cannot give."""
    if call.constant("dropout") == 0 or randomness == "different":
        return
    asked = "called random operations" if randomness == "error" else "asked for the same randomness in each element"
    raise RuntimeError(
        f"vmap: implementation {call.entry.name!r} with dropout_p > 0 {asked}; it draws anew for each: "
        f"vmap(..., randomness='different')"
    )
