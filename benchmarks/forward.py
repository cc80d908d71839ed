"""Forward of flash_triton on a GPU against its peers, with features against itself, and decoding.

The candidates take turns in one process, so that all of them meet the same clocks. A ratio is a time of flash_triton
over another's; below 1 it is faster.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import attnplug
import harness
import peers
from harness import Result, alternate
from peers import HAS_GPU, OURS

LIMITS = {"cuDNN": 1 / 1.05, "FlashAttention 3": 1.0}
FEATURES_LIMIT, DECODING_LIMIT = 1 / 0.85, 1.0
WINDOW, SHORT = 1024, 1024
REPLAYS, BURST = 20, 5
"""Calls without a wait between them: in a graph, and where the host's time must not show in short ones."""


def measure(quick: bool) -> Iterator[Result]:
    peers.needed(quick, "benchmarks/forward.py")
    turns = 3 if quick else 15
    with torch.no_grad():
        for size in (64, 128, 256):
            for length in (8192, SHORT):
                for is_causal in (False, True):
                    yield from of_shape(size, length, is_causal, turns)
        for size in (64, 128, 256) if HAS_GPU else ():  # `aten_flash`, the stand-in on a CPU, has no features
            yield from of_features(size, turns)
            yield of_packed(size, turns)
        for batch in (1, 16):
            for keys in (2048, 16384):
                yield from decoding(batch, keys if HAS_GPU else 32, turns)


def of_shape(size: int, length: int, is_causal: bool, turns: int) -> Iterator[Result]:
    tensors = peers.inputs(size, length, 3)
    others = peers.of_pytorch() | peers.installed()
    candidates = {OURS: waiting(lambda: attend(*tensors, is_causal=is_causal))}
    for name, function in others.items():
        candidates[name] = waiting(lambda function=function: function(*tensors, is_causal=is_causal))
    taken = alternate(candidates, turns, calls=1)
    operations = BURST * 4 * peers.TOKENS * length * peers.COLUMNS * (0.5 if is_causal else 1)
    speeds = {f"TFLOP/s of {name}": round(operations / taken.microseconds(name) / 1e6) for name in candidates}
    where = f"forward, head size {size}, {'causal' if is_causal else 'full'}, length {length}"
    for name in others:
        yield Result(
            f"{where}: {OURS} / {name}", round(taken.ratio(OURS, to=name), 3), "ratio", LIMITS.get(name), details=speeds
        )


def of_features(size: int, turns: int) -> Iterator[Result]:
    """Compare causal calls with a feature against causal calls without, time for each score that is visible."""
    tensors = peers.inputs(size, 8192, 3)
    length, heads = tensors[0].shape[2], tensors[0].shape[1]
    features: dict[str, dict[str, Any]] = {
        "softcap": {"softcap": 30.0},
        "sinks": {"sinks": torch.randn(heads, device=peers.DEVICE)},
        f"a window of {WINDOW}": {"window_size": (WINDOW, 0)},
    }
    candidates = {"plain": waiting(lambda: attend(*tensors, is_causal=True))}
    for name, options in features.items():
        candidates[name] = waiting(lambda options=options: attend(*tensors, is_causal=True, **options))
    taken = alternate(candidates, turns, calls=1)
    visible = length * (length + 1) / 2
    hidden = (length - WINDOW - 1) * (length - WINDOW) / 2
    for name in features:
        share = (visible - hidden) / visible if name.startswith("a window") else 1.0
        value = round(taken.ratio(name, to="plain") / share, 3)
        yield Result(f"forward, head size {size}, causal with {name} / without", value, "ratio", FEATURES_LIMIT)


def of_packed(size: int, turns: int) -> Result:
    """Compare a causal call of packed sequences with the batch of them, whose lengths the host knows."""
    batch = peers.inputs(size, SHORT, 3)
    packed = [tensor.transpose(1, 2).flatten(0, 1).contiguous() for tensor in batch]
    starts = torch.arange(0, peers.TOKENS + 1, SHORT, dtype=torch.int32, device=peers.DEVICE)
    candidates = {
        "plain": waiting(lambda: attend(*batch, is_causal=True)),
        "packed": waiting(
            lambda: attnplug.varlen_attn(*packed, starts, starts, SHORT, SHORT, is_causal=True, impl=OURS)
        ),
    }
    value = round(alternate(candidates, turns, calls=1).ratio("packed", to="plain"), 3)
    name = f"forward, head size {size}, causal with sequences of {SHORT} packed / without"
    return Result(name, value, "ratio", FEATURES_LIMIT)


def decoding(batch: int, keys: int, turns: int) -> Iterator[Result]:
    """Compare one query with many keys, 32 query heads and 8 of keys; in a graph, where the GPU's time alone counts."""
    query = torch.randn(batch, 32, 1, 128, dtype=torch.bfloat16, device=peers.DEVICE)
    key, value = (torch.randn(batch, 8, keys, 128, dtype=query.dtype, device=query.device) for _ in range(2))
    calls: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: attend(query, key, value, enable_gqa=True),
        "F.sdpa": lambda: sdpa(query, key, value, enable_gqa=True),
    }
    for timed in ("in a graph", "by itself"):
        if timed == "in a graph" and not HAS_GPU:
            continue
        of = replayed if timed == "in a graph" else partial(waiting, times=1)
        candidates = {name: of(call) for name, call in calls.items()}
        taken = alternate(candidates, turns, calls=4)
        per_call = REPLAYS if timed == "in a graph" else 1
        moved = 2 * key.numel() * key.element_size()
        speeds = {f"GB/s of {name}": round(moved * per_call / taken.microseconds(name) / 1e3) for name in calls}
        yield Result(
            f"decoding, batch {batch}, {keys} keys, {timed}: {OURS} / F.sdpa",
            round(taken.ratio(OURS, to="F.sdpa"), 3),
            "ratio",
            DECODING_LIMIT if timed == "in a graph" else None,
            details=speeds,
        )


def attend(*tensors: Tensor, **options: Any) -> Tensor:
    return attnplug.scaled_dot_product_attention(*tensors, impl=OURS, **options)


def waiting(call: Callable[[], Any], times: int = BURST) -> Callable[[], None]:
    """Return a function that makes a call several times, and then waits for the GPU."""

    def run() -> None:
        for _ in range(times):
            call()
        peers.finish()

    return run


def replayed(call: Callable[[], Any]) -> Callable[[], None]:
    """Return a function that replays the call, captured in a CUDA graph, several times."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPLAYS):
            call()
    return waiting(graph.replay, times=1)


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
