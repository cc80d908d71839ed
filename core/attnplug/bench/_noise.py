"""What disturbs a run: other programs, and a processor that does not keep its pace.

Neither can be prevented from here, so both are measured beside the kernels, and the report says them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnplug.bench._clocks import Clock

_REPEATS = 3
_SIZES = {"cpu": 384, "cuda": 4096}  # of the matrices: a few milliseconds, less than one on a GPU
_BUSY, _DRIFT = 0.25, 0.05
_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Noise:
    """What else happened while a report was measured.

    Attributes:
        others: processors that other programs kept busy, the mean over the run; None where the system does not say.
        cores: processors that there are.
        drift: for each device, by which share a product of two fixed matrices took longer at its slowest than at its
            fastest. It is made before and after each case; a processor that grows hot, or is throttled, shows here.
    """

    others: float | None = None
    cores: int | None = None
    drift: Mapping[str, float] = field(default_factory=dict)

    @property
    def loud(self) -> bool:
        """Whether small differences mean little: a quarter of a processor was busy, or the pace changed by 5 %."""
        return (self.others or 0.0) > _BUSY or any(share > _DRIFT for share in self.drift.values())

    def __str__(self) -> str:
        parts = []
        if self.others is not None:
            parts.append(f"other programs kept {self.others:.1f} of {self.cores} cores busy")
        for device, share in self.drift.items():
            parts.append(f"the pace of {device} changed by {share:.0%}")
        said = "; ".join(parts) or "not measured"
        return f"{said}. Small differences mean little: repeat this on a quiet machine" if self.loud else said


class Watch:
    """Measures the noise of a run, from its making to `found`; `look` between cases takes little time."""

    def __init__(self, clocks: Mapping[str, Clock]) -> None:
        self._clocks = clocks
        self._products: dict[str, Callable[[], Any]] = {}
        self._seconds: dict[str, list[float]] = {}
        self._start = _usage()

    def look(self, device: str) -> None:
        """Time a product of two fixed matrices; the least of several, so that only the pace of the device counts."""
        product = self._products.setdefault(device, _product(device))
        clock = self._clocks[device]
        taken = min(clock.warm(product, 1) for _ in range(_REPEATS))
        self._seconds.setdefault(device, []).append(taken)

    def found(self) -> Noise:
        """Return what was measured since this was made."""
        drift = {device: max(taken) / min(taken) - 1 for device, taken in self._seconds.items() if min(taken) > 0}
        return Noise(_others(self._start, _usage()), os.cpu_count(), drift)


def _product(device: str) -> Callable[[], Any]:
    import torch

    size = _SIZES[torch.device(device).type]
    left = torch.ones(size, size, device=device)
    out = torch.empty_like(left)
    torch.mm(left, left, out=out)  # the first one loads a library
    return lambda: torch.mm(left, left, out=out)


def _usage() -> tuple[float, float, float] | None:
    """Return seconds: that all processors were busy, that this process kept them so, and that passed; None: unknown."""
    try:
        fields = _STAT.read_text(encoding="ascii").split(maxsplit=9)[1:9]
        user, nice, system, _idle, _waiting, irq, softirq, steal = (int(each) for each in fields)
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):  # there is no such file, or it has not the form that Linux gives it
        return None
    return (user + nice + system + irq + softirq + steal) / ticks, time.process_time(), time.perf_counter()


def _others(start: tuple[float, float, float] | None, end: tuple[float, float, float] | None) -> float | None:
    if start is None or end is None:
        return None
    busy, own, passed = (late - early for early, late in zip(start, end, strict=True))
    if busy <= 0 or passed <= 0:  # a sandbox whose counters stand still, or no time has passed
        return None
    return max(0.0, round((busy - own) / passed, 2))
