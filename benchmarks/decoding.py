"""Whether a decode loop, whose keys grow by one each step, decides once or at every step.

The loop starts cold: nothing is decided yet. What attnplug adds to the function that does the work is
compared with what it adds when all steps have one length and everything is decided.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch

import attnplug
import harness
from attnplug import ImplSpec, SDPBackend
from harness import Result


def measure(quick: bool) -> Iterator[Result]:
    steps, rounds = (8, 2) if quick else (512, 100)
    torch.set_num_threads(1)
    ours, theirs = attnplug.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention
    operator = torch._scaled_dot_product_flash_attention_for_cpu
    loops: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "default": (ours, theirs),
        "impl='torch'": (lambda *tensors: ours(*tensors, impl="torch"), lambda *tensors: theirs(*tensors)),
        "impl='aten_flash'": (lambda *tensors: ours(*tensors, impl="aten_flash"), lambda *tensors: operator(*tensors)),
    }
    query, key, value = torch.randn(1, 2, 1, 16), *torch.randn(2, 1, 2, steps, 16)
    growing = [(query, key[:, :, : step + 1], value[:, :, : step + 1]) for step in range(steps)]
    constant = [(query, key[:, :, : steps // 2], value[:, :, : steps // 2])] * steps
    with torch.no_grad():
        for name, (call, baseline) in loops.items():
            turns: dict[tuple[str, str], list[list[float]]] = {}
            for number in range(rounds):
                for kind, calls in (("growing", growing), ("constant", constant)):
                    if kind == "growing":
                        forget()
                    turn = [("ours", call), ("theirs", baseline)]
                    for whose, function in turn if number % 2 else reversed(turn):  # the first finds colder caches
                        turns.setdefault((kind, whose), []).append(each(function, calls))
            taken = {key: sum(map(statistics.median, zip(*taken, strict=True))) / steps for key, taken in turns.items()}
            mean, cached = (taken[kind, "ours"] - taken[kind, "theirs"] for kind in ("growing", "constant"))
            details = {"us": mean * 1e6, "cached us": cached * 1e6, "steps": steps}
            yield Result(
                f"decode loop, {name}: mean overhead / cached overhead", mean / cached, "ratio", 1.2, 1.0, details
            )


def each(call: Callable[..., Any], calls: list[Any]) -> list[float]:
    """Return the seconds of each step: the medians over the rounds are added up, step by step."""
    seconds = []
    for tensors in calls:
        start = perf_counter()
        call(*tensors)
        seconds.append(perf_counter() - start)
    return seconds


def forget() -> None:
    """Make every decision void, as any change of the registry does."""
    attnplug.register_impl(ImplSpec(name="benchmark", kernel="not.imported", backend=SDPBackend.MATH))
    attnplug.unregister_impl("benchmark")


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
