"""Records as text: what a table's cells say, and the sentences below it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from attnplug.bench._compare import Change, common
from attnplug.bench._records import RAN, Record, Timing
from attnplug.bench._report import Report

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


def summary(report: Report) -> str:
    """Return who did not run and why, who was fastest, what is wrong, and the machine."""
    lines = [f"{impl} {where}: {reason}" for impl, where, reason in reasons(report.records)]
    lines += ["", *conclusions(report)]
    return "\n".join(lines).strip()


def conclusions(report: Report) -> list[str]:
    """Return the answer in sentences."""
    cases = len(report.cases)
    counts = Counter(record.impl for record in report.records if record.fastest)
    best = ", ".join(f"{impl} {count}" for impl, count in counts.most_common())
    lines = [f"Fastest, or level with the fastest, of {cases} cases: {best or 'none'}."]
    if report.wrong:
        wrong = Counter(record.impl for record in report.wrong)
        lines.append("WRONG results: " + ", ".join(f"{impl} in {count}" for impl, count in wrong.items()) + ".")
    if report.missing:
        lines.append(f"Interrupted: not measured are {', '.join(report.missing)}.")
    return [*lines, machine(report)]


def machine(report: Report) -> str:
    """Return the machine in one line."""
    known = report.environment
    parts = [card["name"] for card in known.get("cards", [])]
    parts += [f"{known['cpu']}, {known['threads']} of {known['cores']} cores", f"torch {known['torch']}"]
    for ceiling in report.ceilings:
        parts.append(
            f"{ceiling.device} {ceiling.dtype} at most {ceiling.flops / 1e12:.3g} TFLOP/s"
            f" and {ceiling.bandwidth / 1e9:.3g} GB/s"
        )
    return "; ".join(parts) + "."


CHANGE_HEADERS = ("case", "implementation", "what", "before", "after", "change", "verdict")


def change_rows(changes: Sequence[Change]) -> list[tuple[str, ...]]:
    """Return the cells of what changed."""
    return [
        (
            change.case,
            change.impl,
            change.what.replace("_", " "),
            _value(change.what, change.before),
            _value(change.what, change.after),
            "-" if change.ratio is None else f"{change.ratio - 1:+.1%}",
            "REGRESSION" if change.regression else _verdict(change),
        )
        for change in changes
    ]


def comparison(before: Report, after: Report, changes: Sequence[Change]) -> str:
    """Return what was compared, what differs between the machines, and the count of what changed."""
    pairs = len(common(before, after))
    was, now = _flat(before.environment), _flat(after.environment)
    lines = [
        f"{name} differs: {was.get(name, 'none')} before, {now.get(name, 'none')} now"
        for name in dict.fromkeys([*was, *now])
        if was.get(name) != now.get(name) and name != "load_average"
    ]
    regressions = sum(change.regression for change in changes)
    only = {"before": len(before) - pairs, "now": len(after) - pairs}
    lines += [f"{count} records are in the run {when} alone" for when, count in only.items() if count]
    lines.append(f"{pairs} records compared: {len(changes)} changes beyond noise, {regressions} regressions.")
    return "\n".join(lines)


def _flat(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return an environment with its packages as entries of their own."""
    entries = {name: value for name, value in environment.items() if name != "implementations"}
    return entries | environment.get("implementations", {})


def _value(what: str, value: float | str) -> str:
    if isinstance(value, str):
        return value
    return size(value) if what == "memory" else seconds(value)


def _verdict(change: Change) -> str:
    if change.ratio is None:
        return "better"
    if change.what == "memory":
        return "less" if change.ratio < 1 else "more"
    return "faster" if change.ratio < 1 else "slower"
