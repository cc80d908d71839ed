"""Two runs side by side: what changed beyond noise, and whether that is a regression."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from attnplug._arguments import as_float, expect
from attnplug.bench._errors import BenchError
from attnplug.bench._records import RAN, TIMINGS, Record
from attnplug.bench._report import Report

THRESHOLD = 0.1


@dataclass(frozen=True)
class Change:
    """One thing that is not as it was.

    Attributes:
        case, impl: names.
        what: `forward`, `backward_cold`, ...; `memory`; `correct`; `status`.
        before, after: medians in seconds, bytes, or what it was and is.
        ratio: after over before; None where these are no numbers.
        regression: whether it is worse by more than the threshold, wrong where it was right, or no longer runs.
    """

    case: str
    impl: str
    what: str
    before: float | str
    after: float | str
    ratio: float | None = None
    regression: bool = False


def compare(before: Report, after: Report, threshold: float = THRESHOLD) -> list[Change]:
    """Return what changed from one report to another, for the cases and implementations that both have.

    A time changed if the ranges from 20th to 80th percentile do not meet. It is a regression if, moreover, the
    median grew by more than `threshold`: 0.1 is a tenth. More memory is a regression above the same threshold.

    Args:
        before: the older report.
        after: the newer one.
        threshold: by which fraction a median may grow.

    Raises:
        BenchError: `threshold` is negative, or the reports have nothing in common.

    Examples:
        >>> from attnplug.bench import Case, compare, run
        >>> report = run(Case(heads=2, queries=16, head_size=8), impls=["torch"], seconds=0.01)
        >>> compare(report, report)
        []
    """
    for argument, report in (("before", before), ("after", after)):
        expect(argument, report, Report, "a Report, as run() returns and Report.read() reads")
    if not as_float("threshold", threshold, "a number such as 0.1") >= 0:
        raise BenchError(f"threshold: expected a number from 0 on, such as 0.1, got {threshold!r}")
    pairs = common(before, after)
    if not pairs:
        raise BenchError("the two reports have no case and implementation in common")
    return [change for old, new in pairs for change in _changes(old, new, threshold)]


def common(before: Report, after: Report) -> list[tuple[Record, Record]]:
    """Return the records that both reports have: equal implementation, and equal case but for its name."""
    known = {_key(record): record for record in before.records}
    return [(known[_key(record)], record) for record in after.records if _key(record) in known]


def _key(record: Record) -> tuple[object, str]:
    return replace(record.case, name="-"), record.impl


def _changes(old: Record, new: Record, threshold: float) -> Iterator[Change]:
    case, impl = new.case.name, new.impl
    if old.status != new.status:
        yield Change(case, impl, "status", old.status, new.status, regression=old.status == RAN)
        return
    if old.correct != new.correct:
        answers = {True: "right", False: "wrong", None: "-"}
        yield Change(case, impl, "correct", answers[old.correct], answers[new.correct], regression=bool(old.correct))
    for name in TIMINGS:
        was, now = getattr(old, name), getattr(new, name)
        if was is not None and now is not None and (now.p20 > was.p80 or now.p80 < was.p20):
            ratio = now.median / was.median
            yield Change(case, impl, name, was.median, now.median, ratio, ratio > 1 + threshold)
    if old.memory and new.memory and old.memory != new.memory:
        ratio = new.memory / old.memory
        yield Change(case, impl, "memory", old.memory, new.memory, ratio, ratio > 1 + threshold)
