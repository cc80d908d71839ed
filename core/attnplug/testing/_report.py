"""What a run of the checks found."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from attnplug._tables import WIDTH, html_table, table, wrap
from attnplug.testing._failure import AGAIN, CALL

STATUSES = PASSED, FAILED, DECLINED, NOT_APPLICABLE = "passed", "failed", "declined", "not applicable"
HEADERS = ("check", "dtype", "result", "why")
_SHOWN = 160


@dataclass(frozen=True)
class Result:
    """One check of one dtype.

    Attributes:
        check: its name.
        dtype: the dtype that it ran for.
        status: `passed`, `failed`, `declined` or `not applicable`.
        reason: why, if it did not pass; for a failure, all that is needed to see it again.
        declined: calls of a check that passed which the implementation declined, with its reasons.
        claim: what the check proves.
        seconds: how long it took.
    """

    check: str
    dtype: str
    status: str
    reason: str = ""
    declined: tuple[str, ...] = ()
    claim: str = ""
    seconds: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.check}[{self.dtype}]"


@dataclass(frozen=True)
class Report:
    """All results for one implementation; `str()` is the verdict, each failure in full, and a table of 80 columns."""

    name: str
    device: str
    level: str
    results: tuple[Result, ...]

    @property
    def passed(self) -> bool:
        """Whether something passed and nothing failed."""
        return not self.failures and any(result.status == PASSED for result in self.results)

    @property
    def failures(self) -> tuple[Result, ...]:
        """What failed, the simplest first: an early failure often explains those that follow."""
        return tuple(result for result in self.results if result.status == FAILED)

    def __getitem__(self, check: str) -> tuple[Result, ...]:
        """Return the results of one check, one for each dtype."""
        return tuple(result for result in self.results if check in (result.check, result.label))

    @property
    def seconds(self) -> float:
        """How long all checks took."""
        return sum(result.seconds for result in self.results)

    def summary(self) -> str:
        """Return the verdict and the counts in one line."""
        counts = Counter(result.status for result in self.results)
        shown = ", ".join(f"{counts[status]} {status}" for status in STATUSES)
        return f"{self.name} on {self.device}, {self.level}: {self._verdict()}; {shown}; {self.seconds:.1f} s"

    def _verdict(self) -> str:
        if self.failures:
            return f"FAILED, first {self.failures[0].label}"
        return "PASSED" if self.passed else "NOTHING WAS CHECKED"

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        results = [asdict(result) for result in self.results]
        return {
            "name": self.name,
            "device": self.device,
            "level": self.level,
            "passed": self.passed,
            "seconds": self.seconds,
            "results": results,
        }

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return check, dtype, status and why, for a table."""
        return [(result.check, result.dtype, result.status, _remark(result)) for result in self.results]

    def details(self) -> str:
        """Return each failure in full, the simplest first; failures with the same text appear once.

        Returns:
            The text; empty if nothing failed.
        """
        alike: dict[str, list[Result]] = {}
        for result in self.failures:
            alike.setdefault(_without_call(result.reason), []).append(result)
        return "\n\n".join(_in_full(*results) for results in alike.values())

    def __str__(self) -> str:
        head = "\n".join(wrap(self.summary(), WIDTH))
        return "\n\n".join(filter(None, (head, self.details(), table(HEADERS, self.rows(), WIDTH))))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        failed = [number for number, result in enumerate(self.results) if result.status == FAILED]
        details = f"<pre>{escape(self.details())}</pre>" if failed else ""
        return f"<p>{escape(self.summary())}</p>{details}{html_table(HEADERS, self.rows(), strong=failed)}"


def _without_call(reason: str) -> str:
    """Return what is wrong, without the call that it was seen in."""
    return "\n".join(line for line in reason.splitlines() if not line.startswith((CALL, AGAIN)))


def _in_full(first: Result, *others: Result) -> str:
    lines = [f"{first.label}: {first.claim}", _indented(first.reason)]
    if others:
        lines += wrap(f"The same: {', '.join(each.label for each in others)}", WIDTH)
    return "\n".join(lines)


def _remark(result: Result) -> str:
    text = result.reason.partition("\n")[0]
    if not text and result.declined:
        text = f"declined {len(result.declined)} of its calls, the first: {result.declined[0]}"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
