"""What one eager call costs beyond the function that a user would call instead, with tiny tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

import attnplug
import harness
from attnplug import SDPBackend, sdpa_kernel
from harness import Result, Turns, alternate

LIMIT, AIM = 1.5, 1.2


def measure(quick: bool) -> Iterator[Result]:
    turns = 3 if quick else 1000
    torch.set_num_threads(1)
    query, key, value = torch.randn(3, 1, 2, 8, 16)
    ours, theirs = attnplug.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    with attnplug.patch_torch():
        patched = torch.nn.functional.scaled_dot_product_attention
        candidates: dict[str, Callable[[], Any]] = {
            "F.sdpa": lambda: theirs(query, key, value),
            "default": lambda: ours(query, key, value),
            "impl='torch'": lambda: ours(query, key, value, impl="torch"),
            "scope 'torch'": lambda: ours(query, key, value),
            "aten operator": lambda: operator(query, key, value),
            "impl='aten_flash'": lambda: ours(query, key, value, impl="aten_flash"),
            "scope FLASH_ATTENTION": lambda: ours(query, key, value),
            "patched F.sdpa, nothing selected": lambda: patched(query, key, value),
        }
        inside = {
            "scope 'torch'": lambda: sdpa_kernel("torch"),
            "scope FLASH_ATTENTION": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        }
        with torch.no_grad():
            yield from compare(alternate(candidates, turns, 100, inside), "no grad", LIMIT, AIM)
        query.requires_grad_()
        yield from compare(alternate(candidates, turns, 100, inside), "grad")


def compare(times: Turns, mode: str, limit: float | None = None, aim: float | None = None) -> Iterator[Result]:
    """Yield how much longer each candidate takes than what it is compared with."""
    for name in times.seconds:
        to = "aten operator" if "flash" in name.lower() else "F.sdpa"
        if name not in ("F.sdpa", "aten operator"):
            details = {"us": times.microseconds(name), "of it": times.microseconds(to), "adds": times.added(name, to)}
            limits = (limit, aim) if to == "F.sdpa" else (None, None)  # the limit speaks of equal work
            yield Result(f"{name} / {to}, {mode}", times.ratio(name, to), "ratio", *limits, details)


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
