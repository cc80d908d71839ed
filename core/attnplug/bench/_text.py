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
    "verdict",
    "ratio",
    "forward",
    "backward",
    "fwd cold",
    "bwd cold",
    "TFLOP/s",
    "of ceiling",
    "memory",
)
STANDING_HEADERS = ("implementation", "fastest", "tied", "right", "ran", "ratio")
_BY_WORTH = (1, 2, 3, 0, 4, 5, 10, 8, 9, 6, 7)  # columns of HEADERS, as a narrow terminal fills up
_GAP = 2


def row(record: Record, verdict: str) -> tuple[str, ...]:
    """Return the cells of a record that ran; a pair is forward / backward."""
    return (
        record.case.name,
        record.impl,
        verdict,
        "-" if record.ratio is None else f"{record.ratio:.2f}",
        *(duration(timing) for timing in (record.forward, record.backward, record.forward_cold, record.backward_cold)),
        pair(record.forward_tflops, record.backward_tflops, "{:.3g}"),
        pair(record.forward_share, record.backward_share, "{:.0%}"),
        "-" if record.memory is None else size(record.memory),
    )


def filled(rows: Sequence[Sequence[str]]) -> list[int]:
    """Return the columns that say something in some row; where there are no rows, all of them."""
    return [at for at in range(len(HEADERS)) if not rows or any(row[at] != "-" for row in rows)]


def fitting(rows: Sequence[Sequence[str]], width: int, without: str = "") -> list[int]:
    """Return the columns, in their order, that say something and fit into `width`, those first that matter most.

    Implementation, verdict and ratio are always there, and never the column that is called `without`.
    """
    shown: list[int] = []
    left = width + _GAP
    for at in _BY_WORTH:
        needed = max(len(line[at]) for line in (HEADERS, *rows)) + _GAP
        if at in filled(rows) and HEADERS[at] != without and (needed <= left or len(shown) < 3):
            shown.append(at)
            left -= needed
    return sorted(shown)


def standing_row(standing: Any) -> tuple[str, ...]:
    """Return the cells of a line of the summary."""
    counts = (standing.alone, standing.tied, standing.right, standing.ran)
    ratio = "-" if standing.ratio is None else f"{standing.ratio:.2f}"
    return (standing.impl, *map(str, counts), ratio)


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
    """Return who did not run, or is wrong, and why: name, status with cases, reason; of several cases once."""
    cases = len({record.case for record in records})

    def key(record: Record) -> tuple[str, str, str]:
        return record.impl, record.status if record.status != RAN else "WRONG", record.reason

    found = Counter(key(record) for record in records if record.status != RAN or not record.correct)
    named = {key(record): record.case.name for record in records}
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
