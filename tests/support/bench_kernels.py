"""Kernels for the tests of what measures: one that is right, one that is wrong, and a time that passes as they say."""

from __future__ import annotations

import itertools
import signal
import timeit
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import attnplug
from attnplug import ImplSpec

Kernel = Callable[..., Any]


def plain(params: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as its formula has it, without masks; differentiable by PyTorch."""
    logits = params.scale * params.query @ params.key.mT
    return torch.softmax(logits, -1) @ params.value, torch.logsumexp(logits.float(), -1)


def zeros(params: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As fast as it gets, and wrong."""
    out = params.query * 0
    return out, out[..., 0].float()


def kernel(forward: Kernel, backward: Kernel | None = None) -> Any:
    """Return what `ImplSpec.kernel` takes; without a backward it is differentiated by PyTorch."""
    functions = {"forward": staticmethod(forward), "composite": backward is None}
    return type("Kernel", (), functions | ({} if backward is None else {"backward": staticmethod(backward)}))


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


@pytest.fixture
def interrupted() -> Iterator[str]:
    """The name of a kernel in which the user presses Ctrl-C as soon as there are nine queries."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    def forward(params: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if params.query.shape[2] == 9:
            signal.raise_signal(signal.SIGINT)
        return plain(params)

    attnplug.register_impl(ImplSpec(name="interrupted", kernel=kernel(forward), backend=None))
    yield "interrupted"
    attnplug.unregister_impl("interrupted")
    signal.signal(signal.SIGINT, before)
