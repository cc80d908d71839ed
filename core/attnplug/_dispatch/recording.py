"""What ran and why, for `record()`, `ATTNPLUG_TRACE` and `WARN_FOR_UNFUSED_KERNELS`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attnplug._dispatch.resolver import Decision
from attnplug._errors import ScopeError
from attnplug._messages import warn
from attnplug._registry.config import get_config
from attnplug._selection.state import when_started
from attnplug._selection.watching import RecordedCall, RecordedCalls, Watcher, add_watcher, remove_watcher
from attnplug._types import SDPAParams

if TYPE_CHECKING:
    from attnplug._selection.watching import Result

logger = logging.getLogger("attnplug")


class record:
    """Collect the attention calls of this thread, from when the block is entered until it is left.

    Compiled calls too: a compiled function is compiled once more when it first runs inside a recording, into code that
    reports; outside it runs what it ran before.

    Examples:
        >>> import torch, attnplug
        >>> query = torch.randn(1, 2, 4, 8)
        >>> with attnplug.record() as calls:
        ...     _ = attnplug.scaled_dot_product_attention(query, query, query, impl="aten_math")
        >>> [call.impl for call in calls]
        ['aten_math']
    """

    _list: _List | None = None

    def __enter__(self) -> list[RecordedCall]:
        if self._list is not None:
            raise ScopeError("this record() is entered already; make another one")
        self._list = listening = _List()
        add_watcher(listening)
        return listening.calls

    def __exit__(self, *exception: object) -> None:
        if self._list is None:
            raise ScopeError("record() is left, but it was not entered")
        remove_watcher(self._list)
        self._list = None

    def __del__(self) -> None:
        """Leave a block that can no longer be left by hand, because leaving it was interrupted."""
        if self._list is not None:
            remove_watcher(self._list)

    def __getstate__(self) -> None:
        """Return nothing: a copy is entered by nobody."""


class _List(Watcher):
    """Keeps what it is told."""

    stands_around = False

    def __init__(self) -> None:
        self.calls = RecordedCalls()

    def told(self, call: RecordedCall) -> None:
        self.calls.append(call)


class Replay(Watcher):
    """Makes a thread's calls use the implementations of these names, in order."""

    def __init__(self, names: list[str]) -> None:
        self._names = iter(names)

    def wish(self, impl: str | None) -> str:
        name = next(self._names, None)
        if name is None:
            raise ScopeError("the recomputation of a checkpoint makes more attention calls than its forward did")
        return name

    def around(self, call: RecordedCall, params: SDPAParams, run: Callable[[SDPAParams], Result]) -> Result:
        return run(params)

    def told(self, call: RecordedCall) -> None:
        """Count a call of a graph, which runs what it was compiled with."""
        self.wish(None)


class _Log(Watcher):
    """Logs each call, for `ATTNPLUG_TRACE`."""

    def around(self, call: RecordedCall, params: SDPAParams, run: Callable[[SDPAParams], Result]) -> Result:
        query, key = params.query, params.key
        shapes = "nested" if query.is_nested else f"query {tuple(query.shape)}, key {tuple(key.shape)}, {query.dtype}"
        _log(call, f"runs {shapes}")
        return run(params)

    def told(self, call: RecordedCall) -> None:
        _log(call, "runs in compiled code")


def warn_unfused(decision: Decision) -> None:
    """Warn, as PyTorch does, that a MATH implementation runs because no fused one could."""
    lines = [f"{name}: {'; '.join(reasons)}" for name, reasons in decision.passed_over.items()]
    warn(UserWarning(f"{decision.name!r} of the MATH family runs, because " + " | ".join(lines)))


def _log(call: RecordedCall, what: str) -> None:
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.setLevel(logging.INFO)
    over = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in call.passed_over.items())
    logger.info(
        "attnplug: %s (%s) %s on %s%s",
        call.impl,
        call.backend.name if call.backend is not None else "no family",
        what,
        call.device,
        f"; passed over: {over}" if over else "",
    )


def unfused_warnings_wanted() -> Any:
    """Return the flag that users set on the package, as they do on `torch.nn.attention`."""
    return sys.modules["attnplug"].WARN_FOR_UNFUSED_KERNELS


when_started(lambda _: add_watcher(_Log(), everywhere=True) if get_config().trace else None)
