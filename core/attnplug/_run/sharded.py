"""Kernels on DTensors: each rank runs its share of the batch or of the heads, and nothing is communicated.

A kernel's operator has no sharding strategy, because PyTorch's cannot say how many tensors a forward saves. Attention
needs none: batch entries and heads have nothing to do with each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnplug._types import SDPAParams

Result = tuple[Tensor, Tensor | None]

# Where each tensor of a dense call has the batch and the heads; None where it has not.
_DIMENSIONS: dict[str, tuple[int | None, int | None]] = {
    "query": (0, 1),
    "key": (0, 1),
    "value": (0, 1),
    "attn_mask": (0, 1),
    "sinks": (None, 0),
    "alibi_slopes": (0, 1),
    "seqused_k": (0, None),
}


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor; to import its module here would cost every program."""
    return type(tensor).__name__ == "DTensor" and type(tensor).__module__.startswith("torch.distributed.tensor")


def run_sharded(params: SDPAParams, run: Callable[[SDPAParams], Result]) -> Result:
    """Run a dense call of DTensors, in the form that kernels know, by `run` on what each rank has.

    Shards of the batch or of the heads stay where they are; whatever is laid out otherwise is gathered first, and so
    are heads whose groups of queries a shard would cut.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    query: Any = params.query
    mesh = query.device_mesh
    shares = 1
    placements: list[Any] = []
    for position, placement in enumerate(query.placements):
        size = mesh.size(position)
        cuts_groups = placement == Shard(1) and params.key.shape[1] % (shares * size) != 0
        kept = placement in (Shard(0), Shard(1)) and not cuts_groups
        placements.append(placement if kept else Replicate())
        shares *= size if kept and placement == Shard(1) else 1

    def local(name: str) -> Any:
        tensor = getattr(params, name)
        if tensor is None:
            return None
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
        dimensions = (None, 0) if name == "alibi_slopes" and tensor.dim() == 1 else _DIMENSIONS[name]
        wanted, gradients = [], []
        for placement in placements:
            at = None if placement == Replicate() else dimensions[placement.dim]
            shared = at is not None and tensor.shape[at] > 1
            wanted.append(Shard(at) if at is not None and shared else Replicate())
            gradients.append(wanted[-1] if shared or placement == Replicate() else Partial())
        return tensor.redistribute(placements=wanted).to_local(grad_placements=gradients)

    out, lse = run(replace(params, **{name: local(name) for name in _DIMENSIONS}))

    def whole(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            tensor.contiguous(), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )

    rows = tuple(query.shape[:-1])
    return whole(out, (*rows, params.value.shape[-1])), None if lse is None else whole(lse, rows)
