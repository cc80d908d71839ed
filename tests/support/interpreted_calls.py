"""Calls of flash_triton in Triton's interpreter, and the contract's formula, which they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import attnplug
from accuracy import GRADIENT, assert_lse_right, assert_right
from attnplug import CausalVariant
from reference import attention as expected

LOWER_RIGHT = CausalVariant.LOWER_RIGHT
INF = float("inf")
QUERIES, KEYS = 20, 37  # two and three tiles of 16, each with a rest


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def coin(*shape: int, chance: float = 0.5) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape))) < chance


def inputs(
    batch: int = 1, heads: int = 2, kv_heads: int = 1, queries: int = QUERIES, keys: int = KEYS, size: int = 24
) -> list[Tensor]:
    return [
        random(batch, heads, queries, size),
        random(batch, kv_heads, keys, size, seed=1),
        random(batch, kv_heads, keys, size - 4, seed=2),
    ]


def formula(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The contract's formula in PyTorch's operators and the inputs' dtype, for gradients and for `low`."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    scale = arguments.get("scale", query.shape[-1] ** -0.5)
    logits = query @ key.mT * scale
    if softcap := arguments.get("softcap", 0.0):
        logits = softcap * torch.tanh(logits / softcap)
    queries, keys = logits.shape[-2:]
    used = arguments.get("seqused_k")
    used = torch.full((len(query),), keys) if used is None else used.long()
    used = used.view(-1, 1, 1, 1)
    lower_right = arguments.get("causal_variant") == LOWER_RIGHT
    position, j = torch.arange(queries)[:, None] + (used - queries if lower_right else 0), torch.arange(keys)
    if (slopes := arguments.get("alibi_slopes")) is not None:
        logits = logits - slopes.to(logits.dtype).reshape(-1, query.shape[1], 1, 1) * (position - j).abs()
    seen = (j < used).expand(logits.shape)
    if (mask := arguments.get("attn_mask")) is not None:
        if mask.dtype == torch.bool:
            seen = seen & mask
        else:
            logits = logits + mask
    left, right = arguments.get("window_size", (-1, -1))
    if arguments.get("is_causal"):
        seen = seen & (j <= position)
    if left >= 0:
        seen = seen & (j >= position - left)
    if right >= 0:
        seen = seen & (j <= position + right)
    sinks = arguments.get("sinks")
    sinks = torch.full(query.shape[1:2], -INF, dtype=logits.dtype) if sinks is None else sinks
    sinks = sinks[:, None, None].expand(*logits.shape[:-1], 1)
    everything = torch.cat([logits.masked_fill(~seen, -INF), sinks.to(logits.dtype)], -1)
    top = everything.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -INF, 0)
    weights = torch.exp(everything - top)
    total = weights.sum(-1, keepdim=True)
    nothing = total == 0
    out = (weights / total.masked_fill(nothing, 1))[..., :-1] @ value
    lse = (torch.log(total.masked_fill(nothing, 1)) + top).masked_fill(nothing, -INF)
    return out, lse[..., 0]


def differentiated(
    call: Callable[..., Any], dtype: torch.dtype, tensors: list[Tensor], arguments: dict[str, Any]
) -> Any:
    """Return (out, lse, gradients by name) of `call` on copies of the arguments in `dtype`."""
    named = dict(zip(("query", "key", "value"), tensors, strict=True)) | arguments
    leaves = {
        name: tensor.to(dtype).detach().requires_grad_()
        for name, tensor in named.items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and name != "alibi_slopes"
    }
    out, lse = call(**(named | leaves))
    weights, lse_weights = random(*out.shape, seed=3).half(), random(*lse.shape, seed=4).float()
    loss = (out.double() * weights).sum() + (lse.double() * lse_weights).masked_fill(lse == -INF, 0).sum()
    loss.backward()
    return out, lse, {name: leaf.grad for name, leaf in leaves.items()}


def assert_call_right(tensors: list[Tensor], dtype: torch.dtype = torch.float32, **arguments: Any) -> None:
    def call(**named: Any) -> Any:
        return attnplug.scaled_dot_product_attention(**named, enable_gqa=True, return_lse=True, impl="flash_triton")

    rounded = [tensor.to(dtype).double() for tensor in tensors]
    for name, argument in arguments.items():
        if isinstance(argument, Tensor) and argument.dtype == torch.float64:
            arguments[name] = argument.to(dtype).double()
    out, lse, grads = differentiated(call, dtype, rounded, arguments)
    ref_out, _, ref_grads = differentiated(formula, torch.float64, rounded, arguments)
    low_out, _, low_grads = differentiated(formula, dtype, rounded, arguments)
    by_numpy, lse_by_numpy = expected(*rounded, **arguments, enable_gqa=True)
    assert_right(out.detach(), by_numpy, low_out.detach())
    assert_lse_right(lse.detach(), lse_by_numpy, dtype)
    np.testing.assert_allclose(ref_out.detach(), by_numpy, atol=1e-9)
    for name, grad in grads.items():
        assert_right(grad, ref_grads[name], low_grads[name], GRADIENT)
