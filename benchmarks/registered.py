"""Whether a call gets slower when a thousand implementations are registered instead of four."""

from __future__ import annotations

import os

os.environ["ATTNPLUG_LOAD"] = ""  # the built-in ones alone, whatever is installed

import sys
from collections.abc import Iterator

import torch

import attnplug
import harness
from attnplug import Capabilities, Feature, ImplSpec, SDPBackend, sdpa_kernel
from harness import Result, Turns, alternate


def measure(quick: bool) -> Iterator[Result]:
    rounds, turns, many = (1, 2, 20) if quick else (10, 50, 1000)
    torch.set_num_threads(1)
    query, key, value = torch.randn(3, 1, 2, 8, 16)

    def call() -> object:
        return attnplug.scaled_dot_product_attention(query, key, value)

    inside = {
        "scope 'torch'": lambda: sdpa_kernel("torch"),
        "scope FLASH_ATTENTION": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    }
    names = ("default", *inside)
    seconds: dict[str, list[float]] = {}
    with torch.no_grad():
        for _ in range(rounds):
            for number in (4, many):
                added = register(number - len(attnplug.list_impls()))
                for name, taken in alternate(dict.fromkeys(names, call), turns, 100, inside).seconds.items():
                    seconds.setdefault(f"{name}, {number}", []).extend(taken)
                for name in added:
                    attnplug.unregister_impl(name)
    times = Turns(seconds)
    for name in names:
        details = {"us": times.microseconds(f"{name}, {many}"), "of 4": times.microseconds(f"{name}, 4")}
        ratio = times.ratio(f"{name}, {many}", f"{name}, 4")
        yield Result(f"{name}: {many} registered implementations / 4", ratio, "ratio", 1.1, 1.0, details)


def register(number: int) -> list[str]:
    """Register so many implementations, which come last and would take any call."""
    names = [f"benchmark_{index}" for index in range(number)]
    capabilities = Capabilities(features=frozenset(Feature))
    for name in names:
        attnplug.register_impl(
            ImplSpec(
                name=name,
                kernel="not.imported",
                backend=SDPBackend.FLASH_ATTENTION,
                capabilities=capabilities,
                priority=-1000,
            )
        )
    return names


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
