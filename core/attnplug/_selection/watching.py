"""Observers of attention calls: recordings, logs, checkpoints that repeat a choice, verification and others.

One attribute of a thread's state says whether there are any: `watched`, an empty string where there are none. Testing
it is all that an unobserved call pays, and compiled code guards on it: it has a graph for each of its values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from attnplug._selection.state import process, states, thread, without
from attnplug._tables import WIDTH, html_table, table
from attnplug._types import SDPBackend, family

if TYPE_CHECKING:
    from torch import Tensor

    from attnplug._types import SDPAParams

    Result = tuple[Tensor, Tensor | None]

CALLS, TENSORS = "calls", "tensors"
"""What a graph has to report to watchers: that a call is made, or its tensors too."""


class Gradients(NamedTuple):
    """What a backward got, and what came of it.

    Attributes:
        found: by the name of the argument, each gradient that was wanted.
        out: the gradient of out; None for 0.
        lse: likewise.
    """

    found: dict[str, Tensor]
    out: Tensor | None
    lse: Tensor | None


@dataclass(frozen=True)
class RecordedCall:
    """One attention call: the implementation that ran, its family, and which were passed over for what reasons.

    Attributes:
        impl: the implementation that ran.
        backend: its family; for `torch`, which belongs to none, that of the kernel that PyTorch chose, and None in
            compiled code, where the compiler chooses.
        passed_over: implementation to reasons, for each that was preferred but declined.
        device: the device that it ran on, such as `cuda:0`.
        module: the class of the innermost module bound by `bind` that it was made in; empty outside any, and in
            compiled code.
    """

    impl: str
    backend: SDPBackend | None
    passed_over: Mapping[str, tuple[str, ...]]
    device: str = ""
    module: str = ""

    def __repr__(self) -> str:
        said = {
            "impl": repr(self.impl),
            "backend": "None" if self.backend is None else self.backend.name,
            "device": repr(self.device) if self.device else "",
            "module": repr(self.module) if self.module else "",
            "passed_over": repr(dict(self.passed_over)) if self.passed_over else "",
        }
        return f"RecordedCall({', '.join(f'{name}={text}' for name, text in said.items() if text)})"


UNROUTED = "PyTorch's function runs through attnplug, and is seen, inside patch_torch()"
"""Why no call may have been seen."""


class RecordedCalls(list[RecordedCall]):
    """A list of calls that is shown as a table: 80 columns in a terminal, HTML in a notebook."""

    def __repr__(self) -> str:
        return "\n".join([table(_HEADERS, self._rows(), WIDTH, ("module", "device")), *self._more()])

    def _repr_html_(self) -> str:
        return html_table(_HEADERS, self._rows(), caption=" ".join(self._more()))

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                call.impl,
                family(call.backend),
                call.device,
                call.module or "-",
                _briefly(call.passed_over),
            )
            for call in self[:_SHOWN]
        ]

    def _more(self) -> list[str]:
        if not self:
            return [f"no call was seen: {UNROUTED}"]
        return [f"... and {len(self) - _SHOWN:,} calls more"] if len(self) > _SHOWN else []


def _briefly(passed_over: Mapping[str, tuple[str, ...]]) -> str:
    """Return who was passed over, each with its first reason; the record of a call has all of them."""
    names: dict[str, list[str]] = {}
    for name, reasons in passed_over.items():
        names.setdefault(reasons[0] if reasons else "", []).append(name)
    return ", ".join(f"{', '.join(found)} ({reason})" for reason, found in names.items())


_HEADERS = ("implementation", "family", "device", "module", "passed over")
_SHOWN = 50


class Watcher:
    """An observer of attention calls, from `add_watcher` until `remove_watcher`.

    In eager code `around` is called instead of the kernel, and may do anything before and after it. A compiled
    graph can only report: it calls `told` before the kernel and, where `sees_tensors`, `seen` after it. An exported
    graph reports nothing. Empty inputs, for which no kernel runs, and calls within `unwatched()` are not reported.
    """

    stands_around = True
    """Whether `around` is called. Where it is not, `told` is, in eager code too, and that is cheaper."""
    sees_tensors = False
    """Whether graphs must hand over their tensors. They are compiled once more for it, and keep the tensors longer."""

    def wish(self, impl: str | None) -> str | None:
        """Return the implementation that must run in eager code, whatever is selected; `impl` to leave the choice."""
        return impl

    def around(self, call: RecordedCall, params: SDPAParams, run: Callable[[SDPAParams], Result]) -> Result:
        """Run an eager call, `params` being what the kernel gets, and return its differentiable `(out, lse)`.

        `run` does it, with these or with aliases of the same tensors.
        """
        self.told(call)
        result = run(params)
        if self.sees_tensors:
            self.seen(call, params, result)
        return result

    def decided(self, impl: str, backend: SDPBackend | None) -> None:
        """Take note that a decision was made; calls like an earlier one need none."""

    def told(self, call: RecordedCall) -> None:
        """Take note of a call that is about to run."""

    def seen(self, call: RecordedCall, params: SDPAParams, result: Result) -> None:
        """Look at a call that has run. In compiled code its tensors are part of no graph of autograd."""

    def differentiated(self, call: RecordedCall, params: SDPAParams, gradients: Gradients) -> None:
        """Look at a backward that has run in compiled code: that of an opaque kernel, which alone is called there."""


def add_watcher(watcher: Watcher, everywhere: bool = False) -> None:
    """Let `watcher` watch this thread, or all threads that are there or will be.

    What is interrupted in here is undone by `remove_watcher`, which may be called in any case.
    """
    if everywhere:
        add_to(process, watcher)
    for state in states() if everywhere else [thread.state]:
        add_to(state, watcher)


def add_to(state: Any, watcher: Watcher) -> None:
    """Add `watcher` to one thread, or to the process, from which new threads take theirs."""
    while True:
        before = state.watchers
        after = before if any(each is watcher for each in before) else (*before, watcher)
        watched = level(after)
        if state.watchers is before:  # no call stands between this and the stores: nothing can come between
            state.watchers = after
            state.watched = watched
            return


def remove_watcher(watcher: Watcher) -> None:
    """Let `watcher` watch no longer, in whatever threads it does."""
    state: Any
    for state in (process, *states()):
        while any(each is watcher for each in state.watchers):
            before = state.watchers
            after = without(before, watcher)
            watched = level(after)
            if state.watchers is before:
                state.watchers = after
                state.watched = watched


def level(watchers: tuple[Watcher, ...]) -> str:
    """Return what a graph has to tell these."""
    if any(watcher.sees_tensors for watcher in watchers):
        return TENSORS
    return CALLS if watchers else ""


def wished(impl: str | None) -> str | None:
    """Return the implementation that this thread's watchers want for a call."""
    for watcher in thread.state.watchers:
        impl = watcher.wish(impl)
    return impl


def decided(impl: str, backend: SDPBackend | None) -> None:
    """Tell this thread's watchers of a decision."""
    for watcher in thread.state.watchers:
        watcher.decided(impl, backend)


def differentiated(call: RecordedCall, params: SDPAParams, gradients: Gradients) -> None:
    """Tell this thread's watchers of a backward that has run in compiled code."""
    for watcher in thread.state.watchers:
        watcher.differentiated(call, params, gradients)


@contextmanager
def unwatched() -> Iterator[None]:
    """Make calls that are not reported: those that a watcher makes itself."""
    state = thread.state
    before = state.watched
    state.watched = ""
    try:
        yield
    finally:
        state.watched = before and level(state.watchers)
