"""How long a call takes on a device, with its caches warm or cold.

`torch.utils.benchmark` and Triton's `do_bench` measure one candidate to the end before the next, so that a GPU
that heats up penalizes the last candidate. Here a clock takes one sample at a time, and the candidates take turns.
"""

from __future__ import annotations

import os
import timeit
from collections.abc import Callable
from typing import Any, Protocol

import torch

from attnplug.bench._errors import BenchError
from attnplug.bench._validate import device_type

Call = Callable[[], Any]

MIB = 2**20
_LAUNCH_CYCLES = 100_000
"""A GPU waits so many cycles, some 60 µs, for each call that is launched while it waits."""


class Clock(Protocol):
    """Takes samples on one device; times are in seconds.

    Attributes:
        buffer_bytes: of memory that is more than the caches hold.
    """

    buffer_bytes: int

    def warm(self, call: Call, calls: int) -> float:
        """Return the time of one call among `calls` in a row, after whatever ran before."""
        ...

    def cold(self, call: Call) -> float:
        """Return the time of a call that finds nothing of its inputs in the caches."""
        ...


def clock_for(device: str) -> Clock:
    """Return the clock of a device.

    Raises:
        BenchError: there is no such device here, or no clock for its kind.
    """
    kind = device_type(device)
    if kind == "cpu":
        return CPUClock()
    if kind != "cuda":
        raise BenchError(f"device: expected cpu or cuda, got {device!r}")
    if not torch.cuda.is_available():
        raise BenchError(f"device: {device!r} is not on this machine; try cpu")
    if (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise BenchError(f"device: {device!r} is not on this machine, which has {torch.cuda.device_count()} GPUs")
    return CUDAClock(torch.device(device))


class CPUClock:
    """The monotonic clock of `timeit`, which stops garbage collection meanwhile."""

    def __init__(self) -> None:
        self.buffer_bytes = max(2 * _last_level_cache(), 64 * MIB)
        self._buffer: torch.Tensor | None = None

    def warm(self, call: Call, calls: int) -> float:
        return timeit.Timer(call).timeit(calls) / calls

    def cold(self, call: Call) -> float:
        timer = timeit.Timer(call)
        if self._buffer is None:
            self._buffer = torch.zeros(self.buffer_bytes, dtype=torch.uint8)
        self._buffer.add_(1)
        return timer.timeit(1)


class CUDAClock:
    """Events on the stream: time on the GPU, the launch itself hidden behind work that came before.

    A kernel that is launched from a model whose launches run ahead, or from a CUDA graph, takes this long. The
    GPU is kept waiting while calls are launched; a call that synchronises is measured with what that costs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # As Triton's do_bench has it, and more on a GPU with a larger second-level cache.
        self.buffer_bytes = max(256 * MIB, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
        self._buffer: torch.Tensor | None = None

    def warm(self, call: Call, calls: int) -> float:
        with torch.cuda.device(self._device):
            torch.cuda._sleep(_LAUNCH_CYCLES * (calls + 1))
            call()
            return self._elapsed(call, calls)

    def cold(self, call: Call) -> float:
        with torch.cuda.device(self._device):
            if self._buffer is None:
                self._buffer = torch.empty(self.buffer_bytes, dtype=torch.uint8, device=self._device)
            torch.cuda._sleep(_LAUNCH_CYCLES)
            self._buffer.zero_()
            return self._elapsed(call, 1)

    def _elapsed(self, call: Call, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls


def _last_level_cache() -> int:
    """Return the bytes of the CPU's third-level cache, 0 where the system does not say."""
    try:
        return max(0, os.sysconf("SC_LEVEL3_CACHE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return 0
