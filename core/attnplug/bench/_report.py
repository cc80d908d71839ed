"""All records of a run with what they mean nothing without: machine, ceilings, settings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attnplug._tables import table
from attnplug.bench._cases import Case
from attnplug.bench._ceilings import Ceiling
from attnplug.bench._errors import BenchError
from attnplug.bench._records import Record
from attnplug.bench._text import HEADERS, machine, reasons, rows

FORMAT = 1


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
    """

    records: tuple[Record, ...]
    environment: dict[str, Any]
    ceilings: tuple[Ceiling, ...]
    baseline: str
    created: str
    settings: dict[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

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

    def rows(self) -> list[dict[str, Any]]:
        """Return a flat mapping for each record, with the time of the report: for CSV and data frames."""
        return [{"created": self.created, **record.as_row()} for record in self.records]

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
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BenchError(f"{path}: cannot be read: {error}") from error
        return cls.from_dict(given, str(path))

    def summary(self) -> str:
        """Return who did not run and why, who was fastest, what is wrong, and the machine."""
        lines = [f"{impl} {where}: {reason}" for impl, where, reason in reasons(self.records)]
        lines += ["", *self.conclusions()]
        return "\n".join(lines).strip()

    def conclusions(self) -> list[str]:
        """Return the answer in sentences."""
        counts = Counter(record.impl for record in self.records if record.fastest)
        best = ", ".join(f"{impl} {count}" for impl, count in counts.most_common())
        lines = [f"Fastest, or level with the fastest, of {len(self.cases)} cases: {best or 'none'}."]
        if self.wrong:
            wrong = Counter(record.impl for record in self.wrong)
            lines.append("WRONG results: " + ", ".join(f"{impl} in {count}" for impl, count in wrong.items()) + ".")
        if self.missing:
            lines.append(f"Interrupted: not measured are {', '.join(self.missing)}.")
        return [*lines, machine(self.environment, self.ceilings)]

    def __str__(self) -> str:
        return f"{table(HEADERS, rows(self.records))}\n\n{self.summary()}"
