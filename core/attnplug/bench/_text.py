"""Records as text: what a table's cells say, and the sentences of what is below it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from attnplug.bench._ceilings import Ceiling
from attnplug.bench._records import RAN, Record, Timing

HEADERS = (
    "case",
    "implementation",
    "correct",
    "forward",
    "fwd cold",
    "backward",
    "bwd cold",
    "TFLOP/s",
    "of ceiling",
    "memory",
    "ratio",
    "",
)


def rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Return the cells of the records that ran; a pair is forward / backward."""
    return [row(record) for record in records if record.status == RAN]


def row(record: Record) -> tuple[str, ...]:
    """Return the cells of one record."""
    return (
        record.case.name,
        record.impl,
        "yes" if record.correct else "WRONG",
        *(duration(timing) for timing in (record.forward, record.forward_cold, record.backward, record.backward_cold)),
        pair(record.forward_tflops, record.backward_tflops, "{:.3g}"),
        pair(record.forward_share, record.backward_share, "{:.0%}"),
        "-" if record.memory is None else size(record.memory),
        "-" if record.ratio is None else f"{record.ratio:.2f}",
        "fastest" if record.fastest else record.reason if not record.correct else "",
    )


def duration(timing: Timing | None) -> str:
    """Return the median, in a unit that leaves three digits."""
    return "-" if timing is None else seconds(timing.median)


def seconds(value: float) -> str:
    """Return a time such as `1.23 ms`."""
    factor, unit = (1.0, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "µs")
    return _three(value * factor, unit)


def size(count: float) -> str:
    """Return a size such as `1.5 MiB`."""
    power = min(3, int(math.log2(count) // 10)) if count >= 1 else 0
    return _three(count / 1024**power, ("B", "KiB", "MiB", "GiB")[power])


def _three(value: float, unit: str) -> str:
    """Return a number with three digits, or all that stand before its point."""
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def pair(forward: float | None, backward: float | None, form: str) -> str:
    """Return forward and, if there is one, backward."""
    return " / ".join(form.format(value) for value in (forward, backward) if value is not None) or "-"


def reasons(records: Sequence[Record]) -> list[tuple[str, str, str]]:
    """Return who did not run and why, the same reason for several cases once: name, status with cases, reason."""
    cases = len({record.case for record in records})
    found = Counter((record.impl, record.status, record.reason) for record in records if record.status != RAN)
    named = {(record.impl, record.status, record.reason): record.case.name for record in records}
    lines = []
    for (impl, status, reason), count in found.items():
        where = "all" if count == cases else f"{count} of {cases}" if count > 1 else named[impl, status, reason]
        lines.append((impl, f"{status}: {where}", reason))
    return lines


def machine(environment: Mapping[str, Any], ceilings: Sequence[Ceiling]) -> str:
    """Return the machine in one line."""
    parts = [gpu["name"] for gpu in environment.get("gpus", [])]
    parts += [
        f"{environment['cpu']}, {environment['threads']} of {environment['cores']} cores",
        f"torch {environment['torch']}",
    ]
    for ceiling in ceilings:
        parts.append(
            f"{ceiling.device} {ceiling.dtype} at most {ceiling.flops / 1e12:.3g} TFLOP/s"
            f" and {ceiling.bandwidth / 1e9:.3g} GB/s"
        )
    return "; ".join(parts) + "."
