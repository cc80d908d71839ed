"""From an author's forward and backward to autograd: the same wrapper, and the same checks, for every kernel."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from attnplug._call.autocast import no_autocast
from attnplug._errors import GradientError, KernelError
from attnplug._registry.registry import BUILTIN, Entry
from attnplug._types import Feature, SDPAParams

TENSORS = (
    "query",
    "key",
    "value",
    "attn_mask",
    "sinks",
    "alibi_slopes",
    "seqused_k",
    "cu_seq_q",
    "cu_seq_k",
    "block_table",
)
DIFFERENTIABLE = TENSORS[:5]
CONSTANTS = tuple(item.name for item in fields(SDPAParams) if item.name not in TENSORS)


def run(entry: Entry, params: SDPAParams, grad: bool) -> tuple[Tensor, Tensor | None]:
    """Run the chosen kernel and return `out` and `lse`, differentiable where `grad` is true.

    Raises:
        KernelError: the kernel returned something else than it must.
    """
    kernel = entry.kernel
    if not grad:
        return run_forward(entry, params)[:2]  # type: ignore[return-value]
    if kernel.backward is not None:
        inputs = [getattr(params, name) for name in DIFFERENTIABLE]
        return _Attention.apply(entry, params, *inputs)  # type: ignore[no-any-return, no-untyped-call]
    return refusing_lse_gradient(entry, params, *run_forward(entry, params)[:2])


def refusing_lse_gradient(
    entry: Entry, params: SDPAParams, out: Tensor, lse: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return `out`, and `lse` such that asking for its gradient raises unless the kernel declares one."""
    if lse is not None and params.return_lse and not _declares(entry, Feature.LSE_GRADIENT):
        lse = _Refuse.apply(no_lse_gradient(entry), 1, lse.detach(), *_inputs(params))  # type: ignore[no-untyped-call]
    return out, lse


def run_forward(entry: Entry, params: SDPAParams) -> tuple[Any, ...]:
    """Run the kernel's forward and check what it returns; the built-in kernels are taken at their word."""
    returned = entry.kernel.forward(params)
    if entry.distribution != BUILTIN:
        check_outputs(entry.name, params, returned)
    return returned  # type: ignore[no-any-return]


def check_outputs(name: str, params: SDPAParams, returned: Any) -> None:
    """Raise KernelError unless `returned` is `(out, lse, *saved)` as a forward must return it."""
    if not isinstance(returned, tuple) or len(returned) < 2:
        got = type(returned).__name__ + (f" of {len(returned)}" if isinstance(returned, (tuple, list)) else "")
        raise KernelError(f"implementation {name!r}: forward must return a tuple (out, lse, *saved), got {got}")
    for item in returned[2:]:
        if item is not None and not isinstance(item, Tensor):
            raise KernelError(f"implementation {name!r}: forward must save tensors, got {type(item).__name__}")
    query, value = params.query, params.value
    out, lse = returned[0], returned[1]
    if query.is_nested:
        return
    check_output(name, "out", out, (*query.shape[:-1], value.shape[-1]), query.dtype, query.device)
    if lse is None and not params.return_lse:
        return
    check_output(name, "lse", lse, params.lse_shape, params.lse_dtype, query.device)


def check_output(
    name: str, what: str, tensor: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise KernelError unless `tensor` has the shape, dtype and device that the contract gives it."""
    if not isinstance(tensor, Tensor):
        raise KernelError(f"implementation {name!r}: {what} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise KernelError(f"implementation {name!r}: {what} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise KernelError(f"implementation {name!r}: {what} must have dtype {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise KernelError(f"implementation {name!r}: {what} must be on {device}, got {tensor.device}")


class _Attention(torch.autograd.Function):
    """A kernel's forward and backward. What ran forward runs backward, whatever is selected by then."""

    @staticmethod
    def forward(ctx: Any, entry: Entry, params: SDPAParams, *inputs: Tensor | None) -> tuple[Any, Any]:
        out, lse, *saved = run_forward(entry, params)
        ctx.entry = entry
        ctx.constants = {name: getattr(params, name) for name in CONSTANTS}
        ctx.save_for_backward(*(getattr(params, name) for name in TENSORS), out, lse, *saved)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        count = len(TENSORS)
        params = SDPAParams(**dict(zip(TENSORS, tensors[:count], strict=True)), **ctx.constants)
        out, lse, *saved = tensors[count:]
        entry: Entry = ctx.entry
        if grad_lse is not None and not _declares(entry, Feature.LSE_GRADIENT):
            raise GradientError(no_lse_gradient(entry))
        if grad_out is None:
            if grad_lse is None:
                return (None,) * (2 + len(DIFFERENTIABLE))
            grad_out = torch.zeros_like(out)
        twice = torch.is_grad_enabled() and not _declares(entry, Feature.SECOND_DERIVATIVES)
        backward = entry.kernel.backward
        assert backward is not None
        with no_autocast(params.query), torch.no_grad() if twice else nullcontext():
            returned = backward(params, grad_out, grad_lse, out, lse, *saved)
            grads = checked_gradients(entry.name, params, returned)
        if twice:
            grads = _refuse_second_derivatives(entry, grads, _inputs(params))
        return (None, None, *grads)


def checked_gradients(name: str, params: SDPAParams, returned: Any) -> list[Tensor | None]:
    """Return one gradient, or None where none is wanted, for each of `DIFFERENTIABLE`.

    Raises:
        KernelError: the kernel's backward returned something else than it must.
    """
    if not isinstance(returned, (tuple, list)) or not 3 <= len(returned) <= 5:
        raise KernelError(
            f"implementation {name!r}: backward must return (grad_query, grad_key, grad_value[, grad_attn_mask"
            f"[, grad_sinks]]), got {returned if returned is None else type(returned).__name__}"
        )
    grads: list[Tensor | None] = []
    for position, field in enumerate(DIFFERENTIABLE):
        tensor = getattr(params, field)
        grad = returned[position] if position < len(returned) else None
        if tensor is None or not tensor.requires_grad:
            grads.append(None)
            continue
        if grad is None:
            raise KernelError(f"implementation {name!r}: backward returned no gradient of {field}, which was asked for")
        if field == "attn_mask":
            grad = _summed(name, grad, tensor)
        check_output(name, f"the gradient of {field}", grad, tuple(tensor.shape), tensor.dtype, tensor.device)
        grads.append(grad)
    return grads


def _summed(name: str, grad: Any, mask: Tensor) -> Tensor:
    """Sum the gradient of a broadcast mask to the mask's shape."""
    try:
        return grad.sum_to_size(mask.shape).to(mask.dtype)  # type: ignore[no-any-return]
    except (AttributeError, RuntimeError):
        got = tuple(grad.shape) if isinstance(grad, Tensor) else type(grad).__name__
        raise KernelError(
            f"implementation {name!r}: the gradient of attn_mask must broadcast from {tuple(mask.shape)}, got {got}"
        ) from None


class _Refuse(torch.autograd.Function):
    """Pass `count` tensors through, and raise where someone asks for their gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, count: int, *tensors: Tensor) -> Any:
        passed = tuple(tensor.view_as(tensor) for tensor in tensors[:count])
        return passed[0] if count == 1 else passed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise GradientError(ctx.message)


def _refuse_second_derivatives(entry: Entry, grads: list[Tensor | None], inputs: list[Tensor]) -> list[Tensor | None]:
    message = (
        f"implementation {entry.name!r} has no second derivatives; use one of the MATH family for them, "
        f"for example inside sdpa_kernel(SDPBackend.MATH)"
    )
    present = [grad for grad in grads if grad is not None]
    passed = _Refuse.apply(message, len(present), *present, *inputs)  # type: ignore[no-untyped-call]
    wrapped = iter(passed if isinstance(passed, tuple) else (passed,))
    return [None if grad is None else next(wrapped) for grad in grads]


def _inputs(params: SDPAParams) -> list[Tensor]:
    """Return the tensors through which autograd reaches this call."""
    tensors = (getattr(params, name) for name in DIFFERENTIABLE)
    return [tensor for tensor in tensors if tensor is not None]


def no_lse_gradient(entry: Entry) -> str:
    """Return the message for whoever asks for a gradient through lse that there is none of."""
    return f"implementation {entry.name!r} gives no gradient through lse; detach lse, or use one that does"


def _declares(entry: Entry, feature: Feature) -> bool:
    return feature in entry.spec.capabilities.features
