"""What measured choices cost per call while they are in use, against the same call without any.

Each side of a pair runs what the other runs: where PyTorch's function was the fastest, and where another was. The
latter is held against the call that names it, since by default the call would run something else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import attnplug
import harness
from attnplug.bench import Case, Record, Timing
from attnplug.tuning import choices_from
from harness import Result, alternate

attention = attnplug.scaled_dot_product_attention

SIZES = ((8, 8), (1, 8), (1, 16), (1, 32), (1, 64), (1, 128))


def measure(quick: bool) -> Iterator[Result]:
    torch.set_num_threads(1)
    with torch.no_grad():
        yield from paired("choices in use, torch chosen / without", quick, "torch", None)
        yield from paired("choices in use, aten_flash chosen / named", quick, "aten_flash", "aten_flash")
        yield from decoding(quick)


def paired(name: str, quick: bool, chosen: str, named: str | None) -> Iterator[Result]:
    query, key, value = torch.randn(3, 1, 2, 8, 16)
    yield from compare(name, quick, chosen, lambda impl: attention(query, key, value, impl=impl), named)


def decoding(quick: bool) -> Iterator[Result]:
    """Yield the same of a loop whose keys grow by one each step, over several powers of two."""
    steps: list[tuple[Tensor, Tensor]] = [
        (torch.randn(1, 2, 1, 16), torch.randn(1, 2, length, 16)) for length in range(8, 72)
    ]

    def loop(impl: str | None) -> None:
        for query, key in steps:
            attention(query, key, key, impl=impl)

    yield from compare("choices in use, 64 steps of decoding / without", quick, "torch", loop, None)


def as_if_measured(fastest: str) -> attnplug.Choices:
    """Return the choices of a measurement in which `fastest` took half of the time."""
    cases = [Case(heads=2, queries=queries, keys=keys, head_size=16) for queries, keys in SIZES]
    return choices_from(
        [
            Record(case, impl, "ran", correct=True, forward=Timing(seconds, seconds, seconds, 9))
            for case in cases
            for impl, seconds in {"torch": 2.0, fastest: 1.0}.items()
        ]
    )


def compare(name: str, quick: bool, chosen: str, call: Any, named: str | None) -> Iterator[Result]:
    choices = as_if_measured(chosen)

    @contextmanager
    def in_use() -> Iterator[None]:
        attnplug.use_choices(choices)
        try:
            call(None)  # decides
            call(None)
            yield
        finally:
            attnplug.restore_choices()

    @contextmanager
    def without() -> Iterator[None]:
        attnplug.use_choices(choices)  # so that both sides find the processor's caches alike
        attnplug.restore_choices()
        call(named)
        call(named)
        yield

    times = alternate(
        {"in use": lambda: call(None), "without": lambda: call(named)},
        3 if quick else 200,
        2 if "decoding" in name else 100,
        {"in use": in_use, "without": without},
    )
    details = {"us": times.microseconds("in use"), "of it": times.microseconds("without")}
    yield Result(name, times.ratio("in use", "without"), "ratio", 1.05, 1.0, details)


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
