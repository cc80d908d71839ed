"""Scopes that belong to a module, and choices that belong to a checkpoint."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch

from attnplug._control.scopes import sdpa_kernel
from attnplug._dispatch.recording import Replay, record
from attnplug._errors import ScopeError
from attnplug._selection.state import process, start, thread

_lock = threading.RLock()  # a module may be collected while it is held


class BindingHandle:
    """Undoes one `bind()`."""

    def __init__(self, module: torch.nn.Module, *hooks: Any) -> None:
        self._hooks = hooks
        _count(1)
        self._counted = weakref.finalize(module, _count, -1)  # a module may go without its binding being removed
        self._counted.atexit = False
        start().changed()

    def remove(self) -> None:
        """Undo the binding; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        if self._counted.alive:
            self._counted()
            start().changed()


def _count(change: int) -> None:
    """Keep count of the bindings. Compiled code has no guard on hooks, but it has one on the registry's generation."""
    with _lock:
        process.bindings += change


class _Enter:
    """A hook as an object, because a model that carries it may be pickled or copied."""

    def __init__(self, scope: sdpa_kernel) -> None:
        self.scope = scope

    def __call__(self, module: torch.nn.Module, args: Any) -> None:
        self.scope.__enter__()


class _Leave(_Enter):
    def __call__(self, module: torch.nn.Module, args: Any, output: Any = None) -> None:
        self.scope.__exit__()


def bind(module: torch.nn.Module, backends: Any, set_priority: bool = False) -> BindingHandle:
    """Run every attention call made inside this module's forward in the scope `sdpa_kernel(backends)`.

    A reference for one layer, another kernel for cross-attention: `bind(model.layers[3], "math_ref")`.
    Calls of `torch.nn.functional.scaled_dot_product_attention` follow while `patch_torch()`, or an
    activation, is in place.

    Args:
        module: whose forward it is for, and that of everything that it calls.
        backends: as for `sdpa_kernel`.
        set_priority: as for `sdpa_kernel`.

    Returns:
        A handle; its `remove()` undoes the binding.

    Raises:
        TypeError: `module` is no `torch.nn.Module`.
        TypeError, ValueError, UnknownImplementationError: as `sdpa_kernel`.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    scope = sdpa_kernel(backends, set_priority)  # a mistake is an error here, not in the middle of a forward
    start()
    return BindingHandle(
        module,
        module.register_forward_pre_hook(_Enter(scope)),
        module.register_forward_hook(_Leave(scope), always_call=True),
    )


class _Remember:
    """The context of a checkpoint's forward: remembers which implementation each call used."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __enter__(self) -> None:
        self._record = record()
        self._calls = self._record.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._record.__exit__()
        self.names[:] = [call.impl for call in self._calls]


class _Repeat:
    """The context of a checkpoint's recomputation: makes each call use what the forward used."""

    def __init__(self, remembered: _Remember) -> None:
        self._remembered = remembered

    def __enter__(self) -> None:
        self._replay = Replay(self._remembered.names)
        thread.state.recordings = (*thread.state.recordings, self._replay)

    def __exit__(self, *exception: object) -> None:
        if not any(watcher is self._replay for watcher in thread.state.recordings):
            raise ScopeError("a checkpoint's context was left in another thread than it was entered in")
        thread.state.recordings = tuple(watcher for watcher in thread.state.recordings if watcher is not self._replay)


def checkpoint_contexts() -> tuple[Any, Any]:
    """Make the recomputation of a checkpoint use the implementations of its first forward.

    A `context_fn` for `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`: without it a
    recomputation, which runs during backward and so outside every scope, may choose other kernels.

    Examples:
        >>> import torch, attnplug
        >>> from torch.utils.checkpoint import checkpoint
        >>> query = torch.randn(1, 2, 4, 8, requires_grad=True)
        >>> with attnplug.sdpa_kernel("aten_math"):
        ...     out = checkpoint(
        ...         attnplug.scaled_dot_product_attention, query, query, query,
        ...         use_reentrant=False, context_fn=attnplug.checkpoint_contexts,
        ...     )
        >>> out.sum().backward()
    """
    remembered = _Remember()
    return remembered, _Repeat(remembered)
