"""Memory that tells on who touches it: an allocator with guards, and snapshots of what must not change."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from attnplug.testing._inputs import GUARD, own_view

_EMPTY = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")]


class GuardedAllocator:
    """Give every uninitialised tensor NaN inside, and guards of NaN on both sides.

    What a kernel forgets to write is then NaN rather than, by luck, zero; and what it writes past the end
    of a tensor shows in the guards. The functions themselves are replaced: a torch function mode would not
    see backward, and a dispatch mode not what runs inside an operator. Tensors that a kernel allocates in
    C++ have the NaN but no guards: PyTorch fills them where deterministic algorithms are asked for.
    """

    def __init__(self) -> None:
        self._guards: list[Tensor] = []

    def __enter__(self) -> GuardedAllocator:
        self._modes = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True, warn_only=True)
        self._originals = [(owner, name, getattr(owner, name)) for owner, name in _EMPTY]
        for owner, name, original in self._originals:
            setattr(owner, name, self._guarded(original))
        return self

    def __exit__(self, *exception: object) -> None:
        for owner, name, original in self._originals:
            setattr(owner, name, original)
        enabled, warn_only = self._modes
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)

    def _guarded(self, original: Any) -> Any:
        @functools.wraps(original)
        def allocate(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            if (
                not made.is_floating_point()
                or not made.is_contiguous()
                or made.requires_grad
                or made.device.type == "meta"
            ):
                return made
            memory = torch.full((made.numel() + 2 * GUARD,), float("nan"), dtype=made.dtype, device=made.device)
            self._guards += [memory[:GUARD], memory[-GUARD:]]
            return own_view(memory, GUARD, made.shape)

        return allocate

    def overrun(self) -> bool:
        """Whether anything was written into a guard."""
        return not all(bool(guard.isnan().all()) for guard in self._guards)


class Snapshot:
    """The bytes behind some tensors, all of their storages, to see later whether any changed."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self._before = {
            name: (tensor, _bytes(tensor).clone()) for name, tensor in tensors.items() if isinstance(tensor, Tensor)
        }

    def changed(self) -> list[tuple[str, bool]]:
        """Return the names whose memory changed, and whether the tensor itself did, or what lies around it."""
        changes = []
        for name, (tensor, before) in self._before.items():
            now = _bytes(tensor)
            if not torch.equal(now, before):
                old = torch.tensor([], dtype=tensor.dtype, device=tensor.device).set_(
                    before.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
                )
                same = (
                    torch.equal(old.nan_to_num(), tensor.nan_to_num()) if old.is_floating_point() else old.equal(tensor)
                )
                changes.append((name, not same))
        return changes


def _bytes(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))
