"""Backward of flash_triton on a GPU against PyTorch's cuDNN and flash kernels: 16k tokens, 2048 columns of all heads.

The candidates take turns in one process, so that all of them meet the same clocks: an H100 at work lowers its own, by
7 % and more. A ratio is a time of flash_triton over cuDNN's; below 1 it is faster.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import attnplug
import harness
import peers
from harness import Result, alternate
from peers import COLUMNS, OURS, TOKENS

LIMIT, DETERMINISTIC_LIMIT = 1.0, 1 / 0.75


def measure(quick: bool) -> Iterator[Result]:
    peers.needed(quick, "benchmarks/backward.py")
    for size in (64, 128, 256):
        for is_causal in (False, True):
            yield from of_shape(size, 1024 if quick else 8192, is_causal, 3 if quick else 15)


def of_shape(size: int, length: int, is_causal: bool, turns: int) -> Iterator[Result]:
    """Measure one head size, with gradients of the query added up in any order and in a fixed one."""
    *inputs, grad = peers.inputs(size, length, 4, requires_grad=True)
    ours = attnplug.scaled_dot_product_attention(*inputs, is_causal=is_causal, impl=OURS)
    candidates = {OURS: backward(ours, inputs, grad)}
    candidates["deterministic"] = deterministic(candidates[OURS])
    others = peers.of_pytorch()
    for name, attend in others.items():
        candidates[name] = backward(attend(*inputs, is_causal=is_causal), inputs, grad)
    taken = alternate(candidates, turns, calls=2)
    operations = 10 * TOKENS * length * COLUMNS * (0.5 if is_causal else 1)
    speeds = {name: operations / taken.microseconds(name) / 1e6 for name in candidates}
    for name, limit in ((OURS, LIMIT), ("deterministic", DETERMINISTIC_LIMIT)):
        yield Result(
            f"backward, head size {size}, {'causal' if is_causal else 'full'}: {name} / cuDNN",
            round(taken.ratio(name, to="cuDNN"), 3),
            "ratio",
            limit,
            details={f"TFLOP/s of {each}": round(speeds[each]) for each in (name, *others)},
        )


def backward(out: Tensor, inputs: list[Tensor], grad: Tensor) -> Callable[[], Any]:
    def run() -> None:
        torch.autograd.grad(out, inputs, grad, retain_graph=True)
        peers.finish()

    return run


def deterministic(run: Callable[[], Any]) -> Callable[[], Any]:
    def inside() -> None:
        torch.use_deterministic_algorithms(True)
        try:
            run()
        finally:
            torch.use_deterministic_algorithms(False)

    return inside


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
