"""All records of a run with what they mean nothing without: machine, ceilings, settings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attnplug._arguments import as_path
from attnplug._tables import escaped, html_table, table
from attnplug.bench._cases import Case
from attnplug.bench._ceilings import Ceiling
from attnplug.bench._errors import BenchError
from attnplug.bench._noise import Noise
from attnplug.bench._records import RAN, Record, repeatability
from attnplug.bench._text import HEADERS, STANDING_HEADERS, filled, machine, reasons, row, standing_row

FORMAT = 1


@dataclass(frozen=True)
class Standing:
    """How one implementation did over all cases of a report.

    Attributes:
        impl: its name.
        alone: cases in which it is the fastest.
        tied: cases in which it is among several that the noise does not tell apart.
        right: cases that it ran, with a right result.
        ran: cases that it ran.
        ratio: geometric mean of its time over that of the baseline, of the cases that both ran and got right; None if
            there are none.
    """

    impl: str
    alone: int
    tied: int
    right: int
    ran: int
    ratio: float | None


@dataclass(frozen=True)
class Report:
    """What `run` returns; `str()` is a table, iteration gives the records.

    Attributes:
        records: one for each case and implementation, cases in their order.
        environment: the machine and the versions.
        ceilings: what the machine can do, for each device and dtype.
        baseline: the implementation that ratios are to.
        created: when it was finished, in UTC, ISO 8601.
        settings: how it was measured.
        missing: names of the cases that were not measured because the run was interrupted.
        noise: what other programs and the processor's pace did meanwhile; None in reports that do not say.
    """

    records: tuple[Record, ...]
    environment: dict[str, Any]
    ceilings: tuple[Ceiling, ...]
    baseline: str
    created: str
    settings: dict[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    noise: Noise | None = None

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def cases(self) -> list[Case]:
        """The cases that were measured."""
        return list(dict.fromkeys(record.case for record in self.records))

    @property
    def impls(self) -> list[str]:
        """The implementations that ran at least one case."""
        return list(dict.fromkeys(record.impl for record in self.records if record.status == "ran"))

    @property
    def wrong(self) -> list[Record]:
        """The records of results that are wrong."""
        return [record for record in self.records if record.correct is False]

    def of(self, case: Case) -> list[Record]:
        """Return the records of one case."""
        return [record for record in self.records if record.case == case]

    def verdict(self, record: Record) -> str:
        """Return `fastest`; `tied`, where several are; `right`; `WRONG`; or, of what did not run, its status."""
        if record.status != RAN:
            return record.status
        if not record.fastest:
            return "right" if record.correct else "WRONG"
        return "fastest" if sum(other.fastest for other in self.of(record.case)) == 1 else "tied"

    def standings(self) -> list[Standing]:
        """Return how each implementation that ran did over all cases, the one that is most often fastest first."""
        return sorted(map(self._standing, self.impls), key=lambda one: (-one.alone - one.tied, one.ratio or math.inf))

    def _standing(self, impl: str) -> Standing:
        ran = [record for record in self.records if record.impl == impl and record.status == RAN]
        verdicts = [self.verdict(record) for record in ran]
        bases = {record.case for record in self.records if record.impl == self.baseline and record.correct}
        logs = [math.log(record.ratio) for record in ran if record.correct and record.ratio and record.case in bases]
        return Standing(
            impl,
            alone=verdicts.count("fastest"),
            tied=verdicts.count("tied"),
            right=len(ran) - verdicts.count("WRONG"),
            ran=len(ran),
            ratio=math.exp(sum(logs) / len(logs)) if logs else None,
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return a flat mapping for each record, with the time of the report: for CSV and data frames."""
        return [
            {"created": self.created, "verdict": self.verdict(record), **record.as_row()} for record in self.records
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        return {
            "format": FORMAT,
            "created": self.created,
            "environment": self.environment,
            "settings": self.settings,
            "baseline": self.baseline,
            "ceilings": [asdict(ceiling) for ceiling in self.ceilings],
            "missing": list(self.missing),
            "noise": None if self.noise is None else asdict(self.noise),
            "records": [record.as_dict() for record in self.records],
        }

    @classmethod
    def from_dict(cls, given: Any, where: str = "report") -> Report:
        """Return the report that `as_dict` wrote.

        Raises:
            BenchError: it did not write that, or another version did.
        """
        if not isinstance(given, dict) or "format" not in given:
            raise BenchError(f"{where}: is not a report of attnplug bench")
        if given["format"] != FORMAT:
            raise BenchError(f"{where}: has format {given['format']!r}; this attnplug reads {FORMAT}")
        try:
            return cls(
                records=tuple(Record.from_dict(record) for record in given["records"]),
                ceilings=tuple(Ceiling(**ceiling) for ceiling in given["ceilings"]),
                missing=tuple(given["missing"]),
                noise=None if given.get("noise") is None else Noise(**given["noise"]),
                **{name: given[name] for name in ("environment", "baseline", "created", "settings")},
            )
        except (KeyError, TypeError, BenchError) as error:
            raise BenchError(f"{where}: is a damaged report: {error!r}") from error

    @classmethod
    def read(cls, path: str | Path) -> Report:
        """Read a report that was written as JSON.

        Raises:
            BenchError: the file cannot be read, or is not a report.
        """
        path = as_path("path", path)
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BenchError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from error
        return cls.from_dict(given, str(path))

    def lines(self) -> list[tuple[str, ...]]:
        """Return the cells of what ran, as the table has them."""
        return [row(record, self.verdict(record)) for record in self.records if record.status == RAN]

    def summary(self) -> str:
        """Return how each did over all cases, who did not run and why, what is wrong, the noise and the machine."""
        parts = [table(STANDING_HEADERS, list(map(standing_row, self.standings())))] if self.impls else []
        parts.append("\n".join(f"{impl} {where}: {reason}" for impl, where, reason in reasons(self.records)))
        parts.append("\n".join(self.conclusions()))
        return "\n\n".join(filter(None, parts))

    def conclusions(self) -> list[str]:
        """Return what the numbers must be read with, in sentences."""
        lines = []
        if self.settings.get("tiny"):
            lines.append(
                "Cases were shrunk to see that everything runs: the times mean nothing, and none is called the fastest."
            )
        if self.wrong:
            wrong = dict.fromkeys(record.impl for record in self.wrong)
            counts = ", ".join(f"{impl} in {sum(one.impl == impl for one in self.wrong)}" for impl in wrong)
            lines.append(f"WRONG results: {counts}.")
        if self.missing:
            lines.append(f"Interrupted: not measured are {', '.join(self.missing)}.")
        if self.noise is not None:
            lines.append(f"Noise: {self._again()}{self.noise}.")
        return [*lines, f"Machine: {machine(self.environment, self.ceilings)}"]

    def _again(self) -> str:
        shares = repeatability(self.records)
        if not shares:
            return ""
        return f"a time measured again differs by {shares[len(shares) // 2]:.0%}, at most by {shares[-1]:.0%}; "

    def __str__(self) -> str:
        return f"{table(*self._filled())}\n\n{self.summary()}"

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f"{html_table(*self._filled())}\n<pre>{escaped(self.summary())}</pre>"

    def _filled(self) -> tuple[list[str], list[list[str]]]:
        """Return headers and cells of the columns in which something is said."""
        lines = self.lines()
        shown = filled(lines)
        return [HEADERS[at] for at in shown], [[line[at] for at in shown] for line in lines]
