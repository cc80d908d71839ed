"""What a ring sends, how much of that time it computes, and from which length it should scale.

The first two are measured: on all GPUs of the machine over NCCL if there are several, else on processes over gloo.
Bytes are those of the messages themselves, against what the queries of a rank cannot do without; overlap is the share
of the time of messages in which a kernel runs, from a trace of `torch.profiler`. The last is a model on paper, of a
ring of 8 H100 with the measured speeds of attention kernels on one, which a run on such machines must confirm.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import harness
from attnplug import parallel
from harness import Result

Intervals = list[tuple[float, float]]


def measure(quick: bool) -> Iterator[Result]:
    ranks = torch.cuda.device_count() if torch.cuda.device_count() > 1 else 4
    heads, size, length = (2, 16, 256 * ranks) if quick else (4, 64, 1024 * ranks)
    calls = {
        "causal": {"is_causal": True},
        "full": {},
        "causal, a window of a quarter": {"is_causal": True, "window_size": (length // 4, -1)},
    }
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (ranks, folder, (heads, size, length), calls), nprocs=ranks)
        found = torch.load(Path(folder, "result.pt"))
    backend = "nccl" if torch.cuda.device_count() > 1 else "gloo"
    for name, (sent, least, covered) in found.items():
        details = {"MiB": sent / 2**20, "ranks": ranks, "over": backend}
        yield Result(
            f"{name}: bytes sent, forward and backward / least possible", sent / least, "ratio", 1.0, 1.0, details
        )
        yield Result(f"{name}: share of the time of messages without a kernel", 1 - covered, "share", details=details)
    yield from on_paper()


def _rank(rank: int, ranks: int, folder: str, shape: tuple[int, int, int], calls: dict[str, dict[str, Any]]) -> None:
    """Run a ring forward and backward for each call; rank 0 writes down what all have sent and its own overlap."""
    on_gpu = torch.cuda.device_count() > 1
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=store, rank=rank, world_size=ranks)
    found = {name: _ring(ranks, device, shape, arguments) for name, arguments in calls.items()}
    if rank == 0:
        torch.save(found, Path(folder, "result.pt"))
    dist.barrier()
    dist.destroy_process_group()


def _ring(
    ranks: int, device: torch.device, shape: tuple[int, int, int], arguments: dict[str, Any]
) -> tuple[float, float, float]:
    """Return bytes that a rank sends, the least that it could, and the share of the time of messages with a kernel."""
    group = dist.group.WORLD
    heads, size, length = shape
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    tensors = [
        torch.randn(1, heads, length // ranks, size, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    ]

    impl = "math_ref" if "window_size" in arguments and not on_gpu else None

    def run() -> None:
        parallel.ring_attention(*tensors, group=group, impl=impl, **arguments).sum().backward()
        if on_gpu:
            torch.cuda.synchronize()

    run()
    with _Counted() as counted:
        run()
    dist.barrier()
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profile:
        run()
    # Keys and values forward, once more backward, and their gradients on the way back.
    least = 3 * _needed(length, **arguments) * heads * 2 * size * dtype.itemsize
    numbers = torch.tensor([counted.bytes, least], dtype=torch.float64)
    numbers = numbers.to(device)
    dist.all_reduce(numbers)
    sent, least = numbers.tolist()
    return sent / ranks, least / ranks, _covered(profile, on_gpu)


def _needed(length: int, is_causal: bool = False, window_size: tuple[int, int] = (-1, -1)) -> int:
    """Return how many keys of other ranks the queries of this one see."""
    own = parallel.sequence_positions(length, group=dist.group.WORLD, is_causal=is_causal)
    behind = own[:, None] - torch.arange(length)
    seen = (behind >= 0) | torch.tensor(not is_causal)
    if window_size[0] >= 0:
        seen &= behind <= window_size[0]
    seen = seen.any(0)
    seen[own] = False
    return int(seen.sum())


class _Counted:
    """Counts the bytes that are sent in a block."""

    def __enter__(self) -> _Counted:
        self.bytes, self._send = 0, dist.batch_isend_irecv

        def counting(operations: list[Any]) -> Any:
            sent = [operation.tensor for operation in operations if operation.op is dist.isend]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in sent)
            return self._send(operations)

        dist.batch_isend_irecv = counting
        return self

    def __exit__(self, *exception: object) -> None:
        dist.batch_isend_irecv = self._send


def _covered(profile: Any, on_gpu: bool) -> float:
    """Return the share of the time in which messages are on their way that a kernel covers."""
    messages, kernels = [], []
    for event in profile.events():
        interval = (event.time_range.start, event.time_range.end)
        if on_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        if "nccl" in event.name.lower() or event.name.startswith("gloo:"):
            messages.append(interval)
        elif on_gpu or event.name.startswith("aten::"):
            kernels.append(interval)
    messages, kernels = _joined(messages), _joined(kernels)
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in messages for c, d in kernels)
    return both / max(sum(b - a for a, b in messages), 1e-9)


def _joined(intervals: Intervals) -> Intervals:
    found: Intervals = []
    for start, stop in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return found


# On paper.

FORWARD = {1024: (599e12, 434e12), 8192: (714e12, 674e12)}
"""FLOP/s of FlashAttention 3 in bfloat16 with heads of 128 on an H100, full and causal, by length; measured."""
BACKWARD = {1024: (420e12, 330e12), 8192: (578e12, 521e12)}
"""Of cuDNN's backward: at 8192 measured, at 1024 scaled as its forward is."""
MEMORY = 3.0e12
"""Bytes per second of a copy on an H100, read and written; measured."""
NETWORKS = {"NVLink, 450 GB/s each way": 450e9, "400 Gb/s a GPU": 50e9}
RANKS, SIZE = 8, 128


@dataclass(frozen=True)
class Ring:
    """A causal ring of `RANKS`, in seconds of one layer's forward and backward."""

    network: float
    heads: int
    kv_heads: int

    def time(self, part: int) -> tuple[float, float, bool]:
        """Return the time with `part` positions on a rank, an equal share of one GPU's, and whether all is hidden."""
        rows, columns = part * self.heads * SIZE, part * self.kv_heads * SIZE
        work = 2 * part * rows  # of a causal block, and of half a full one
        own, block = (work / _speed(FORWARD, part, causal) for causal in (True, False))
        block += (18 * 0.75 * rows + 8 * columns) / MEMORY  # merging, as if nothing stayed in a cache, and packing
        message = 4 * columns / self.network  # keys and values of a whole part, of two bytes
        forward = max(own, message) + (RANKS - 2) * max(block, message) + block
        own_back, back = (2.5 * work / _speed(BACKWARD, part, causal) for causal in (True, False))
        back += (10 * 0.75 * rows + (8 + 8 + 15) * columns) / MEMORY  # adding up, packing there and back
        backward = max(own_back, message) + (RANKS - 1) * max(back, 2 * message) + message
        whole = part * RANKS
        alone = 2 * whole * whole * self.heads * SIZE
        ideal = alone / RANKS * (1 / _speed(FORWARD, whole, True) + 2.5 / _speed(BACKWARD, whole, True))
        return forward + backward, ideal, message <= min(own, block) and 2 * message <= min(own_back, back)


def _speed(table: dict[int, tuple[float, float]], length: int, causal: bool) -> float:
    """Return FLOP/s at a length, between the measured ones by its logarithm."""
    (low, slow), (high, fast) = ((at, speeds[causal]) for at, speeds in table.items())
    share = (math.log(length) - math.log(low)) / (math.log(high) - math.log(low))
    return slow + min(max(share, 0.0), 1.0) * (fast - slow)


def on_paper() -> Iterator[Result]:
    lengths = [1024 * n for n in range(1, 129)]
    for network, speed in NETWORKS.items():
        for heads, kv_heads in ((32, 32), (32, 8)):
            ring = Ring(speed, heads, kv_heads)
            hidden = next(part for part in lengths if ring.time(part)[2])
            scales = next(part for part in lengths if ring.time(part)[1] / ring.time(part)[0] >= 0.9)
            name = f"on paper, {RANKS} H100, {network}, {heads} heads, {kv_heads} of keys"
            details = {"tokens": hidden * RANKS}
            yield Result(f"{name}: hides its messages from", hidden * RANKS / 1024, "Ki", details=details)
            time, ideal, _ = ring.time(max(hidden, scales))
            details = {"tokens": max(hidden, scales) * RANKS, "scaling": ideal / time}
            yield Result(f"{name}: time / ideal", time / ideal, "ratio", 1 / 0.9, 1.0, details)


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
