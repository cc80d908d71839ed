"""What changed from one report to another, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attnplug.bench._compare import Change, common
from attnplug.bench._report import Report
from attnplug.bench._text import seconds, size

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
        if was.get(name) != now.get(name)
    ]
    lines += [
        f"noise {when}: {report.noise}."
        for when, report in (("before", before), ("now", after))
        if report.noise is not None and report.noise.loud
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
