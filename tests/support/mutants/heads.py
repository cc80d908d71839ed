"""Wrong heads: which key/value head a query head reads, and the sum of gradients over a group."""

from __future__ import annotations

import torch
from torch import Tensor

from mutants import wrong
from mutants.kernel import Kernel


@wrong("check_gqa", "check_varlen_gqa")
class HeadsModulo(Kernel):
    """Query head h reads key/value head h % Hkv."""

    def kv_heads(self, heads: int, kv_heads: int) -> Tensor:
        return torch.arange(heads) % kv_heads


@wrong("check_gqa")
class FirstKeyHead(Kernel):
    """Every query head reads the first key/value head: right for multi-query attention only."""

    def kv_heads(self, heads: int, kv_heads: int) -> Tensor:
        return super().kv_heads(heads, kv_heads) * (heads == kv_heads)


@wrong("check_gqa_gradients")
class GroupNotSummed(Kernel):
    """Each query head of a group overwrites the gradient of the one before."""

    def summed_over_group(self, gradient: Tensor, kv_heads: int) -> Tensor:
        return gradient.unflatten(0, (kv_heads, gradient.shape[0] // kv_heads))[:, -1]


@wrong("check_gqa_gradients")
class GroupAveraged(Kernel):
    """Takes the mean over a group instead of the sum."""

    def summed_over_group(self, gradient: Tensor, kv_heads: int) -> Tensor:
        return super().summed_over_group(gradient, kv_heads) * kv_heads / gradient.shape[0]
