"""OpenTelemetry is told what runs, if somebody listens; else it is not even imported.

There is no public name for who watches, nor for the limit on attributes, which is lowered here because it is high.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attnplug
from packages import Site
from spoiled_kernels import WrongOut, register, tensors

pytest.importorskip("opentelemetry.sdk", reason="needs opentelemetry-sdk")
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

attend: Any = attnplug.scaled_dot_product_attention


class Metrics:
    """A meter provider that is told, and what it has."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader], shutdown_on_exit=False)

    def points(self, name: str) -> dict[tuple[str, ...], int]:
        """Return what a metric has come to, by the values of its attributes."""
        data = self.reader.get_metrics_data()
        metrics = [] if data is None else data.resource_metrics[0].scope_metrics[0].metrics
        return {
            tuple(map(str, point.attributes.values())): point.value
            for metric in metrics
            if metric.name == name
            for point in metric.data.data_points
        }


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    metrics = Metrics()
    with attnplug.instrument(metrics.provider):
        yield metrics


def test_calls_are_counted_by_implementation_family_and_device(metrics: Metrics) -> None:
    given = tensors()
    attend(*given)
    for _ in range(2):
        attend(*given, impl="aten_math")
    assert metrics.points("attnplug.calls") == {
        ("torch", "FLASH_ATTENTION", "cpu"): 1,
        ("aten_math", "MATH", "cpu"): 2,
    }


def test_compiled_calls_are_counted(metrics: Metrics) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda *given: attend(*given, impl="aten_math"), backend="aot_eager", fullgraph=True)
    for _ in range(3):
        compiled(*tensors())
    assert metrics.points("attnplug.calls") == {("aten_math", "MATH", "cpu"): 3}


def test_fallbacks_are_counted_by_reason(metrics: Metrics) -> None:
    attend(*tensors(), softcap=2.0)
    assert metrics.points("attnplug.fallbacks")["torch", "math_ref", "does not support softcap"] == 1


def test_sizes_in_a_reason_are_not_attributes_and_names_stay(metrics: Metrics) -> None:
    class Picky:
        composite = True

        @staticmethod
        def supports(params: attnplug.SDPAParams) -> str | None:
            length = params.query.shape[-2]
            return f"{length}x{length} in float32 is too much; install flash-attn-4" if length > 4 else None

        forward = staticmethod(lambda params: (params.value, None))

    attnplug.register_impl(attnplug.ImplSpec(name="picky", kernel=Picky, backend=None))
    with attnplug.sdpa_kernel(["picky", "math_ref"], set_priority=True):
        for length in (5, 6, 7):
            attend(*tensors(length))
    found = metrics.points("attnplug.fallbacks")
    assert found == {("picky", "math_ref", "NxN in float32 is too much; install flash-attn-4"): 3}


def test_decisions_are_counted_and_kept_ones_are_none(metrics: Metrics) -> None:
    given = tensors()
    attend(*given, scale=0.123, softcap=1.25, impl="math_ref")
    before = metrics.points("attnplug.decisions").get(("math_ref", "MATH"), 0)
    for length in range(5, 9):
        attend(*tensors(length), scale=0.123, softcap=1.25, impl="math_ref")
    assert metrics.points("attnplug.decisions").get(("math_ref", "MATH"), 0) == before
    attend(*tensors(dtype=torch.float64), softcap=1.25, impl="math_ref", return_lse=True, window_size=(1, 1))
    assert metrics.points("attnplug.decisions")["math_ref", "MATH"] == before + 1


def test_mismatches_and_what_was_verified_are_counted(metrics: Metrics) -> None:
    impl = register(WrongOut)
    before = {name: metrics.points(name) for name in ("attnplug.verified", "attnplug.mismatches")}
    with attnplug.verify(1.0, on_mismatch=lambda mismatch: None):
        for length in (8, 9):
            attend(*tensors(length), impl=impl)

    def added(name: str, result: str) -> int:
        return metrics.points(name).get((impl, result), 0) - before[name].get((impl, result), 0)

    assert added("attnplug.verified", "results") == 2
    assert added("attnplug.mismatches", "out") == 1


def test_attributes_have_few_values(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnplug._watch.telemetry.MOST", 2)
    for impl in ("torch", "aten_math", "aten_flash", "math_ref"):
        attend(*tensors(), impl=impl)
    assert metrics.points("attnplug.calls") == {
        ("torch", "FLASH_ATTENTION", "cpu"): 1,
        ("aten_math", "MATH", "cpu"): 1,
        ("other", "other", "other"): 2,
    }


def test_after_remove_nothing_is_counted_and_a_provider_can_be_told_again() -> None:
    metrics = Metrics()
    attnplug.instrument(metrics.provider).remove()
    attend(*tensors())
    assert metrics.points("attnplug.calls") == {}
    with attnplug.instrument(metrics.provider):
        attend(*tensors())
        assert sum(metrics.points("attnplug.calls").values()) == 1


def test_a_provider_is_not_told_twice(metrics: Metrics) -> None:
    with pytest.raises(ValueError, match="attnplug already reports to this provider"):
        attnplug.instrument(metrics.provider)


def test_instrument_without_any_provider_says_what_to_set() -> None:
    with pytest.raises(ValueError, match=r"opentelemetry\.metrics\.set_meter_provider"):
        attnplug.instrument()


class Spans:
    def __init__(self, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False, **options)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("test")


def test_calls_in_a_recorded_span_are_spans_in_it() -> None:
    spans = Spans()
    with attnplug.instrument(tracer_provider=spans.provider):
        attend(*tensors())
        with spans.tracer.start_as_current_span("request"):
            attend(*tensors(), softcap=2.0)
    span, request = spans.exporter.get_finished_spans()
    assert (span.name, request.name) == ("attnplug::math_ref", "request")
    assert span.parent is not None and span.parent.span_id == request.context.span_id
    assert span.attributes is not None and span.attributes["attnplug.device"] == "cpu"
    assert "torch: does not support softcap" in str(span.attributes["attnplug.passed_over"])


def test_compiled_calls_are_events_of_the_span() -> None:
    spans = Spans()
    torch.compiler.reset()
    compiled = torch.compile(lambda *given: attend(*given, impl="aten_math"), backend="aot_eager", fullgraph=True)
    with attnplug.instrument(tracer_provider=spans.provider), spans.tracer.start_as_current_span("request"):
        compiled(*tensors())
    (request,) = spans.exporter.get_finished_spans()
    assert [event.name for event in request.events] == ["attnplug::aten_math"]


def test_a_trace_that_is_not_sampled_gets_no_spans() -> None:
    spans = Spans(sampler=ALWAYS_OFF)
    with attnplug.instrument(tracer_provider=spans.provider), spans.tracer.start_as_current_span("request"):
        attend(*tensors())
    assert spans.exporter.get_finished_spans() == ()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "site")


def test_without_a_provider_opentelemetry_is_not_imported(site: Site) -> None:
    report = site.run(
        """
        from attnplug._selection.state import process
        sdpa()
        with attnplug.summary():
            sdpa()
        report["imported"] = [name for name in sys.modules if name.startswith("opentelemetry")]
        report["watchers"] = len(process.watchers)
        """
    )
    assert (report.imported, report.watchers) == ([], 0)


def test_the_api_alone_without_a_provider_costs_nothing(site: Site) -> None:
    report = site.run(
        """
        import opentelemetry.metrics, opentelemetry.trace
        from attnplug._selection.state import process
        sdpa()
        report["watchers"] = len(process.watchers)
        """
    )
    assert report.watchers == 0


def test_a_provider_that_was_set_before_the_first_call_is_told_by_itself(site: Site) -> None:
    report = site.run(
        """
        from opentelemetry import metrics
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        reader = InMemoryMetricReader()
        metrics.set_meter_provider(MeterProvider([reader]))
        sdpa()
        sdpa(impl="aten_math")
        found = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
        report["calls"] = sum(
            point.value for metric in found if metric.name == "attnplug.calls" for point in metric.data.data_points
        )
        report["name"] = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].scope.name
        """
    )
    assert (report.calls, report.name) == (2, "attnplug")
