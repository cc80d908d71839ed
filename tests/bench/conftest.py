"""Kernels registered for a test, and one small report that many tests look at."""

from __future__ import annotations

import pytest

import attnplug
from attnplug import Capabilities, Feature, ImplSpec, bench
from bench_kernels import interrupted, kernel, register, ticking, zeros

__all__ = ["interrupted", "register", "ticking"]  # fixtures

FEATURES = {Feature.CAUSAL, Feature.BOOLEAN_MASK, Feature.ADDITIVE_MASK, Feature.GQA, Feature.LOWER_RIGHT}


@pytest.fixture(autouse=True)
def _known_ceiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's ceilings take a second to measure; the report that tests share, and GPUs, have real ones."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(
            "attnplug.bench._run.measure_ceiling",
            lambda device, dtype, clock: bench.Ceiling(device, dtype, 1e11, 1e10),
        )


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
