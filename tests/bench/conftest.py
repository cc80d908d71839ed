"""Kernels registered for a test, and one small report that many tests look at."""

from __future__ import annotations

import itertools
import timeit
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import attnplug
from attnplug import Capabilities, Feature, ImplSpec, bench
from bench_kernels import Kernel, kernel, plain, zeros

FEATURES = {Feature.CAUSAL, Feature.BOOLEAN_MASK, Feature.ADDITIVE_MASK, Feature.GQA, Feature.LOWER_RIGHT}


@pytest.fixture(autouse=True)
def _known_ceiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's ceilings take a second to measure; the report that tests share, and GPUs, have real ones."""
    if "gpu" not in request.keywords:
        known = lambda device, dtype, clock: bench.Ceiling(device, dtype, 1e11, 1e10)  # noqa: E731
        monkeypatch.setattr("attnplug.bench._run.measure_ceiling", known)


class Ticking:
    """A time that passes only in kernels made by `taking`, in seconds, whatever the machine does."""

    def __init__(self) -> None:
        self.now = 0.0

    def taking(self, *seconds: float) -> Kernel:
        """Return a right kernel whose calls take so long, one after the other and again from the start."""
        left = itertools.cycle(seconds)

        def forward(params: Any) -> Any:
            self.now += next(left)
            return plain(params)

        return forward


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Ticking:
    """Let calls on the CPU be timed by a time of the test's own: `timeit` is what they are timed with."""
    time, timer = Ticking(), timeit.Timer
    monkeypatch.setattr(timeit, "Timer", lambda call: timer(call, timer=lambda: time.now))
    return time


@pytest.fixture
def register() -> Iterator[Callable[..., str]]:
    """Register a kernel for the length of a test: `register("mine", forward)`."""
    names: list[str] = []

    def add(name: str, forward: Kernel, *, backward: Kernel | None = None, **fields: Any) -> str:
        attnplug.register_impl(ImplSpec(name=name, kernel=kernel(forward, backward), backend=None, **fields))
        names.append(name)
        return name

    yield add
    for name in names:
        attnplug.unregister_impl(name)


@pytest.fixture(scope="session")
def cases() -> list[bench.Case]:
    """A sweep of two lengths with backward, and a case by itself that nobody but PyTorch takes."""
    sweep = [bench.Case(heads=2, queries=length, head_size=8, causal=True, backward=True) for length in (16, 32)]
    return [*sweep, bench.Case(name="<masked & alone>", heads=4, kv_heads=2, queries=4, keys=9, mask="boolean")]


@pytest.fixture(scope="session")
def report(cases: list[bench.Case]) -> bench.Report:
    """Three cases, PyTorch's two kernels, one that is wrong and one that declines."""
    specs = [
        ImplSpec(name="all_zeros", kernel=kernel(zeros), backend=None, capabilities=Capabilities(features=FEATURES)),
        ImplSpec(name="on_gpus", kernel=zeros, backend=None, capabilities=Capabilities(devices=("cuda",))),
    ]
    for spec in specs:
        attnplug.register_impl(spec)
    try:
        return bench.run(cases, ["torch", "aten_math", "all_zeros", "on_gpus"], seconds=0.005)
    finally:
        for spec in specs:
            attnplug.unregister_impl(spec.name)
