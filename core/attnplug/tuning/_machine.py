"""Whether the machine does anything else: a choice between kernels that differ by a tenth needs it idle."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

_SECONDS = 0.2
_LEAST = 0.85
_SIZE = 256


def busy(devices: Iterable[str]) -> str:
    """Return, as a sentence, that other programs take processor time from this one; empty if they do not.

    It measures the share of the time that this program gets, rather than a load average, which counts this program
    too and ignores a container's limit. Takes 0.2 s.
    """
    on_cpu = any(torch.device(device).type == "cpu" for device in devices)
    threads = torch.get_num_threads() if on_cpu else 1
    share = share_of_processor(threads)
    if share >= _LEAST:
        return ""
    return (
        f"this machine is busy: this program got {share:.0%} of the time of the {threads} "
        f"thread{'s' if threads > 1 else ''} that PyTorch uses"
    )


def share_of_processor(threads: int) -> float:
    """Return which share of the time of so many threads this program gets while it computes with all of them."""
    left = torch.ones(_SIZE, _SIZE, device="cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.mm(left, left)
        used, start = time.process_time(), time.perf_counter()
        while time.perf_counter() - start < _SECONDS:
            torch.mm(left, left)
        return (time.process_time() - used) / ((time.perf_counter() - start) * threads)
    finally:
        torch.set_num_threads(before)
