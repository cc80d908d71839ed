"""What ran and why, for `record()`, `ATTNPLUG_TRACE` and `WARN_FOR_UNFUSED_KERNELS`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnplug._dispatch.resolver import Decision
from attnplug._errors import ScopeError
from attnplug._messages import warn
from attnplug._selection.state import process, thread
from attnplug._types import SDPAParams, SDPBackend

logger = logging.getLogger("attnplug")


@dataclass(frozen=True)
class RecordedCall:
    """One attention call: the implementation that ran, its family, and who was passed over for what reasons.

    Attributes:
        impl: the implementation that ran.
        backend: its family; for `torch`, which belongs to none, that of the kernel that PyTorch chose.
        passed_over: implementation to reasons, for each that was asked before.
    """

    impl: str
    backend: SDPBackend | None
    passed_over: Mapping[str, tuple[str, ...]]


class record:
    """Collect the attention calls of this thread.

    Examples:
        >>> import torch, attnplug
        >>> query = torch.randn(1, 2, 4, 8)
        >>> with attnplug.record() as calls:
        ...     _ = attnplug.scaled_dot_product_attention(query, query, query, impl="aten_math")
        >>> [call.impl for call in calls]
        ['aten_math']
    """

    def __enter__(self) -> list[RecordedCall]:
        self._calls: list[RecordedCall] = []
        thread.state.recordings = (*thread.state.recordings, self._calls)
        return self._calls

    def __exit__(self, *exception: object) -> None:
        if not any(calls is self._calls for calls in thread.state.recordings):
            raise ScopeError("record() was left in another thread than it was entered in, or twice")
        thread.state.recordings = tuple(calls for calls in thread.state.recordings if calls is not self._calls)


class Replay:
    """In a thread's recordings: names, in order, the implementations that its calls must use."""

    def __init__(self, names: list[str]) -> None:
        self._names = iter(names)

    def next(self) -> str:
        name = next(self._names, None)
        if name is None:
            raise ScopeError("the recomputation of a checkpoint makes more attention calls than its forward did")
        return name

    def append(self, call: RecordedCall) -> None:
        """Nothing to remember: a replay tells, it does not listen."""


def replayed(impl: str | None) -> str | None:
    """Return the implementation that a checkpoint's forward used for this call; `impl` if none is replayed."""
    for watcher in thread.state.recordings:
        if isinstance(watcher, Replay):
            return watcher.next()
    return impl


def observe(decision: Decision, params: SDPAParams) -> None:
    """Tell the recordings of this thread, and the log, what is about to run."""
    family = decision.kernel.family
    backend = family(params) if family is not None else decision.backend
    call = RecordedCall(decision.entry.spec.name, backend, decision.passed_over)
    for calls in thread.state.recordings:
        calls.append(call)
    if process.trace:
        _trace(call, params)


def warn_unfused(decision: Decision) -> None:
    """Warn, as PyTorch does, that a MATH implementation runs because no fused one could."""
    lines = [f"{name}: {'; '.join(reasons)}" for name, reasons in decision.passed_over.items()]
    warn(UserWarning(f"{decision.name!r} of the MATH family runs, because " + " | ".join(lines)))


def _trace(call: RecordedCall, params: SDPAParams) -> None:
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.setLevel(logging.INFO)
    query, key = params.query, params.key
    shapes = "nested" if query.is_nested else f"query {tuple(query.shape)}, key {tuple(key.shape)}"
    over = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in call.passed_over.items())
    logger.info(
        "attnplug: %s (%s) runs %s, %s on %s%s",
        call.impl,
        call.backend.name if call.backend is not None else "no family",
        shapes,
        query.dtype,
        query.device,
        f"; passed over: {over}" if over else "",
    )


def unfused_warnings_wanted() -> Any:
    """Return the flag that users set on the package, as they do on `torch.nn.attention`."""
    return sys.modules["attnplug"].WARN_FOR_UNFUSED_KERNELS  # type: ignore[attr-defined]
