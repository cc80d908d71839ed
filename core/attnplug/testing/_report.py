"""What a run of the checks found."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from attnplug._tables import table

PASSED, FAILED, DECLINED, NOT_APPLICABLE = "passed", "failed", "declined", "not applicable"
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
    """All results for one implementation; `str()` is a table, with each failure in full below it."""

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
        return tuple(result for result in self.results if result.status == FAILED)

    def __getitem__(self, check: str) -> tuple[Result, ...]:
        """Return the results of one check, one for each dtype."""
        return tuple(result for result in self.results if check in (result.check, result.label))

    @property
    def seconds(self) -> float:
        """How long all checks took."""
        return sum(result.seconds for result in self.results)

    def summary(self) -> str:
        """Return the counts in one line."""
        counts = Counter(result.status for result in self.results)
        shown = ", ".join(f"{counts[status]} {status}" for status in (PASSED, FAILED, DECLINED, NOT_APPLICABLE))
        return f"{self.name} on {self.device}, {self.level}: {shown}; {self.seconds:.1f} s"

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
        """Return each failure in full, and the counts."""
        failures = [f"{result.label}: {result.claim}\n{_indented(result.reason)}" for result in self.failures]
        return "\n\n".join([*failures, self.summary()])

    def __str__(self) -> str:
        return f"{table(('check', 'dtype', 'result', 'why'), self.rows())}\n\n{self.details()}"


def _remark(result: Result) -> str:
    text = result.reason.partition("\n")[0]
    if not text and result.declined:
        text = f"declined {len(result.declined)} of its calls, the first: {result.declined[0]}"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
