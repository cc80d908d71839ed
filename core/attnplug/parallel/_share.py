"""What one rank has of a call, and the calls of its blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attnplug._types import CausalVariant, SDPAParams
from attnplug.parallel._plan import Layout, kinds
from attnplug.parallel._ranges import Block, Range, size, total


@dataclass(frozen=True)
class Share:
    """One rank's share of a call, and where it lies in the whole."""

    group: dist.ProcessGroup
    params: SDPAParams
    layout: Layout
    rank: int

    @classmethod
    def of(cls, group: dist.ProcessGroup, params: SDPAParams) -> Share:
        """Return the share of this rank; `max_k` of a dense call is the length of the whole, None if cut evenly.

        Raises:
            ValueError: a rank has another number of rows than its share, or the mask has no meaning.
        """
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        dim = _split_dim(params)
        have = {"query": params.query.shape[dim], "key": params.key.shape[dim]}
        whole = {name: size * ranks for name, size in have.items()}
        starts: tuple[int, ...] = ()
        if params.is_varlen:
            starts = tuple(params.cu_seq_q.tolist())
            whole = dict.fromkeys(whole, starts[-1])
        elif params.max_k is not None:
            whole["key"] = params.max_k
            if have["query"] == have["key"]:
                whole["query"] = params.max_k
        if (params.is_causal or max(params.window_size) >= 0) and have["query"] != have["key"]:
            raise ValueError(
                f"query: a causal call, or one with a window, needs as many queries as keys on each rank; got "
                f"{have['query']} and {have['key']}"
            )
        layout = Layout(ranks, whole["query"], whole["key"], params.is_causal, params.window_size, starts)
        call = cls(group, params, layout, rank)
        call._check(have)
        return call

    def _check(self, have: dict[str, int]) -> None:
        layout, parts = self.layout, self.layout.ranks * (2 if self.layout.is_causal else 1)
        for name, of_keys in (("query", False), ("key", True)):
            share, whole = total(layout.ranges(self.rank, of_keys)), layout.keys if of_keys else layout.queries
            if have[name] != share:
                raise ValueError(
                    f"{name}: rank {self.rank} of {layout.ranks} has {have[name]} positions, and its share of {whole} "
                    f"is {share}; cut with shard_sequence"
                    + ("" if self.params.is_varlen else ", and pass length= if it was not cut evenly")
                )
            if whole < parts:
                raise ValueError(f"{name}: {whole} positions cannot be cut into {parts} parts; use fewer ranks")

    @property
    def is_varlen(self) -> bool:
        return self.params.is_varlen

    @property
    def dim(self) -> int:
        """The dimension of the call's tensors that is split."""
        return _split_dim(self.params)

    def rows(self, tensor: Tensor, part: Range) -> Tensor:
        """Return rows of what is laid out as the call's tensors are."""
        if size(part) == tensor.shape[self.dim]:
            return tensor
        return tensor.narrow(self.dim, part[0], size(part))

    def examples(self, grad: bool) -> list[SDPAParams]:
        """Return one call of each kind of block that any rank makes, for who decides."""
        query, key, value = (
            tensor.detach().requires_grad_(grad) for tensor in (self.params.query, self.params.key, self.params.value)
        )
        with torch.enable_grad():
            return [self._example(query, key, value, block) for block in kinds(self.layout)]

    def _example(self, query: Tensor, key: Tensor, value: Tensor, block: Block) -> SDPAParams:
        queries, keys = size(block.queries), size(block.keys)
        same = replace(block, queries=(0, queries), keys=(0, keys), lengths=(queries,) if block.lengths else ())
        used = None if self.params.seqused_k is None else self.params.seqused_k.clamp(max=keys)
        query = self._of_length(query, queries)
        return self.block(same, query, self._of_length(key, keys), self._of_length(value, keys), used)

    def _of_length(self, tensor: Tensor, length: int) -> Tensor:
        """Return so many rows; where another rank has more than this one, of no particular values."""
        if length <= tensor.shape[self.dim]:
            return self.rows(tensor, (0, length))
        shape = (*tensor.shape[: self.dim], length, *tensor.shape[self.dim + 1 :])
        return tensor.new_empty(shape).requires_grad_(tensor.requires_grad)

    def block(self, block: Block, query: Tensor, key: Tensor, value: Tensor, used: Tensor | None = None) -> SDPAParams:
        """Return the call of one block, whose tensors are given."""
        more: dict[str, Any] = {"max_q": None, "max_k": None}
        if self.is_varlen:
            of_queries = of_keys = tuple(accumulate(block.lengths, initial=0))
            if not block.lengths:
                of_queries, of_keys = (0, query.shape[0]), (0, key.shape[0])
            more["cu_seq_q"] = _on_device(of_queries, query.device)
            more["cu_seq_k"] = _on_device(of_keys, query.device)
            more["max_q"] = max(block.lengths) if block.lengths else query.shape[0]
            more["max_k"] = max(block.lengths) if block.lengths else key.shape[0]
        if used is not None:
            more["seqused_k"] = used
        return replace(
            self.params,
            query=query,
            key=key,
            value=value,
            is_causal=block.is_causal,
            window_size=block.window,
            causal_variant=CausalVariant.LOWER_RIGHT if self.is_varlen else CausalVariant.UPPER_LEFT,
            sinks=None,
            return_lse=True,
            **more,
        )


def _split_dim(params: SDPAParams) -> int:
    return 0 if params.is_varlen else 2


def _on_device(starts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where sequences start.

    A CUDA graph may outlive what is kept here, and its own memory may not be kept: while one is captured, numbers are
    written one by one, because nothing can be copied from the host.
    """
    if not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
        return _kept(starts, device)
    made = torch.empty(len(starts), dtype=torch.int32, device=device)
    for at, start in enumerate(starts):
        made[at].fill_(start)  # where `made[at] = start` copies it from the host
    return made


@lru_cache(maxsize=256)
def _kept(starts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the same, kept for the other layers and for backward, because a GPU is waited for."""
    with torch.inference_mode(False):
        return torch.tensor(starts, dtype=torch.int32, device=device)
