"""Calls that a CUDA graph captures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Results = TypeVar("Results")


def captured(step: Callable[[], Results], warmups: int) -> tuple[torch.cuda.CUDAGraph, Results]:
    """Return a graph of a step, which ran so many times on a stream of its own before, and what it is replayed into."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmups):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results
