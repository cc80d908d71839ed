"""Calls of DTensors: each rank runs the call on its share of the batch or of the heads, and nothing is communicated.

Batch entries and heads have nothing to do with each other, so what each rank has is a call like any other: it is
decided on, watched, traced and differentiated as one, and any implementation runs it. PyTorch, which goes by operators,
would need a sharding strategy for each of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from attnplug._call.validate import is_sharded
from attnplug._run.contract import TENSORS, Result
from attnplug._run.seeds import drawn_seed, seeded
from attnplug._types import SDPAParams

_DENSE, _PACKED = ("batch", "heads", "sequence", "head size"), ("pages", "tokens", "heads", "head size")


def run_sharded(params: SDPAParams, run: Callable[[SDPAParams], Result]) -> Result:
    """Run a call of DTensors, in the form that kernels know, by `run` on what each rank has.

    Raises:
        ValueError: a tensor is sharded along something that attention cannot be cut along, or a compiled call has
            dropout.
    """
    from torch.distributed.tensor import DTensor, Shard

    query: Any = params.query
    mesh, placements = query.device_mesh, _placements(params)
    with _drawing(params, placements):
        out, lse = run(share_of(params))

    def whole(tensor: Tensor, shape: tuple[int, ...], heads: int) -> Tensor:
        places = [Shard(heads) if placement.is_shard(1) else placement for placement in placements]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            tensor.contiguous(), mesh, places, run_check=False, shape=torch.Size(shape), stride=stride
        )

    found = whole(out, (*query.shape[:-1], params.value.shape[-1]), 1)
    return found, None if lse is None else whole(lse, params.lse_shape, 0 if params.is_varlen else 1)


def share_of(params: SDPAParams) -> SDPAParams:
    """Return this rank's share of a call.

    Shards of the batch or of the heads stay where they are. Whatever is laid out otherwise is brought there first:
    sums that are pending, replicas, and heads whose groups of queries a shard would cut, which every rank then has all.

    Raises:
        ValueError: a tensor is sharded along something that attention cannot be cut along.
    """
    placements = _placements(params)
    return replace(params, **{name: _local(name, getattr(params, name), params, placements) for name in TENSORS})


def described_share(params: SDPAParams) -> SDPAParams:
    """Return this rank's share as fake tensors, for who asks what would run: nothing is communicated."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed.tensor import DTensor

    mode = FakeTensorMode()

    def fake(tensor: Any) -> Any:
        if tensor is None:
            return None
        if not isinstance(tensor, DTensor):
            return mode.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)
        layout, sizes = (tensor.device_mesh, tensor.placements), (tensor.shape, tensor.stride())
        local = mode.from_tensor(tensor.to_local().detach())
        whole = DTensor.from_local(local, *layout, run_check=False, shape=sizes[0], stride=sizes[1])
        return whole.requires_grad_(tensor.requires_grad)

    described = replace(params, **{name: fake(getattr(params, name)) for name in TENSORS})
    with mode, torch.enable_grad():
        return share_of(described)


def _placements(params: SDPAParams) -> list[Any]:
    """Return how the call is shared along each dimension of the mesh; heads are the query's second dimension."""
    from torch.distributed.tensor import Replicate

    for name in ("query", "key", "value"):
        _check(name, getattr(params, name), params.is_varlen)
    query: Any = params.query
    kv_heads = params.key.shape[-2 if params.is_varlen else 1]
    shares, found = 1, []
    for position, placement in enumerate(query.placements):
        kept = placement.is_shard()
        if placement.is_shard(1):
            size = query.device_mesh.size(position)
            kept = kv_heads == 1 or kv_heads % (shares * size) == 0
            shares *= size if kept else 1
        found.append(placement if kept else Replicate())
    return found


def _check(name: str, tensor: Any, is_varlen: bool) -> None:
    for placement in tensor.placements if is_sharded(tensor) else ():
        along = (_PACKED if is_varlen else _DENSE)[placement.dim - tensor.dim()] if placement.is_shard() else "batch"
        if along not in ("batch", "heads"):
            ways, ring = ("heads", "ring_varlen_attn") if is_varlen else ("batch or of the heads", "ring_attention")
            raise ValueError(
                f"{name}: got a DTensor that is sharded along the {along}; attention is computed on shards of the "
                f"{ways}. Redistribute it; or, for parts of a sequence, give each rank's to_local() to "
                f"attnplug.parallel.{ring}"
            )


def _local(name: str, tensor: Any, params: SDPAParams, placements: list[Any]) -> Any:
    """Return what this rank has of one tensor of a call, that is shared so."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if tensor is None:
        return None
    query: Any = params.query
    mesh = query.device_mesh
    batch, heads = _axes(name, tensor, params.is_varlen)
    wanted: list[Any] = []
    gradients: list[Any] = []
    cut: Any
    for placement in placements:
        at = None
        if placement.is_shard():
            at = heads if placement.is_shard(1) else batch
        cut = Replicate() if at is None or tensor.shape[at] == 1 else Shard(at)
        wanted.append(cut)
        gradients.append(Partial() if placement.is_shard() and not cut.is_shard() else cut)
    if not isinstance(tensor, DTensor):
        if not any(placement.is_shard() for placement in wanted) and not tensor.requires_grad:
            return tensor
        tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return tensor.redistribute(placements=wanted).to_local(grad_placements=gradients)


def _axes(name: str, tensor: Tensor, is_varlen: bool) -> tuple[int | None, int | None]:
    """Return where a tensor of a call has the batch and the heads; None where it has not."""
    if name in ("query", "key", "value"):
        return (None, tensor.dim() - 2) if is_varlen else (0, 1)
    if name == "sinks":
        return None, 0
    if name == "alibi_slopes":
        return (0 if tensor.dim() == 2 else None), tensor.dim() - 1
    return 0, (1 if name == "attn_mask" else None)


def _drawing(params: SDPAParams, placements: list[Any]) -> AbstractContextManager[None]:
    """Draw, with dropout, other numbers for each share, and the same for replicas, if their ranks are seeded alike.

    Raises:
        ValueError: the call has dropout and is compiled.
    """
    if not params.dropout:
        return nullcontext()
    if is_compiling():
        raise ValueError("dropout_p: ranks that share a DTensor draw outside of a trace; compile without dropout")
    query: Any = params.query
    place = query.device_mesh.get_coordinate()
    shares = [place[position] for position, placement in enumerate(placements) if placement.is_shard()]
    return seeded(query.device, drawn_seed(query.device), *shares)
