"""What it costs to be watched: verification, a summary, OpenTelemetry; and that nobody pays while nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from opentelemetry.sdk.metrics import MeterProvider

import attnplug
import harness
from harness import Result, alternate

NEVER = 1e-12
RATES = (0.01, 0.1, 1.0)


def measure(quick: bool) -> Iterator[Result]:
    torch.set_num_threads(1)
    yield from of_a_call(3 if quick else 300)
    yield from of_training(1 if quick else 15)


def of_a_call(turns: int) -> Iterator[Result]:
    """Yield what a tiny call costs while somebody watches who does not look at this one."""
    query = torch.randn(1, 2, 4, 8)

    def theirs() -> None:
        F.scaled_dot_product_attention(query, query, query)

    def ours() -> None:
        attnplug.scaled_dot_product_attention(query, query, query)

    watched: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "verified at rate 0": lambda: attnplug.verify(0),
        "verified, not sampled": lambda: attnplug.verify(NEVER),
        "in a summary": attnplug.summary,
        "recorded": attnplug.record,
        "counted by OpenTelemetry": lambda: attnplug.instrument(MeterProvider(shutdown_on_exit=False)),
    }
    candidates = {"F.sdpa": theirs, "nobody watches": ours, **dict.fromkeys(watched, ours)}
    times = alternate(candidates, turns, 100, watched)
    for name in ("nobody watches", *watched):
        details = {"us more than unwatched": times.added(name, "nobody watches")}
        yield Result(f"{name} / F.sdpa", times.ratio(name, "F.sdpa"), "ratio", details=details)


def of_training(turns: int) -> Iterator[Result]:
    """Yield what a step of training costs at each rate."""
    layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    batch = torch.randn(4, 128, 256)

    def step() -> None:
        model(batch).square().mean().backward()

    contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        f"rate {rate:g}": lambda rate=rate: attnplug.verify(rate) for rate in RATES
    }
    with attnplug.patch_torch():
        times = alternate({"plain": step, **dict.fromkeys(contexts, step)}, turns, 5, contexts)
    for name in contexts:
        seconds = times.seconds
        mean = sum(seconds[name]) / sum(seconds["plain"])  # a median would leave out what is sampled
        yield Result(f"training step of 4 layers, verified at {name} / not", mean, "ratio")


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
