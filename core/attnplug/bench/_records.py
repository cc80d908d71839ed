"""What was found out about one implementation on one case."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from attnplug.bench._cases import Case
from attnplug.bench._ceilings import Ceiling

RAN, DECLINED, FAILED = "ran", "declined", "failed"
_ENOUGH = 5  # samples, for a percentile
TIMINGS = ("forward", "forward_cold", "backward", "backward_cold")


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of all samples, and their 20th and 80th percentile.

    Of fewer than five samples these are the smallest and the largest.

    Attributes:
        samples: how many were taken.
        calls: how many calls each of them is the mean of.
        again: by which share the medians of every other sample differ: what measuring it again would change.
    """

    median: float
    p20: float
    p80: float
    samples: int
    calls: int = 1
    again: float = 0.0

    @classmethod
    def of(cls, seconds: Sequence[float], calls: int = 1) -> Timing:
        """Summarise samples, each the time of one call."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1, calls)
        cuts = statistics.quantiles(seconds, n=5, method="inclusive")
        low, high = (min(seconds), max(seconds)) if len(seconds) < _ENOUGH else (cuts[0], cuts[-1])
        median, halves = statistics.median(seconds), (statistics.median(seconds[start::2]) for start in (0, 1))
        again = abs(next(halves) - next(halves)) / median if median else 0.0
        return cls(median, low, high, len(seconds), calls, again)

    def level(self, first: Timing, noise: float = 0.0) -> bool:
        """Whether the noise does not tell this from a time that has the smaller median.

        The ranges from the 20th to the 80th percentile meet; or the medians differ by no more than they would if
        either were measured again, or than `noise`, which is the same of the whole run.
        """
        margin = max(noise, self.again, first.again)
        return self.p20 <= first.p80 or self.median <= first.median * (1 + margin)


@dataclass(frozen=True)
class Record:
    """One implementation on one case.

    Attributes:
        case: the problem.
        impl: name of the implementation.
        status: `ran`; `declined`: it does not take the call; `failed`: it raised, or ran out of memory.
        reason: why it did not run or, if it ran and is wrong, what is wrong.
        correct: whether its result is right, by the contract's rule; None if it did not run.
        forward, backward: times with warm caches; `forward_cold` and `backward_cold` with cold ones.
        memory: peak bytes beyond the inputs, over forward and, where measured, backward, results included.
        ceiling: what the machine can do, measured in the same run.
        ratio: its time over the baseline's; below 1 is faster.
        fastest: whether, among the results that are right, none is faster beyond noise; where several are, they tie.
    """

    case: Case
    impl: str
    status: str
    reason: str = ""
    correct: bool | None = None
    forward: Timing | None = None
    forward_cold: Timing | None = None
    backward: Timing | None = None
    backward_cold: Timing | None = None
    memory: int | None = None
    ceiling: Ceiling | None = None
    ratio: float | None = None
    fastest: bool = False

    @property
    def total(self) -> Timing | None:
        """The time that implementations are compared by: forward and, where measured, backward; warm if measured."""
        directions = ("forward", "backward") if self.case.backward else ("forward",)
        parts = [timing_of(self, direction) for direction in directions]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        samples = min(part.samples for part in known)
        median, p20, p80 = (sum(getattr(part, at) for part in known) for at in ("median", "p20", "p80"))
        again = sum(part.again * part.median for part in known) / median if median else 0.0
        return Timing(median, p20, p80, samples, again=again)

    @property
    def forward_tflops(self) -> float | None:
        """10^12 operations a second of forward."""
        return self._tflops("forward")

    @property
    def backward_tflops(self) -> float | None:
        """10^12 operations a second of backward."""
        return self._tflops("backward")

    @property
    def forward_share(self) -> float | None:
        """The least time that the machine could do forward in, over the time taken; with cold caches if measured."""
        return self._share("forward")

    @property
    def backward_share(self) -> float | None:
        """The same of backward."""
        return self._share("backward")

    def _tflops(self, direction: str) -> float | None:
        timing = timing_of(self, direction)
        return None if timing is None else getattr(self.case, f"{direction}_flops") / timing.median / 1e12

    def _share(self, direction: str) -> float | None:
        """Main memory is the ceiling of what is moved, so caches must not have held it before."""
        timing: Timing | None = getattr(self, f"{direction}_cold") or getattr(self, direction)
        if timing is None or self.ceiling is None:
            return None
        flops, moved = (getattr(self.case, f"{direction}_{what}") for what in ("flops", "bytes"))
        return self.ceiling.seconds(flops, moved) / timing.median

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain data, for JSON, with what is computed from it."""
        computed = ("forward_tflops", "backward_tflops", "forward_share", "backward_share")
        return {**asdict(self), "case": self.case.as_dict(), **{name: getattr(self, name) for name in computed}}

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Record:
        """Return the record that `as_dict` wrote."""
        known: dict[str, Any] = {
            name: given[name] for name in ("impl", "status", "reason", "correct", "memory", "ratio", "fastest")
        }
        known |= {name: None if given[name] is None else Timing(**given[name]) for name in TIMINGS}
        ceiling = None if given["ceiling"] is None else Ceiling(**given["ceiling"])
        return cls(case=Case.from_dict(given["case"]), ceiling=ceiling, **known)

    def as_row(self) -> dict[str, Any]:
        """Return the record flat, a column for each number, for CSV and data frames; times in seconds."""
        row = {f"case_{name}" if name == "name" else name: value for name, value in self.case.as_dict().items()}
        row["window"] = ",".join(map(str, self.case.window))
        row |= {name: getattr(self, name) for name in ("impl", "status", "correct", "fastest", "ratio", "memory")}
        for name in TIMINGS:
            timing = getattr(self, name)
            for part in ("median", "p20", "p80", "samples"):
                row[f"{name}_{part}"] = None if timing is None else getattr(timing, part)
        for name in ("forward_tflops", "backward_tflops", "forward_share", "backward_share", "reason"):
            row[name] = getattr(self, name)
        return row


def timing_of(record: Record, direction: str) -> Timing | None:
    """Return the time of forward or backward: with warm caches if measured, else with cold ones."""
    warm: Timing | None = getattr(record, direction)
    return warm or getattr(record, f"{direction}_cold")


def repeatability(records: Sequence[Record]) -> list[float]:
    """Return by which shares the times of these records would change if measured again, the smallest first."""
    return sorted(record.total.again for record in records if record.total is not None)


def ranked(records: Sequence[Record], baseline: str, crown: bool = True) -> list[Record]:
    """Return the records of a run with `ratio` and `fastest`.

    Only results that are right can be the fastest; of a case all are that the noise does not tell from the first
    (`Timing.level`), and nobody is if `crown` is false.
    """
    shares = repeatability(records)
    noise = shares[len(shares) // 2] if shares else 0.0
    by_case: dict[Case, list[Record]] = {}
    for record in records:
        by_case.setdefault(record.case, []).append(record)
    return [ranked for group in by_case.values() for ranked in _ranked_case(group, baseline, crown, noise)]


def _ranked_case(records: Sequence[Record], baseline: str, crown: bool, noise: float) -> Iterator[Record]:
    base = next((record.total for record in records if record.impl == baseline), None)
    right = [record.total for record in records if record.correct and record.total is not None]
    first = min(right, key=lambda timing: timing.median, default=None)
    for record in records:
        total = record.total
        if total is None:
            yield record
            continue
        ratio = None if base is None else total.median / base.median
        fastest = crown and bool(record.correct) and first is not None and total.level(first, noise)
        yield replace(record, ratio=ratio, fastest=fastest)
