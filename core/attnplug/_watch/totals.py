"""What `verify` has found in this process, for metrics."""

from __future__ import annotations

import threading
from collections import Counter

Labels = tuple[tuple[str, str], ...]

_lock = threading.Lock()
_counts: dict[str, Counter[Labels]] = {"attnplug.verified": Counter(), "attnplug.mismatches": Counter()}


def add(metric: str, impl: str, result: str) -> None:
    """Count something that an implementation computed, under the name of a metric."""
    with _lock:
        _counts[metric][("attnplug.impl", impl), ("attnplug.result", result)] += 1


def of(metric: str) -> Counter[Labels]:
    """Return what was counted under the name of a metric."""
    with _lock:
        return _counts.get(metric, Counter()).copy()
