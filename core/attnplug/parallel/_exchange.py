"""Messages between the ranks of a group, in flight while something is computed; a rank that fails is named."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from attnplug._errors import AttnplugError

GRACE = 2.0
"""Seconds that a rank waits for what the others say of themselves, once something has failed."""


class ParallelError(AttnplugError, RuntimeError):
    """Another rank did not send or take what it must: it failed, or hangs.

    Attributes:
        rank: its rank in the group.
    """

    def __init__(self, rank: int, text: str) -> None:
        self.rank = rank
        super().__init__(text)

    def __reduce__(self) -> Any:
        return type(self), (self.rank, str(self))


def as_group(group: Any, argument: str = "group") -> dist.ProcessGroup:
    """Return a process group, or that of a device mesh of one dimension.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if isinstance(group, dist.ProcessGroup):
        return group
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"{argument}: expected a device mesh of one dimension, got {group}; take one by its name")
        return group.get_group()
    raise TypeError(
        f"{argument}: expected a torch.distributed.ProcessGroup or a DeviceMesh of one dimension, "
        f"got {type(group).__name__}"
    )


@dataclass
class Transfer:
    """Messages in flight; `wait` returns when they have arrived."""

    group: dist.ProcessGroup
    works: list[tuple[Any, int]] = field(default_factory=list)  # each with the rank at the other end
    buffers: tuple[Tensor, ...] = ()  # kept until then
    started: float = 0.0

    def wait(self) -> None:
        """Wait for all; on a GPU, let the current stream wait.

        Raises:
            ParallelError: one did not arrive within the group's timeout.
        """
        for work, peer in self.works:
            try:
                work.wait()
            except RuntimeError as error:
                raise blamed(self.group, peer, time.monotonic() - self.started, error) from error
        self.works, self.buffers = [], ()


def exchange(
    group: dist.ProcessGroup, sent: Sequence[tuple[int, Tensor]], received: Sequence[tuple[int, Tensor]]
) -> Transfer:
    """Start to send and to receive contiguous tensors; each comes with the rank in the group at the other end."""
    operations = [(dist.isend, tensor, peer) for peer, tensor in sent if tensor.numel()]
    operations += [(dist.irecv, tensor, peer) for peer, tensor in received if tensor.numel()]
    transfer = Transfer(group, buffers=tuple(tensor for _, tensor, _ in operations), started=time.monotonic())
    if not operations:
        return transfer
    try:
        works = dist.batch_isend_irecv(
            [dist.P2POp(operation, tensor, group=group, group_peer=peer) for operation, tensor, peer in operations]
        )
    except RuntimeError as error:  # a connection that is gone shows here
        raise blamed(group, operations[0][2], 0.0, error) from error
    # NCCL gives one work for all of a batch, gloo one for each.
    peers = [peer for _, _, peer in operations][-len(works) :]
    transfer.works = list(zip(works, peers, strict=True))
    return transfer


@contextmanager
def reporting(group: dist.ProcessGroup) -> Iterator[None]:
    """Tell the other ranks, which wait for this one, what an exception here was."""
    try:
        yield
    except ParallelError:
        raise
    except Exception as error:
        _say(group, f"failed:{type(error).__name__}: {error}")
        raise


def blamed(group: dist.ProcessGroup, peer: int, waited: float, error: BaseException) -> ParallelError:
    """Return an error that names the rank that is at fault.

    The rank at the other end may itself be waiting for another one, and says so in the store of the group; whoever
    says nothing hangs, or is gone.
    """
    _say(group, f"waits:{peer}")
    culprit, reason, seen = peer, "", {group.rank()}
    deadline = time.monotonic() + GRACE
    while culprit not in seen:
        told = _heard(group, culprit, deadline)
        kind, _, text = told.partition(":")
        if kind != "waits":
            reason = text
            break
        seen.add(culprit)
        if int(text) in seen:
            break
        culprit = int(text)
    known = reason or ("does not answer: it hangs, or has ended" if waited > 0.5 else "has ended, or closed the group")
    name = f"rank {culprit} of the group" + (
        "" if dist.get_global_rank(group, culprit) == culprit else f" (rank {dist.get_global_rank(group, culprit)} of all)"
    )
    said = f"{name} failed with {known}" if reason else f"{name} {known}"
    return ParallelError(culprit, f"{said}; rank {group.rank()} waited {waited:.0f} s for rank {peer}. ({error})")


def _store(group: dist.ProcessGroup) -> Any:
    return dist.PrefixStore(f"attnplug/{group.group_name}", dist.distributed_c10d._get_default_store())


def _say(group: dist.ProcessGroup, text: str) -> None:
    try:
        _store(group).set(str(group.rank()), text)
    except Exception:  # noqa: S110  (the store goes with the process that holds it; then there is nobody to tell)
        pass


def _heard(group: dist.ProcessGroup, rank: int, deadline: float) -> str:
    """Return what a rank says of itself, or nothing if it says nothing."""
    try:
        store = _store(group)
        while not store.check([str(rank)]):
            if time.monotonic() > deadline:
                return ""
            time.sleep(0.05)
        return store.get(str(rank)).decode()  # type: ignore[no-any-return]
    except Exception:
        return ""
