"""A time of the test's own, and a machine that is idle: what is tested is never how long something takes."""

from __future__ import annotations

import itertools
import timeit
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import attnplug
from attnplug import ImplSpec
from bench_kernels import Kernel, kernel, plain


class Ticking:
    """A time that passes only in kernels made by `taking`, in seconds, whatever the machine does."""

    def __init__(self) -> None:
        self.now = 0.0

    def taking(self, *seconds: float, compute: Kernel = plain) -> Kernel:
        """Return a kernel whose calls take so long, one after the other and again from the start."""
        left = itertools.cycle(seconds)

        def forward(params: Any) -> Any:
            self.now += next(left)
            return compute(params)

        return forward


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Ticking:
    """Let calls on the CPU be timed by a time of the test's own."""
    time, timer = Ticking(), timeit.Timer
    monkeypatch.setattr(timeit, "Timer", lambda call: timer(call, timer=lambda: time.now))
    return time


@pytest.fixture(autouse=True)
def share(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Which share of the processor's time this program gets: all of it, unless a test says otherwise."""
    got = {"share": 1.0}
    monkeypatch.setattr("attnplug.tuning._machine.share_of_processor", lambda threads: got["share"])
    return got


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
