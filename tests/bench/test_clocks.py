"""The two clocks: what they do between one reading and the next, and, on a card, that they agree with arithmetic."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from attnplug import bench
from attnplug.bench._ceilings import measure_ceiling
from attnplug.bench._clocks import CPUClock, CUDAClock, clock_for


def test_a_cpu_clock_counts_calls_and_measures_one():
    calls = []
    assert 0 <= CPUClock().warm(lambda: calls.append(1), 7) < 1e-3
    assert len(calls) == 7


def test_a_cpu_clock_fills_the_caches_with_something_else_before_a_cold_call():
    clock = CPUClock()
    clock.cold(lambda: None)
    before = clock._buffer.clone()
    assert before.nbytes == clock.buffer_bytes >= 64 * 2**20
    seen = []
    clock.cold(lambda: seen.append(bool((clock._buffer != before).all())))
    assert seen == [True]


def test_the_ceiling_of_a_cpu_is_a_rate_that_arithmetic_can_have():
    ceiling = measure_ceiling("cpu", "float32", clock_for("cpu"))
    assert 1e9 < ceiling.flops < 1e14 and 1e8 < ceiling.bandwidth < 1e13
    assert ceiling.seconds(2 * ceiling.flops, 0) == pytest.approx(2)
    assert ceiling.seconds(ceiling.flops, 3 * ceiling.bandwidth) == pytest.approx(3)


@pytest.fixture
def card(monkeypatch):
    """A card that only writes down what it is asked; 10 ms pass between two events."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 10.0

    class Buffer:
        def zero_(self):
            log.append("empty caches")

    properties = SimpleNamespace(L2_cache_size=300 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: Buffer())
    return log


def test_a_cuda_clock_launches_all_calls_while_the_card_is_kept_waiting(card):
    seconds = CUDAClock(torch.device("cuda")).warm(lambda: card.append("call"), 4)
    assert card == ["sleep", "call", "event", *["call"] * 4, "event", "wait"]
    assert seconds == pytest.approx(10e-3 / 4)


def test_a_cuda_clock_empties_the_caches_before_a_cold_call(card):
    clock = CUDAClock(torch.device("cuda"))
    assert clock.buffer_bytes == 600 * 2**20
    assert clock.cold(lambda: card.append("call")) == pytest.approx(10e-3)
    assert card == ["sleep", "empty caches", "event", "call", "event", "wait"]


@pytest.mark.gpu
def test_on_a_card_the_time_of_a_copy_is_its_bytes_over_the_bandwidth():
    clock = clock_for("cuda")
    ceiling = measure_ceiling("cuda", "bfloat16", clock)
    source = torch.zeros(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = min(clock.cold(lambda: target.copy_(source)) for _ in range(5))
    assert seconds == pytest.approx(2 * source.nbytes / ceiling.bandwidth, rel=0.3)


@pytest.mark.gpu
def test_on_a_card_a_run_has_times_memory_and_right_results():
    cases = [case.shrunk() for case in bench.case_set("card", device="cuda")]
    report = bench.run(cases, ["torch", "aten_flash", "aten_math"], seconds=0.01)
    assert not report.wrong
    for record in report:
        if record.status == "ran":
            assert 0 < record.forward.median < 1 and 0 < record.forward_cold.median < 1 and record.memory > 0
    assert report.environment["cards"][0]["name"] == torch.cuda.get_device_name()


@pytest.mark.gpu
def test_on_a_card_memory_that_runs_out_is_a_row_and_the_others_go_on():
    huge = bench.Case(batch=2**20, heads=2**10, queries=2**10, device="cuda", dtype="float16")
    small = bench.Case(queries=64, device="cuda", dtype="float16")
    report = bench.run([huge, small], ["torch"], seconds=0.01)
    assert [record.status for record in report] == ["failed", "ran"]
    assert "out of memory" in report.records[0].reason
