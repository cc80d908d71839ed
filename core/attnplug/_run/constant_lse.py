"""An lse that has no gradient, which says so to whoever asks for one.

A kernel need not give the gradient of its lse. PyTorch would take what has none for a constant, in silence.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnplug._errors import GradientError
from attnplug._registry.registry import Entry
from attnplug._run.batched import Transform, transforms_around
from attnplug._run.contract import declares, no_lse_gradient
from attnplug._run.library import library
from attnplug._tracing import constant_in_traces
from attnplug._types import Feature, SDPAParams


@cache
def constant_lse() -> Any:
    """Return the operator `(lse, inputs, message) -> lse` whose result has no gradient, and asking for one raises.

    What it is sent is looked at when it runs: a graph sends zeros through all that it returns and nobody uses.
    """
    name, ours = "_constant_lse", library()
    ours.define(f"{name}(Tensor lse, Tensor[] inputs, str message) -> Tensor")
    ours.impl(name, lambda lse, inputs, message: lse.clone(), "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnplug::{name}", lambda lse, inputs, message: torch.empty_like(lse), lib=ours)
    ours.define(f"{name}_backward(Tensor grad, str message) -> ()")
    ours.impl(f"{name}_backward", _refuse, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnplug::{name}_backward", lambda grad, message: None, lib=ours)
    refuse = getattr(torch.ops.attnplug, f"{name}_backward").default
    torch.fx.node.has_side_effect(refuse)  # or a graph would drop it, as it returns nothing

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.inputs, ctx.message = len(inputs[1]), inputs[2]

    def differentiate(ctx: Any, grad: Tensor) -> Any:
        refuse(grad, ctx.message)
        return None, [None] * ctx.inputs, None

    def each(info: Any, in_dims: tuple[Any, ...], lse: Tensor, inputs: list[Tensor], message: str) -> Any:
        return constant_lse()(lse, inputs, message), in_dims[0]

    torch.library.register_autograd(f"attnplug::{name}", differentiate, setup_context=remember, lib=ours)
    torch.library.register_vmap(f"attnplug::{name}", each, lib=ours)
    return getattr(torch.ops.attnplug, name).default


def _refuse(grad: Tensor, message: str) -> None:
    """Raise unless `grad` is zero.

    The host waits for that. Where it may not, because CUDA captures a graph, the device looks, and a failure there ends
    the process's CUDA context.
    """
    is_zero = (grad == 0).all()
    if grad.is_cuda and torch.cuda.is_current_stream_capturing():
        torch._assert_async(is_zero, message)
    elif not is_zero:
        raise GradientError(message)


def refusal(entry: Entry) -> str:
    """Return the message for whoever asks for a gradient through lse; nothing where the kernel gives one."""
    return "" if declares(entry, Feature.LSE_GRADIENT) else no_lse_gradient(entry)


def without_gradient(constant: Any, message: str, params: SDPAParams, lse: Tensor) -> Tensor:
    """Return an lse that nobody can ask for a gradient unnoticed, if there is a `message` for them."""
    if not message or not torch.is_grad_enabled():
        return lse
    given = params.query, params.key, params.value, params.attn_mask, params.sinks
    hidden = _hides_gradients()
    inputs = [tensor for tensor in given if tensor is not None and (hidden or tensor.requires_grad)]
    return constant(lse, inputs, message) if inputs else lse


@constant_in_traces
def _hides_gradients() -> bool:
    """Whether what is around this call wraps tensors, and does not tell of these that someone else wants gradients.

    Those that differentiate themselves do tell, and take no operator that has a gradient of its own.
    """
    kinds = {*transforms_around()}
    return bool(kinds) and kinds <= {Transform.Vmap, Transform.Functionalize} and forward_ad._current_level < 0
