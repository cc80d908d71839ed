"""Kernels under `torch.func` (grad, vmap and what is made of them) and under forward-mode derivatives.

A kernel made of PyTorch operators is run as it stands, and they transform it. For an opaque one the
transforms need rules: `vmap` runs it once for each element, since a kernel has no dimension to spare, and
what has no rule (forward-mode and second derivatives) raises, rather than giving a zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnplug._errors import GradientError
from attnplug._registry.registry import Entry
from attnplug._run.autograd import (
    CONSTANTS,
    DIFFERENTIABLE,
    TENSORS,
    checked_gradients,
    no_lse_gradient,
    refusing_lse_gradient,
    run_forward,
)
from attnplug._types import Feature, SDPAParams


def is_transformed() -> bool:
    """Whether a transform of `torch.func`, or a level of forward-mode derivatives, is around this call."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def run_transformed(entry: Entry, params: SDPAParams) -> tuple[Tensor, Tensor | None]:
    """Run the chosen kernel so that the transforms around this call see it; returns `out` and `lse`.

    Raises:
        GradientError: the kernel has no rule for one of them.
    """
    if entry.kernel.composite:
        return refusing_lse_gradient(entry, params, *run_forward(entry, params)[:2])
    call = _Call(entry, tuple((name, getattr(params, name)) for name in CONSTANTS))
    returned = _Forward.apply(call, *(getattr(params, name) for name in TENSORS))  # type: ignore[no-untyped-call]
    return returned[0], returned[1]


@dataclass(frozen=True)
class _Call:
    """What a call is besides its tensors; the transforms take it for one value, and leave it alone."""

    entry: Entry
    constants: tuple[tuple[str, Any], ...]

    def params(self, tensors: Any) -> SDPAParams:
        return SDPAParams(**dict(zip(TENSORS, tensors, strict=True)), **dict(self.constants))

    def refuse_equal_draws(self, randomness: str) -> None:
        """Raise where `vmap` asks for what dropout cannot give."""
        if dict(self.constants)["dropout"] == 0 or randomness == "different":
            return
        asked = "called random operations" if randomness == "error" else "asked for the same randomness in each element"
        raise RuntimeError(
            f"vmap: implementation {self.entry.name!r} with dropout_p > 0 {asked}; it draws anew for each: "
            f"vmap(..., randomness='different')"
        )


class _Forward(torch.autograd.Function):
    """The kernel's forward."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor | None) -> tuple[Any, ...]:
        return tuple(run_forward(call.entry, call.params(tensors)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *grad_saved: Tensor | None) -> Any:
        call: _Call = ctx.call
        count = len(TENSORS)
        tensors, (out, lse, *saved) = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if grad_lse is not None and Feature.LSE_GRADIENT not in call.entry.spec.capabilities.features:
            raise GradientError(no_lse_gradient(call.entry))
        if call.entry.kernel.backward is None:
            raise GradientError(f"implementation {call.entry.name!r} has no backward")
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        wanted = tuple(ctx.needs_input_grad[1 : 1 + len(DIFFERENTIABLE)])
        given = (*tensors, grad_out, grad_lse, out, lse, *saved)
        grads = _Backward.apply(call, wanted, *given)  # type: ignore[no-untyped-call]
        return (None, *grads, *(None for _ in TENSORS[len(DIFFERENTIABLE) :]))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise GradientError(
            f"implementation {ctx.call.entry.name!r} has no forward-mode derivatives; use one of the MATH family, "
            f"for example inside sdpa_kernel(SDPBackend.MATH)"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *tensors: Tensor | None) -> Any:
        call.refuse_equal_draws(info.randomness)
        return _one_by_one(info.batch_size, in_dims[1:], tensors, lambda each: _Forward.apply(call, *each))  # type: ignore[no-untyped-call]


class _Backward(torch.autograd.Function):
    """The kernel's backward: one gradient, or None where none is wanted, for each of `DIFFERENTIABLE`."""

    @staticmethod
    def forward(call: _Call, wanted: tuple[bool, ...], *given: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(TENSORS)
        detached = [tensor if tensor is None else tensor.detach() for tensor in given[:count]]
        for tensor, want in zip(detached, wanted, strict=False):
            if tensor is not None and want:
                tensor.requires_grad_()
        params = call.params(detached)
        backward = call.entry.kernel.backward
        assert backward is not None
        with torch.no_grad():
            return tuple(checked_gradients(call.entry.name, params, backward(params, *given[count:])))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.call = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise GradientError(
            f"implementation {ctx.call.entry.name!r} has no second derivatives; use one of the MATH family for them, "
            f"for example inside sdpa_kernel(SDPBackend.MATH)"
        )

    jvp = backward

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, wanted: tuple[bool, ...], *given: Any) -> Any:
        return _one_by_one(info.batch_size, in_dims[2:], given, lambda each: _Backward.apply(call, wanted, *each))  # type: ignore[no-untyped-call]


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
