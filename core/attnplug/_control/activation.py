"""The first choice of the whole process, and providers written for `torch.nn.attention`.

A provider is a function that overrides PyTorch's flash operators when it is called, and returns a handle
whose `remove()` undoes that. PyTorch's registry undoes the old provider before it knows that the new one
works; here a failed activation leaves what was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from attnplug._arguments import expect
from attnplug._control.patch import PatchHandle, patch_torch
from attnplug._control.providers import provider_spec
from attnplug._errors import DuplicateImplementationError, NoImplementationError, PluginError
from attnplug._messages import warn
from attnplug._registry.forks import ACTIVATION, lock
from attnplug._registry.kernel import Kernel
from attnplug._registry.registry import PROGRAM, Entry
from attnplug._selection.state import process, start
from attnplug._types import check_own_name

_lock = lock(ACTIVATION)


@dataclass(frozen=True)
class _Active:
    """What has to be undone: the patch, and the handle that a provider returned."""

    name: str
    patch: PatchHandle
    register_fn: Callable[[], Any] | None = None
    handle: Any = None


_active: _Active | None = None


def register_flash_attention_impl(impl: str, *, register_fn: Callable[[], Any]) -> None:
    """Register a provider written for `torch.nn.attention.register_flash_attention_impl`, unchanged.

    Args:
        impl: its name. A provider that was registered under this name before is replaced, as in PyTorch.
        register_fn: called on activation; registers kernels with PyTorch's dispatcher, and may return a
            handle whose `remove()` is called on restore.

    Raises:
        TypeError: `register_fn` cannot be called, or `impl` is not a string.
        SpecError: `impl` is not a name, or is that of a family.
        DuplicateImplementationError: an implementation of another kind has this name.
        ValueError: the name is active.
    """
    if not callable(register_fn):
        raise TypeError(f"register_fn: expected a callable, got {register_fn!r}")
    check_own_name(expect("impl", impl, str, "a name for the provider"), "impl")
    with _lock:
        registry = start()
        if impl in registry:
            entry = registry.get(impl)
            if not _is_provider(entry) or entry.distribution != PROGRAM:
                raise DuplicateImplementationError(impl, entry.distribution, PROGRAM)
            if process.activation == impl:
                raise ValueError(f"impl: {impl!r} is active; restore_flash_attention_impl() first")
            registry.remove(impl)
        registry.add(provider_spec(impl, register_fn), PROGRAM)


def activate_flash_attention_impl(impl: str) -> None:
    """Make `impl` the first choice of the whole process, for every call that it supports.

    `torch.nn.functional.scaled_dot_product_attention` follows, in unmodified and already compiled models.

    All or nothing: if it fails, what was active before stays active.

    Args:
        impl: the name of an implementation, or of a provider of `torch.nn.attention`.

    Raises:
        UnknownImplementationError: no implementation has this name.
        NoImplementationError: it cannot work on this machine; the message says why.
        PluginError: its kernel could not be imported.
        Exception: whatever a provider's `register_fn` raises.
    """
    global _active
    with _lock:
        entry = start().get(impl, "impl")
        if reason := entry.unavailable():
            raise NoImplementationError({impl: (reason,)}, "activate_flash_attention_impl")
        kernel = entry.load()
        if kernel is None:
            raise PluginError(f"implementation {impl!r} cannot be activated: {entry.broken}")
        if faults := kernel.faults():
            raise NoImplementationError({impl: faults}, "activate_flash_attention_impl")
        before, register_fn = _active, kernel.register_fn
        patch = patch_torch()
        try:
            _undo(before)
            try:
                handle = _register(impl, register_fn) if register_fn is not None else None
            except BaseException:  # an interrupt, too: activation is all or nothing
                _active = _redo(before)
                raise
            _become(_Active(impl, patch, register_fn, handle))
        except BaseException:  # as above
            if _active is None or _active.patch is not patch:
                patch.remove()
            raise
        if before is not None:
            before.patch.remove()


def restore_flash_attention_impl() -> None:
    """Undo the activation completely. If nothing is active, warn, as PyTorch does.

    Raises:
        Exception: whatever a provider's `remove()` raises; the implementation is then still active.
    """
    with _lock:
        before = _active
        if before is None:
            warn(UserWarning("restore_flash_attention_impl: no implementation is active"))
            return
        _undo(before)
        try:
            _become(None)
        finally:  # after an interrupt, too
            if _active is None:
                before.patch.remove()


def _become(active: _Active | None) -> None:
    global _active
    _active = active
    process.activate(None if active is None else active.name)
    for follow in followers:
        follow(process.activation)


followers: list[Callable[[str | None], None]] = []
"""Called, under the lock, with what has become active: they keep other registries in step with this one."""


def current_flash_attention_impl() -> str | None:
    """Return the name of the active implementation, or None."""
    return process.activation


def _is_provider(entry: Entry) -> bool:
    return isinstance(entry.spec.kernel, Kernel) and entry.spec.kernel.register_fn is not None


def _register(name: str, register_fn: Callable[[], Any]) -> Any:
    handle = register_fn()
    if handle is not None and not callable(getattr(handle, "remove", None)):
        raise TypeError(f"register_fn of {name!r}: expected None or a handle with remove(), got {handle!r}")
    return handle


def _undo(active: _Active | None) -> None:
    if active is None or active.register_fn is None:
        return
    if active.handle is not None:
        active.handle.remove()
    else:
        warn(
            UserWarning(
                f"{active.name!r} gave no handle when it was activated, so PyTorch's dispatcher keeps its kernels"
            )
        )


def _redo(active: _Active | None) -> _Active | None:
    """Put back what `_undo` undid."""
    if active is None or active.register_fn is None:
        return active
    return replace(active, handle=_register(active.name, active.register_fn))
