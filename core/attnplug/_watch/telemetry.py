"""OpenTelemetry: what ran, as metrics, and as spans of the traces that are being recorded.

Nothing here imports OpenTelemetry before somebody asks for it. Whether a program has set providers is known without:
they can only come from modules that the program has imported itself (`providers`).
"""

from __future__ import annotations

import re
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from attnplug._arguments import shown
from attnplug._handles import Removable
from attnplug._run.contract import Result
from attnplug._selection.state import start
from attnplug._selection.watching import RecordedCall, Watcher, add_watcher, remove_watcher
from attnplug._types import SDPAParams, SDPBackend
from attnplug._version import __version__
from attnplug._watch import totals
from attnplug._watch.totals import Labels

METRICS = {
    "attnplug.calls": "attention calls",
    "attnplug.fallbacks": "for each call, the implementations that were asked before and could not run it",
    "attnplug.decisions": "decisions between the implementations; a call like one before it needs none",
    "attnplug.verified": "results and gradients that attnplug.verify has compared",
    "attnplug.mismatches": "results and gradients that attnplug.verify has found wrong",
}
MOST = 200
"""How many combinations of attributes a metric has at most; what comes after them is counted as `other`."""


def providers() -> tuple[Any, Any]:
    """Return the meter provider and the tracer provider that this program has set, None for those it has not."""
    metrics, trace = sys.modules.get("opentelemetry.metrics"), sys.modules.get("opentelemetry.trace")
    meters = None if metrics is None else metrics.get_meter_provider()
    tracers = None if trace is None else trace.get_tracer_provider()
    return _set(meters), _set(tracers)


def _set(provider: Any) -> Any:
    """Return a provider, unless it stands for one that nobody has set yet, or for none."""
    return None if type(provider).__name__.lstrip("_").startswith(("Proxy", "NoOp")) else provider


class Instrumentation(Removable):
    """Ends one `instrument()`; also a context manager."""

    def __init__(self, meters: Any, tracers: Any) -> None:
        self._watcher: _Telemetry | None = _Telemetry(meters, tracers)
        _told.append(self._watcher)
        if meters is not None:
            _make_instruments(meters)
        add_watcher(self._watcher, everywhere=True)

    def remove(self) -> None:
        """Stop reporting to the providers; a second call does nothing."""
        watcher = self._watcher
        if watcher is not None:
            remove_watcher(watcher)
            if watcher in _told:  # a call before was not interrupted here
                _told.remove(watcher)
            self._watcher = None

    def __repr__(self) -> str:
        return f"<Instrumentation: {'removed' if self._watcher is None else 'in place'}>"


def instrument(meter_provider: Any = None, tracer_provider: Any = None) -> Instrumentation:
    """Report to OpenTelemetry what runs, in every thread: metrics, and spans in traces that are recorded.

    Where a program has set a provider before attnplug is first used, this happens by itself. It is for programs that
    set one later, and for providers that are not the process's own.

    Args:
        meter_provider: gets the metrics. If neither is given, the process's own get both.
        tracer_provider: gets the spans.

    Returns:
        A handle; its `remove()` ends it.

    Raises:
        ImportError: OpenTelemetry's API is not installed.
        TypeError: what is given is not a provider.
        ValueError: no provider is given and the process has none; or attnplug already reports to it.
    """
    try:
        import opentelemetry.metrics
        import opentelemetry.trace  # noqa: F401, whether it is there
    except ImportError as error:
        raise ImportError('instrument() needs OpenTelemetry: pip install "attnplug[otel]"') from error
    start()
    given = meter_provider, tracer_provider
    meters, tracers = providers() if meter_provider is None and tracer_provider is None else given
    if meters is None and tracers is None:
        raise ValueError(
            "meter_provider: none is given and the process has none; call "
            "opentelemetry.metrics.set_meter_provider(...) first"
        )
    for argument, provider, method in (
        ("meter_provider", meters, "get_meter"),
        ("tracer_provider", tracers, "get_tracer"),
    ):
        if provider is not None and not callable(getattr(provider, method, None)):
            raise TypeError(f"{argument}: expected a provider of OpenTelemetry, got {shown(provider)}")
    told = [each for watcher in _told for each in watcher.providers if each is not None]
    if any(each is meters or each is tracers for each in told):
        raise ValueError("meter_provider, tracer_provider: attnplug already reports to this provider")
    return Instrumentation(meters, tracers)


def instrument_if_set() -> None:
    """Tell the providers that the program has set, if it has."""
    meters, tracers = providers()
    if meters is not None or tracers is not None:
        Instrumentation(meters, tracers)


class _Telemetry(Watcher):
    """Counts what runs, and opens a span for each call inside a span that is recorded."""

    def __init__(self, meters: Any, tracers: Any) -> None:
        self.providers = meters, tracers
        self._counts: dict[str, Counter[Labels]] = {name: Counter() for name in METRICS}
        self._lock = threading.Lock()
        self._tracer = None if tracers is None else tracers.get_tracer("attnplug", __version__)
        self.stands_around = self._tracer is not None

    def around(self, call: RecordedCall, params: SDPAParams, run: Callable[[SDPAParams], Result]) -> Result:
        self._count(call)
        if self._tracer is None or not _current_span().is_recording():
            return run(params)
        with self._tracer.start_as_current_span(f"attnplug::{call.impl}", attributes=_attributes(call)):
            return run(params)

    def told(self, call: RecordedCall) -> None:
        """A compiled graph is about to make a call: an event of the span, because it does not tell when it ends."""
        self._count(call)
        if self._tracer is not None and (span := _current_span()).is_recording():
            span.add_event(f"attnplug::{call.impl}", _attributes(call))

    def decided(self, impl: str, backend: SDPBackend | None) -> None:
        self._add("attnplug.decisions", (("attnplug.impl", impl), ("attnplug.family", _family(backend))))

    def counts(self, metric: str) -> Counter[Labels]:
        """Return what was counted so far for a metric."""
        with self._lock:
            return self._counts[metric].copy()

    def _count(self, call: RecordedCall) -> None:
        self._add("attnplug.calls", _labels(call))
        for name, reasons in call.passed_over.items():
            labels = (("attnplug.impl", name), ("attnplug.chosen", call.impl))
            for reason in reasons:
                self._add("attnplug.fallbacks", (*labels, ("attnplug.reason", _without_numbers(reason))))

    def _add(self, metric: str, labels: Labels) -> None:
        counts = self._counts[metric]
        with self._lock:
            if labels not in counts and len(counts) >= MOST:
                labels = tuple((label, "other") for label, _ in labels)
            counts[labels] += 1


_told: list[_Telemetry] = []


def _current_span() -> Any:
    return sys.modules["opentelemetry.trace"].get_current_span()


def _attributes(call: RecordedCall) -> dict[str, str]:
    """Return what a span says of a call. Unlike those of metrics, its attributes may have many values."""
    attributes = dict(_labels(call))
    if call.module:
        attributes["attnplug.module"] = call.module
    if call.passed_over:
        reasons = (f"{name}: {', '.join(each)}" for name, each in call.passed_over.items())
        attributes["attnplug.passed_over"] = "; ".join(reasons)
    return attributes


def _labels(call: RecordedCall) -> Labels:
    return (
        ("attnplug.impl", call.impl),
        ("attnplug.family", _family(call.backend)),
        ("attnplug.device", call.device.partition(":")[0]),
    )


def _family(backend: SDPBackend | None) -> str:
    return "none" if backend is None else backend.name


_SIZE = re.compile(
    r"""
    (?<![^\Wx])    # not within a word, such as float16, but behind the x of 2x3
    (?<![^\W\d]-)  # nor behind a word and a hyphen: flash-attn-4
    (?<!\.)        # nor the end of another number
    \d+(\.\d+)*
    """,
    re.VERBOSE,
)


def _without_numbers(reason: str) -> str:
    """Return a reason as an attribute of a metric: each size in it would otherwise make a series of its own."""
    return _SIZE.sub("N", reason)[:120]


_made: weakref.WeakSet[Any] = weakref.WeakSet()


def _make_instruments(meters: Any) -> None:
    """Make the instruments of a provider, once: OpenTelemetry takes none back."""
    if meters in _made:
        return
    _made.add(meters)
    meter = meters.get_meter("attnplug", __version__)
    for metric, description in METRICS.items():
        observe = partial(_observe, metric, weakref.ref(meters))
        meter.create_observable_counter(metric, [observe], "1", description)


def _observe(metric: str, meters: weakref.ref[Any], options: object) -> Iterable[Any]:
    """Return what a metric has come to, when it is exported. A call itself costs an addition."""
    from opentelemetry.metrics import Observation

    watcher = next((each for each in _told if each.providers[0] is meters()), None)
    if watcher is None:
        return []
    counted = watcher.counts(metric) + totals.of(metric)
    return [Observation(count, dict(labels)) for labels, count in counted.items()]
