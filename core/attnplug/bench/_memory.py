"""How much memory a call needs beyond its inputs, and how it runs out of memory without ending the program.

Both devices are asked the same thing: what PyTorch's allocator handed out, at its peak. What a kernel takes from
the system behind PyTorch's back is not seen on either.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Run a call and return the most bytes that it held at once, its results included."""
    collecting = gc.isenabled()
    gc.disable()  # what others let go of meanwhile would be counted
    try:
        return _peak_on_gpu(call, device) if device.type == "cuda" else _peak_on_cpu(call)
    finally:
        if collecting:
            gc.enable()


def _peak_on_gpu(call: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(call: Callable[[], Any]) -> int:
    """Add up the allocations and frees that the profiler's trace reports."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write to stderr whenever it starts
    activities = [torch.profiler.ProfilerActivity.CPU]
    # acc_events: without a schedule it changes nothing, and PyTorch 2.11 warns where it is left out.
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    held = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@contextmanager
def memory_limit(device: torch.device) -> Iterator[None]:
    """Let allocations on a CPU fail where memory ends, as they do on a GPU.

    Linux promises more memory than there is, and ends the program that uses it. Inside, an allocation beyond what
    is available is an error that can be reported.
    """
    available = _available() if device.type == "cpu" else None
    if available is None:
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = _mapped() + available
    if before[0] != resource.RLIM_INFINITY:
        limit = min(limit, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is used up; on a CPU PyTorch has no class of its own for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _available() -> int | None:
    """Return the bytes that programs can still use, None where Linux is not there to say so."""
    sizes = [_meminfo(), _control_group()]
    known = [size for size in sizes if size is not None]
    return min(known) if known else None


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return sizes[0] if sizes else None


def _control_group() -> int | None:
    """Return what is left of a container's limit, None if there is none."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            return int(Path(limit).read_text()) - int(Path(used).read_text())
        except (OSError, ValueError):  # another version of control groups, or "max"
            continue
    return None


def _mapped() -> int:
    """Return the bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
