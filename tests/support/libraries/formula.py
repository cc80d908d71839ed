"""Attention as a library computes it, for stand-ins: one head after the other, in float64, with its traps.

Tensors are `(B, S, H, E)`. What a kernel is not given to see it never sees: memory that it does not write is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INF, NAN = math.inf, math.nan


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A call of one sequence, besides its tensors; windows of -1 are open."""

    scale: float
    causal: bool = False
    left: int = -1
    right: int = -1
    lower_right: bool = True
    softcap: float = 0.0
    slopes: Tensor | None = None  # (H,)
    sinks: Tensor | None = None  # (H,)
    bias: Tensor | None = None  # (H, Sq, Sk)
    keep: Tensor | None = None  # (H, Sq, Sk), what dropout multiplies with

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        """Return `(H, Sq, Sk)`, hidden keys at minus infinity; keys are hidden before logits are scaled."""
        assert self.scale > 0, "minus infinity times 0 or a negative number hides nothing"
        heads, (queries, keys) = query.shape[1], (query.shape[0], key.shape[0])
        group = heads // key.shape[1]
        raw = query.double().transpose(0, 1) @ key.double().transpose(0, 1).repeat_interleave(group, 0).mT
        logits = raw * self.scale
        if self.softcap > 0:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        offset = keys - queries if self.lower_right else 0
        distance = torch.arange(keys) - torch.arange(queries)[:, None] - offset
        if self.slopes is not None:
            logits = logits - self.slopes.double().view(-1, 1, 1) * distance.abs()
        if self.bias is not None:
            logits = logits + self.bias.double()
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if self.causal:
            hidden |= distance > 0
        if self.left >= 0:
            hidden |= distance < -self.left
        if self.right >= 0:
            hidden |= distance > self.right
        return logits.masked_fill(hidden, -INF)


def forward(query: Tensor, key: Tensor, value: Tensor, mask: Mask, blind: float) -> tuple[Tensor, Tensor]:
    """Return out `(Sq, H, Ev)` and lse `(H, Sq)` of one sequence, `blind` in rows that see no key."""
    if key.shape[0] == 0:
        lse = torch.full((query.shape[1], query.shape[0]), blind, dtype=torch.float64)
        return torch.zeros(*query.shape[:2], value.shape[2], dtype=torch.float64), lse
    logits = mask.logits(query, key)
    weights, lse = _softmax(logits, mask)
    if mask.keep is not None:
        weights = weights * mask.keep
    group = query.shape[1] // key.shape[1]
    out = weights @ value.double().transpose(0, 1).repeat_interleave(group, 0)
    return out.transpose(0, 1), lse.masked_fill(lse == -INF, blind)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of one sequence from the lse that is given: what that is decides what comes out."""
    if key.shape[0] == 0 or query.shape[0] == 0:
        return tuple(torch.zeros_like(tensor, dtype=torch.float64) for tensor in (query, key, value))
    with torch.enable_grad():
        leaves = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
        logits = mask.logits(leaves[0], leaves[1])
    group, kv_heads = query.shape[1] // key.shape[1], key.shape[1]
    weights = torch.exp(logits.detach() - lse.double().unsqueeze(-1))
    keep = 1.0 if mask.keep is None else mask.keep
    grad, values = grad_out.double().transpose(0, 1), value.double().transpose(0, 1).repeat_interleave(group, 0)
    delta = (grad * out.double().transpose(0, 1)).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.double().unsqueeze(-1)
    grad_logits = weights * (grad @ values.mT * keep - delta)
    grad_query, grad_key = torch.autograd.grad(logits, leaves[:2], grad_logits)
    grad_value = ((weights * keep).mT @ grad).unflatten(0, (kv_heads, group)).sum(1).transpose(0, 1)
    return grad_query, grad_key, grad_value


_order = torch.Generator()


def added_up(gradient: Tensor, deterministic: bool) -> Tensor:
    """Return a gradient whose parts are added as they come, unless their order was asked for: the last bits differ."""
    if deterministic:
        return gradient
    return gradient * (1 + 1e-4 * torch.rand(gradient.shape, generator=_order, dtype=torch.float64))


def _softmax(logits: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    whole = logits
    if mask.sinks is not None:
        column = mask.sinks.double().view(-1, 1, 1).expand(*logits.shape[:2], 1)
        whole = torch.cat([logits, column], -1)
    lse = torch.logsumexp(whole, -1)
    return torch.exp(logits - lse.masked_fill(lse == -INF, 0).unsqueeze(-1)), lse


def keep(seed: Any, number: int, dropout: float, shape: tuple[int, ...]) -> Tensor | None:
    """Return what dropout multiplies the probabilities of sequence `number` with; it follows from the seed alone."""
    if dropout == 0:
        return None
    assert dropout < 1, "p_dropout < 1.f"
    generator = torch.Generator().manual_seed(int(seed[0]) + number)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) >= dropout) / (1 - dropout)


def check_memory(*tensors: Tensor) -> None:
    """What kernels take for granted: 16 bytes at a time, dimensions contiguous at the end."""
    for tensor in tensors:
        every = 16 // tensor.dtype.itemsize
        assert tensor.stride(-1) == 1, "Input tensor must have contiguous last dimension"
        assert tensor.storage_offset() % every == 0, "misaligned address"
        strides = zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True)
        assert all(stride % every == 0 for stride, size in strides if size > 1), "misaligned address"
        assert tensor.shape[-1] % every == 0, "head_size must be a multiple of 16 bytes"


def pages(tensor: Tensor, table: Tensor, used: int) -> Tensor:
    """Return `(used, H, E)`, the keys or values of one sequence, from `(pages, page_size, H, E)`."""
    needed = table[: -(-used // tensor.shape[1])].long()
    return tensor[needed].flatten(0, 1)[:used]
