"""Ceilings and caches: what is done between one call and the next, and, on a GPU, that arithmetic agrees."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnplug import bench
from bench_kernels import plain

TINY = bench.Case(heads=2, queries=8, head_size=8)


class Writes(TorchDispatchMode):
    """Notes each call of a kernel that is told of it, and the bytes of tensors that are changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, params: Any) -> Any:
        self.seen.append("call")
        return plain(params)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.is_mutable and args[0].nbytes >= 2**20:
            self.seen.append(args[0].nbytes)
        return function(*args, **(kwargs or {}))


def between_calls(register: Any, caches: str, **where: Any) -> list[Any]:
    """Return what was written, of a MiB and more, between the calls that were timed."""
    writes = Writes()
    name = register("watched", writes.forward)
    with writes:
        (record,) = bench.run(TINY.but(**where), [name], baseline=name, caches=[caches], seconds=1e-9)
    assert record.status == "ran"
    first = len(writes.seen) - 1 - writes.seen[::-1].index("call")
    timed = [at for at, what in enumerate(writes.seen[: first + 1]) if what == "call"][-3:]
    return [writes.seen[one + 1 : other] for one, other in itertools.pairwise(timed)]


def test_the_caches_are_filled_with_something_else_before_a_cold_call_and_not_before_a_warm_one(register):
    for written in between_calls(register, "cold"):
        assert len(written) == 1 and written[0] >= 64 * 2**20


def test_nothing_is_written_between_warm_calls(register):
    assert between_calls(register, "warm") == [[], []]


def test_the_ceilings_of_a_cpu_are_rates_that_arithmetic_can_have(report):
    (ceiling,) = report.ceilings
    assert 1e9 < ceiling.flops < 1e14 and 1e8 < ceiling.bandwidth < 1e13
    assert ceiling.seconds(2 * ceiling.flops, 0) == pytest.approx(2)
    assert ceiling.seconds(ceiling.flops, 3 * ceiling.bandwidth) == pytest.approx(3)


@pytest.mark.gpu
def test_on_a_gpu_the_caches_are_emptied_before_a_cold_call(register):
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    for written in between_calls(register, "cold", device="cuda"):
        assert len(written) == 1 and written[0] >= 2 * l2
    assert between_calls(register, "warm", device="cuda") == [[], []]


@pytest.mark.gpu
def test_on_a_gpu_the_time_of_a_copy_is_its_bytes_over_the_bandwidth():
    """The bandwidth of a report, against the events that anybody measures a copy with."""
    report = bench.run(TINY.but(device="cuda", dtype="bfloat16"), ["torch"], seconds=0.01)
    source = torch.zeros(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    assert min(seconds) == pytest.approx(2 * source.nbytes / report.ceilings[0].bandwidth, rel=0.3)


@pytest.mark.gpu
def test_on_a_gpu_a_time_is_that_of_the_work_without_its_launch(register):
    """Work of a known length: the GPU waits for some cycles, which is much longer than a launch takes."""
    cycles = 2_000_000

    def waiting(params):
        torch.cuda._sleep(cycles)
        return plain(params)

    name = register("waiting", waiting)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    (record,) = bench.run(TINY.but(device="cuda"), [name], baseline=name, seconds=0.05)
    for timing in (record.forward, record.forward_cold):
        assert timing.median == pytest.approx(start.elapsed_time(end) / 1e3, rel=0.2)


@pytest.mark.gpu
def test_on_a_gpu_a_run_has_times_memory_and_right_results():
    cases = [case.shrunk() for case in bench.case_set("gpu", device="cuda")]
    report = bench.run(cases, ["torch", "aten_flash", "aten_math"], seconds=0.01)
    assert not report.wrong
    for record in report:
        if record.status == "ran":
            assert 0 < record.forward.median < 1 and 0 < record.forward_cold.median < 1 and record.memory > 0
    assert report.environment["gpus"][0]["name"] == torch.cuda.get_device_name()


@pytest.mark.gpu
def test_on_a_gpu_memory_that_runs_out_is_a_row_and_the_others_go_on():
    huge = bench.Case(batch=2**20, heads=2**10, queries=2**10, device="cuda", dtype="float16")
    small = bench.Case(queries=64, device="cuda", dtype="float16")
    report = bench.run([huge, small], ["torch"], seconds=0.01)
    assert [record.status for record in report] == ["failed", "ran"]
    assert "out of memory" in report.records[0].reason
