"""All-to-all over heads: each rank changes its part of the sequence for some of the heads of all of it, and back.

DeepSpeed-Ulysses: Jacobs et al., 2023. In between, attention is that of one rank, so any implementation runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling

from attnplug.parallel._exchange import blamed_by_all
from attnplug.parallel._ranges import parts_of, total


class Heads:
    """The heads of a call shared by the ranks of a group, among which a sequence is cut into contiguous parts."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def reasons(self, heads: int, kv_heads: int) -> str:
        """Return why the ranks cannot share these heads, and what would do; empty if they can."""
        if heads % self.ranks == 0 and kv_heads % self.ranks == 0:
            return ""
        fitting = [n for n in range(2, math.gcd(heads, kv_heads) + 1) if heads % n == kv_heads % n == 0]
        ways = f"{' or '.join(map(str, fitting))} ranks would do, or " if fitting else "use "
        return (
            f"{self.ranks} ranks cannot share {heads} query heads and {kv_heads} key/value heads evenly; {ways}"
            f"ring_attention, which leaves heads together"
        )

    def shares(self, here: int, whole: int | None, name: str) -> list[int]:
        """Return how many positions each rank has.

        Raises:
            ValueError: this rank has another number than its share.
        """
        whole = here * self.ranks if whole is None else whole
        found = [total(parts_of(rank, self.ranks, whole, folded=False)) for rank in range(self.ranks)]
        if found[self.rank] != here:
            raise ValueError(
                f"{name}: rank {self.rank} of {self.ranks} has {here} positions, and its share of {whole} is "
                f"{found[self.rank]}; cut with shard_sequence(..., is_causal=False), and pass length= if it was not "
                f"cut evenly"
            )
        return found

    def own(self, tensor: Tensor, dim: int) -> Tensor:
        """Return what this rank has of a dimension of heads."""
        if tensor.shape[dim] == 1:
            return tensor
        each = tensor.shape[dim] // self.ranks
        return tensor.narrow(dim, self.rank * each, each)

    def gather(self, tensors: Sequence[Tensor], shares: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return tensors `(B, H, part, E)` as `(B, H / ranks, S, E)`, in one message to each rank."""
        ranks, shapes = self.ranks, []
        packed = []
        for tensor in tensors:
            batch, heads, rows, size = tensor.shape
            shapes.append((batch, heads // ranks, size))
            chunks = tensor.reshape(batch, ranks, heads // ranks, rows, size).transpose(0, 1)
            packed.append(chunks.reshape(ranks, -1))
        sent = torch.cat(packed, 1)
        counts = [
            [batch * heads * share[rank] * size for (batch, heads, size), share in zip(shapes, shares, strict=True)]
            for rank in range(ranks)
        ]
        received = self._exchange(sent.reshape(-1), [sum(each) for each in counts], [sent.shape[1]] * ranks)
        pieces = received.split([count for each in counts for count in each])
        results = []
        for number, (batch, heads, size) in enumerate(shapes):
            of_tensor = [
                pieces[rank * len(shapes) + number].view(batch, heads, shares[number][rank], size)
                for rank in range(ranks)
            ]
            results.append(torch.cat(of_tensor, 2))
        return results

    def scatter(self, tensor: Tensor, shares: Sequence[int]) -> Tensor:
        """Return `(B, H / ranks, S, E)` as `(B, H, part, E)`: the inverse of `gather`."""
        batch, heads, _, size = tensor.shape
        parts = [part.reshape(-1) for part in tensor.split(list(shares), 2)]
        here = shares[self.rank]
        each = batch * heads * here * size
        received = self._exchange(torch.cat(parts), [each] * self.ranks, [part.numel() for part in parts])
        chunks = received.view(self.ranks, batch, heads, here, size)
        return chunks.transpose(0, 1).reshape(batch, self.ranks * heads, here, size)

    def _exchange(self, sent: Tensor, received: list[int], counts: list[int]) -> Tensor:
        if is_compiling():
            from torch.distributed._functional_collectives import all_to_all_single_autograd

            return all_to_all_single_autograd(sent, received, counts, self.group)
        return _AllToAll.apply(sent, received, counts, self.group)


class _AllToAll(torch.autograd.Function):
    """Flat pieces sent to each rank, and one received from each; gradients go the way back."""

    apply: Any  # PyTorch's has no types

    @staticmethod
    def forward(ctx: Any, sent: Tensor, received: list[int], counts: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.received, ctx.counts, ctx.group = received, counts, group
        result = sent.new_empty(sum(received))
        started = time.monotonic()
        try:
            dist.all_to_all_single(result, sent.contiguous(), received, counts, group=group)
        except RuntimeError as error:
            raise blamed_by_all(group, time.monotonic() - started, error) from error
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grad, ctx.counts, ctx.received, ctx.group), None, None, None
