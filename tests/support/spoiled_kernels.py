"""A kernel that is right, and kernels that are wrong here and there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import attnplug
from attnplug import Capabilities, Feature, ImplSpec, SDPAParams


class Formula:
    """Attention with a backward of its own; subclasses spoil it."""

    features = frozenset({Feature.CAUSAL, Feature.BOOLEAN_MASK, Feature.LSE, Feature.LSE_GRADIENT})

    @staticmethod
    def probabilities(params: SDPAParams) -> tuple[Tensor, Tensor]:
        logits = params.scale * params.query @ params.key.mT
        if params.attn_mask is not None:
            logits = logits.masked_fill(~params.attn_mask, -torch.inf)
        if params.is_causal:
            logits = logits.masked_fill(torch.ones_like(logits).tril() == 0, -torch.inf)
        return torch.softmax(logits, -1), torch.logsumexp(logits, -1)

    @classmethod
    def forward(cls, params: SDPAParams) -> tuple[Any, ...]:
        weights, lse = cls.probabilities(params)
        return weights @ params.value, lse

    @classmethod
    def backward(
        cls, params: SDPAParams, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...]:
        weights, _ = cls.probabilities(params)
        grad_weights = grad_out @ params.value.mT - (grad_out * out).sum(-1, keepdim=True)
        if grad_lse is not None:
            grad_weights = grad_weights + grad_lse[..., None]
        grad_logits = params.scale * weights * grad_weights
        return grad_logits @ params.key, grad_logits.mT @ params.query, weights.mT @ grad_out


class WrongOut(Formula):
    """Wrong only where the number of queries is 1 above a multiple of 8."""

    @classmethod
    def forward(cls, params: SDPAParams) -> tuple[Any, ...]:
        out, lse = super().forward(params)
        return (out * 1.001 if params.query.shape[2] % 8 == 1 else out), lse


class Zeros(Formula):
    """Wrong, whatever is asked for: it takes every call."""

    features = frozenset(Feature)

    @classmethod
    def forward(cls, params: SDPAParams) -> tuple[Any, ...]:
        return params.query.new_zeros(*params.query.shape[:-1], params.value.shape[-1]), params.query.new_zeros(
            params.lse_shape, dtype=params.lse_dtype
        )


class WrongLse(Formula):
    @classmethod
    def forward(cls, params: SDPAParams) -> tuple[Any, ...]:
        out, lse = super().forward(params)
        return out, lse + 0.01


class WrongGradient(Formula):
    """The gradient of key alone is wrong, and only with more than 16 keys."""

    @classmethod
    def backward(cls, params: SDPAParams, *given: Any) -> tuple[Tensor, ...]:
        query, key, value = super().backward(params, *given)
        return query, key * 1.01 if params.key.shape[2] > 16 else key, value


def register(kernel: type[Formula]) -> str:
    """Register a kernel; returns its name."""
    name = kernel.__name__.lower()
    capabilities = Capabilities(features=kernel.features)
    attnplug.register_impl(ImplSpec(name=name, kernel=kernel, backend=None, capabilities=capabilities))
    return name


def tensors(queries: int = 5, keys: int | None = None, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value `(1, 2, length, 8)`."""
    keys = keys or queries
    query, key, value = (torch.randn(1, 2, length, 8, **more) for length in (queries, keys, keys))
    return query, key, value
