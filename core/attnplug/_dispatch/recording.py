"""What ran and why, for `record()`, `ATTNPLUG_TRACE` and `WARN_FOR_UNFUSED_KERNELS`."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from attnplug._dispatch.resolver import Decision
from attnplug._errors import ScopeError
from attnplug._messages import warn
from attnplug._selection.state import leave_recording, process, thread
from attnplug._tracing import constant_in_traces
from attnplug._types import SDPAParams, SDPBackend

logger = logging.getLogger("attnplug")


@dataclass(frozen=True)
class RecordedCall:
    """One attention call: the implementation that ran, its family, and who was passed over for what reasons.

    Attributes:
        impl: the implementation that ran.
        backend: its family; for `torch`, which belongs to none, that of the kernel that PyTorch chose, and None in
            compiled code, where the compiler chooses.
        passed_over: implementation to reasons, for each that was asked before.
    """

    impl: str
    backend: SDPBackend | None
    passed_over: Mapping[str, tuple[str, ...]]


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

    _calls: list[RecordedCall] | None = None

    def __enter__(self) -> list[RecordedCall]:
        if self._calls is not None:
            raise ScopeError("this record() is entered already; make another one")
        state = thread.state
        calls: list[RecordedCall] = []
        state.recordings = (*state.recordings, calls)
        self._calls = calls
        return calls

    def __exit__(self, *exception: object) -> None:
        if self._calls is None:
            raise ScopeError("record() is left, but it was not entered")
        leave_recording(self._calls)
        self._calls = None

    def __del__(self) -> None:
        """Leave what nobody can leave any more: a block that was interrupted while it was being left."""
        if self._calls is not None:
            leave_recording(self._calls)


class Replay:
    """In a thread's recordings: names, in order, the implementations that its calls must use."""

    def __init__(self, names: list[str]) -> None:
        self._names = iter(names)

    def next(self) -> str:
        name = next(self._names, None)
        if name is None:
            raise ScopeError("the recomputation of a checkpoint makes more attention calls than its forward did")
        return name

    def ran(self, call: RecordedCall, params: SDPAParams | None) -> None:
        """Take the name of a call in a graph, which runs what it was compiled with."""
        if params is None:
            self.next()


def replayed(impl: str | None) -> str | None:
    """Return the implementation that a checkpoint's forward used for this call; `impl` if none is replayed."""
    for watcher in thread.state.recordings:
        if isinstance(watcher, Replay):
            return watcher.next()
    return impl


@cache
def _reporter() -> Any:
    """Return the operator with which a graph tells the recordings of the thread what it runs."""
    from torch._higher_order_ops.effects import _EffectType
    from torch.fx.node import has_side_effect
    from torch.library import _register_effectful_op

    library = torch.library.Library("attnplug", "FRAGMENT")
    library.define("report(str impl, str family, str passed_over) -> ()")
    library.impl("report", _reported, "CompositeExplicitAutograd")
    torch.library.register_fake("attnplug::report", lambda *_: None, lib=library)
    operator = torch.ops.attnplug.report.default
    has_side_effect(operator)  # or a graph would drop it, as nothing uses what it returns
    _register_effectful_op(operator, _EffectType.ORDERED)
    return operator, library


def _reported(impl: str, family: str, passed_over: str) -> None:
    reasons = {name: tuple(each) for name, each in json.loads(passed_over).items()}
    call = RecordedCall(impl, SDPBackend[family] if family else None, reasons)
    _tell(call, None)


def _tell(call: RecordedCall, params: SDPAParams | None) -> None:
    """Tell the recordings of this thread what runs; `params` is None for a call in a graph."""
    for watcher in thread.state.recordings:
        watcher.append(call) if type(watcher) is list else watcher.ran(call, params)


@constant_in_traces
def _define_reporter() -> None:
    _reporter()


def report(impl: str, family: str, passed_over: str) -> None:
    """Put a report into the graph that is being traced."""
    _define_reporter()
    torch.ops.attnplug.report.default(impl, family, passed_over)


def described_call(decision: Decision) -> tuple[str, str, str]:
    """Return what `report` takes. Which kernel PyTorch's own function comes to in a graph is not known yet."""
    backend = decision.backend
    return decision.name, "" if backend is None else backend.name, json.dumps(dict(decision.passed_over))


def observe(decision: Decision, params: SDPAParams) -> None:
    """Tell the recordings of this thread, and the log, what is about to run."""
    family = decision.kernel.family
    backend = family(params) if family is not None else decision.backend
    call = RecordedCall(decision.entry.spec.name, backend, decision.passed_over)
    _tell(call, params)
    if process.logs:
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
