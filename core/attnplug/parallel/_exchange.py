"""Messages between the ranks of a group, in flight while something is computed; a rank that fails is named."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from attnplug._errors import AttnplugError
from attnplug._messages import printable

GRACE = 2.0
"""Seconds that a rank waits for what the others say of themselves, once something has failed."""

_said: WeakSet[dist.ProcessGroup] = WeakSet()
_connected: WeakSet[dist.ProcessGroup] = WeakSet()


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
        TypeError, ValueError: it is neither, or this rank is not in it.
    """
    if isinstance(group, dist.ProcessGroup):
        return group
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"{argument}: expected a device mesh of one dimension, got {group}; select one by name")
        return group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:  # what `new_group` returns there, a number
        raise ValueError(f"{argument}: this rank is not a member of the group; only members call")
    raise TypeError(
        f"{argument}: expected a torch.distributed.ProcessGroup or a DeviceMesh of one dimension, "
        f"got {type(group).__name__}"
    )


def as_mesh(mesh: Any) -> Any:
    """Return a device mesh of two dimensions.

    Raises:
        TypeError, ValueError: it is not one.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: expected a DeviceMesh of two dimensions, (ring, heads), got {type(mesh).__name__}")
    if mesh.ndim != 2:
        raise ValueError(f"mesh: expected two dimensions, (ring, heads), got {mesh}")
    return mesh


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


def connect(group: dist.ProcessGroup, device: torch.device) -> None:
    """Let all ranks of a group of GPUs make their connections together.

    NCCL makes them at a group's first call, which must then be one of all ranks; with a window, not all have messages.
    """
    if device.type != "cpu" and group not in _connected:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        _connected.add(group)


def exchange(
    group: dist.ProcessGroup, sent: Sequence[tuple[int, Tensor]], received: Sequence[tuple[int, Tensor]]
) -> Transfer:
    """Start to send and to receive contiguous tensors; each comes with the rank in the group at the other end."""
    operations: list[tuple[Any, Tensor, int]] = [(dist.isend, tensor, peer) for peer, tensor in sent if tensor.numel()]
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
    _unsay(group)
    try:
        yield
    except ParallelError:
        raise
    except Exception as error:  # whatever it is, nobody may wait for this rank
        _say(group, f"failed:{type(error).__name__}: {error}")
        raise


def blamed(group: dist.ProcessGroup, peer: int, waited: float, error: BaseException) -> ParallelError:
    """Return an error that names the rank that is at fault.

    The peer may itself be waiting for another rank, and says so in the store of the group; a rank that
    says nothing hangs, or has ended.
    """
    _say(group, f"waits:{peer}")
    culprit, reason, seen = peer, "", {group.rank()}
    deadline = time.monotonic() + GRACE
    while culprit not in seen:
        told = _heard(group, culprit, deadline)
        kind, _, text = told.partition(":")
        if kind != "waits" or text == "all":
            reason = text if kind == "failed" else ""
            break
        seen.add(culprit)
        if int(text) in seen:
            break
        culprit = int(text)
    return _error(group, culprit, reason, waited, f"rank {peer}", error)


def blamed_by_all(group: dist.ProcessGroup, waited: float, error: BaseException) -> ParallelError:
    """Return the same for a collective, in which all wait for each other: the rank that does not report is at fault."""
    _say(group, "waits:all")
    deadline = time.monotonic() + GRACE
    told = {rank: _heard(group, rank, deadline) for rank in range(dist.get_world_size(group)) if rank != group.rank()}
    culprit = next((rank for rank, text in told.items() if text.startswith("failed:")), None)
    if culprit is None:
        culprit = next((rank for rank, text in told.items() if not text), None)
    if culprit is None:
        return ParallelError(-1, f"a message between all ranks of the group failed on each of them: {error}")
    return _error(group, culprit, told[culprit].removeprefix("failed:"), waited, "all ranks", error)


def _error(
    group: dist.ProcessGroup, culprit: int, reason: str, waited: float, awaited: str, error: BaseException
) -> ParallelError:
    everywhere = dist.get_global_rank(group, culprit)
    name = f"rank {culprit} of the group" + ("" if everywhere == culprit else f" (rank {everywhere} of all)")
    what = f"failed with {reason}" if reason else "does not answer: it hangs, or has ended"
    return ParallelError(
        culprit, f"{name} {what}; rank {group.rank()} waited {waited:.0f} s for {awaited} ({printable(error)})"
    )


def store_of(group: dist.ProcessGroup) -> Any:
    """Return where the ranks of a group leave words for each other."""
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    return PrefixStore(f"attnplug/{group.group_name}", _get_default_store())


def _say(group: dist.ProcessGroup, text: str) -> None:
    """Tell ranks that ask why this rank does not go on."""
    with suppress(Exception):  # the store goes with the process that holds it; then there is nobody to tell
        store_of(group).set(str(group.rank()), text)
        _said.add(group)


def _unsay(group: dist.ProcessGroup) -> None:
    """Take back what was said: this rank has gone on."""
    if group in _said:
        _said.discard(group)
        with suppress(Exception):  # as in `_say`
            store_of(group).delete_key(str(group.rank()))


def _heard(group: dist.ProcessGroup, rank: int, deadline: float) -> str:
    """Return what a rank says of itself, or nothing if it says nothing."""
    try:
        store = store_of(group)
        while not store.check([str(rank)]):
            if time.monotonic() > deadline:
                return ""
            time.sleep(0.05)
        return store.get(str(rank)).decode()
    except Exception:  # the process that holds the store has ended; then nobody says anything
        return ""
