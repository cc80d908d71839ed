"""Choices that belong to a checkpoint: the recomputation takes what the first forward took."""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_compiling

from attnplug._control.scopes import is_torch_first
from attnplug._dispatch.recording import Replay, record
from attnplug._selection.selection import current_selection
from attnplug._selection.state import leave_scope, process, start, thread
from attnplug._selection.watching import add_watcher, remove_watcher


class _Remember:
    """The context of a checkpoint's forward: remembers what was selected, and what each call used."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._record = record()

    def __enter__(self) -> None:
        self.selected = current_selection(None)
        self._calls = self._record.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._record.__exit__()
        self.names[:] = [call.impl for call in self._calls]


class _Repeat:
    """The context of a checkpoint's recomputation: makes each call use what the forward used.

    Calls that run eagerly use it by name; compiled ones find the selection of the forward, under which they have
    been compiled already.
    """

    def __init__(self, remembered: _Remember) -> None:
        self._remembered = remembered
        self._replay: Replay | None = None

    def __enter__(self) -> None:
        selected = self._remembered.selected
        scope = selected.scope
        if (selected.activation, selected.preferred) != (process.activation, process.preferred):
            scope = (True, tuple(entry.name for entry in selected.candidates(start())))
        self._replay = Replay(self._remembered.names)
        self._block = (scope, scope is None or is_torch_first(scope))
        state, block = thread.state, self._block
        add_watcher(self._replay)
        state.scopes = (*state.scopes, block)
        state.scope, state.torch_first = block

    def __exit__(self, *exception: object) -> None:
        if self._replay is not None:
            remove_watcher(self._replay)
        leave_scope(self._block)

    def __del__(self) -> None:
        """Leave what an interrupt kept from being entered, or left, whole."""
        if self._replay is not None:
            remove_watcher(self._replay)


def checkpoint_contexts() -> tuple[Any, Any]:
    """Make the recomputation of a checkpoint use the implementations of its first forward.

    A `context_fn` for `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`: without it a
    recomputation, which runs during backward and so outside every scope, may choose other kernels. It works around
    compiled functions and inside them.

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
    if is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return _compiled_contexts()
    remembered = _Remember()
    return remembered, _Repeat(remembered)


def _compiled_contexts() -> Any:
    """Return the contexts of a checkpoint in a graph, whose recomputation is made of the forward's own operators."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def recompute(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(recompute)
