"""Sequences cut into the parts that ranks hold, and joined again."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attnplug._arguments import as_int, expect
from attnplug._call.device import as_device
from attnplug.parallel._exchange import as_group, as_mesh
from attnplug.parallel._ranges import Range, parts_of, total


def shard_sequence(tensor: Tensor, *, group: Any, dim: int = -2, is_causal: bool = True) -> Tensor:
    """Cut a sequence that every rank has whole, and return this rank's part.

    With `is_causal`, rank `r` of `n` gets the parts `r` and `2 * n - 1 - r` of `2 * n`, one after the other, so that
    causal attention is as much work on each rank: what a causal `ring_attention` expects. Without, it gets part `r`
    of `n`: what every other call expects. Parts are those of `torch.tensor_split`: where the length does not divide,
    the first ones are longer by one, and the calls then need `length=`.

    Args:
        tensor: the whole sequence, the same on each rank.
        group: a process group, or a device mesh of one dimension; or of two, `(ring, heads)`, for `usp_attention`.
        dim: the dimension of the sequence; -2 for queries, keys and values, 1 for tokens `(B, S)`, 0 for packed ones.
        is_causal: whether the sequence is for causal attention.

    Returns:
        A contiguous tensor, differentiable.

    Raises:
        ValueError: the sequence is shorter than the number of parts, or has no dimension `dim`.
        TypeError: `group` is neither of the two, or another argument has a wrong type.
    """
    levels = _levels(group, is_causal)
    _check(tensor, dim)
    for ranks, folded in levels:
        ranges = _ranges(ranks, dist.get_rank(ranks), tensor.shape[dim], folded)
        tensor = torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in ranges], dim)
    return tensor.contiguous()


def unshard_sequence(
    tensor: Tensor, *, group: Any, dim: int = -2, is_causal: bool = True, length: int | None = None
) -> Tensor:
    """Return the whole sequence on every rank, from the part of each: the inverse of `shard_sequence`.

    Args:
        tensor: this rank's part.
        group: as when it was cut.
        dim: the dimension of the sequence.
        is_causal: as when it was cut.
        length: of the whole; needed where it does not divide. None is the part's times the number of ranks.

    Returns:
        The whole sequence. Its gradient is that of the sum over ranks, as every rank may use all of it.

    Raises:
        ValueError: the part does not have the length that `shard_sequence` would have given it.
    """
    levels = _levels(group, is_causal)
    _check(tensor, dim)
    if length is not None:
        length = as_int("length", length, "the number of positions of the whole sequence")
    else:
        length = tensor.shape[dim] * prod(dist.get_world_size(ranks) for ranks, _ in levels)
    lengths = [length]  # of what each level cuts
    for ranks, folded in levels[:-1]:
        lengths.append(total(_ranges(ranks, dist.get_rank(ranks), lengths[-1], folded)))
    for (ranks, folded), whole in zip(reversed(levels), reversed(lengths), strict=True):
        tensor = _joined(tensor, ranks, folded, dim, whole)
    return tensor


def sequence_positions(
    length: int, *, group: Any, is_causal: bool = True, device: torch.device | str | None = None
) -> Tensor:
    """Return the positions, int64 `(S,)`, that this rank holds of a sequence: what rotary embeddings need.

    Args:
        length: of the whole sequence.
        group: as when it was cut.
        is_causal: as when the sequence was cut.
        device: of the result.

    Raises:
        ValueError: the sequence is shorter than the number of parts.
    """
    length = as_int("length", length, "the number of positions of the whole sequence")
    if not 0 <= length < 2**63:
        raise ValueError(f"length: expected a number of positions, got {length}")
    positions = torch.arange(length, device=None if device is None else as_device("device", device))
    return shard_sequence(positions, group=group, dim=0, is_causal=is_causal)


def _check(tensor: Any, dim: Any) -> None:
    """Raise TypeError or ValueError unless this is a tensor that has such a dimension."""
    if expect("tensor", tensor, Tensor, "a torch.Tensor").is_nested:
        raise ValueError("tensor: expected a dense tensor, got a nested one")
    if not -tensor.dim() <= expect("dim", dim, int, "an int") < tensor.dim():
        raise ValueError(f"dim: a tensor of {tensor.dim()} dimensions has no dimension {dim}")


def _levels(group: Any, is_causal: bool) -> list[tuple[dist.ProcessGroup, bool]]:
    """Return the groups that a sequence is cut for, one after the other, and whether it is folded for each."""
    expect("is_causal", is_causal, bool, "a bool")
    if not isinstance(group, dist.ProcessGroup) and getattr(group, "ndim", 1) == 2:  # of a group, a trace asks nothing
        mesh = as_mesh(group)
        return [(mesh.get_group(0), is_causal), (mesh.get_group(1), False)]
    return [(as_group(group), is_causal)]


def _ranges(group: dist.ProcessGroup, rank: int, length: int, folded: bool) -> tuple[Range, ...]:
    ranks = dist.get_world_size(group)
    parts = ranks * (2 if folded else 1)
    if length < parts:
        raise ValueError(f"a sequence of {length} positions cannot be cut into {parts} parts for {ranks} ranks")
    return parts_of(rank, ranks, length, folded)


def _joined(tensor: Tensor, group: dist.ProcessGroup, folded: bool, dim: int, length: int) -> Tensor:
    """Return what the ranks of a group have parts of."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    shares = [_ranges(group, each, length, folded) for each in range(ranks)]
    if total(shares[rank]) != tensor.shape[dim]:
        raise ValueError(
            f"tensor: rank {rank} of {ranks} has {tensor.shape[dim]} positions, and its share of {length} is "
            f"{total(shares[rank])}; pass length= if the sequence was not cut evenly"
        )
    longest = max(map(total, shares))
    if tensor.shape[dim] < longest:  # collectives want equal sizes
        missing = list(tensor.shape)
        missing[dim] = longest - tensor.shape[dim]
        tensor = torch.cat([tensor, tensor.new_zeros(missing)], dim)
    gathered = _Gather.apply(tensor.contiguous(), group)
    pieces: dict[int, Tensor] = {}
    for each, ranges in enumerate(shares):
        row = 0
        for start, stop in ranges:
            pieces[start] = gathered[each].narrow(dim, row, stop - start)
            row += stop - start
    return torch.cat([pieces[start] for start in sorted(pieces)], dim)


class _Gather(torch.autograd.Function):
    """What every rank has, stacked; the gradients of all ranks are summed."""

    apply: Any  # PyTorch's has no types

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
        dist.all_gather(list(gathered.unbind()), tensor, group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        dist.all_reduce(grad := grad.contiguous().clone(), group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None
