"""Cases that a program was seen to call, with how often; saved and read as JSON."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from attnplug._arguments import as_path
from attnplug._tables import html_table, table
from attnplug.bench._cases import Case
from attnplug.bench._errors import BenchError

FORMAT = 1


class Cases(Counter[Case]):
    """Distinct cases and how often each was called: a `collections.Counter`, whose iteration gives the cases.

    `str()` is a table. `update` adds another capture.

    Attributes:
        left_out: calls that no case describes: how many, for each reason.

    Examples:
        >>> from attnplug.bench import Case, Cases
        >>> cases = Cases([Case(heads=2, queries=16, head_size=8)] * 3)
        >>> [(case.name, count) for case, count in cases.items()]
        [('B1 H2 S16 D8 float32', 3)]
    """

    def __init__(self, cases: Any = (), /) -> None:
        self.left_out: Counter[str] = Counter(cases.left_out if isinstance(cases, Cases) else ())
        super().__init__(cases)

    def update(self, cases: Any = (), /, **counts: int) -> None:
        """Add cases, or the counts of another capture."""
        super().update(cases, **counts)
        if isinstance(cases, Cases) and hasattr(self, "left_out"):
            self.left_out.update(cases.left_out)

    def save(self, path: str | Path) -> Path:
        """Write the cases to a `.json` file, which `attnplug bench --cases` and `attnplug tune --capture` read.

        Args:
            path: of the file, which is overwritten.

        Raises:
            BenchError: the name does not end in `.json`, or the file cannot be written.
        """
        path = as_path("path", path)
        if path.suffix.lower() != ".json":
            raise BenchError(f"{path}: expected a name that ends in .json")
        listed = [{**case.as_dict(), "count": count} for case, count in self.items()]
        given = {"format": FORMAT, "cases": listed, "left_out": dict(self.left_out)}
        try:
            path.write_text(json.dumps(given, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise BenchError(f"{path}: cannot be written: {error.strerror}") from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> Cases:
        """Read cases that were saved.

        Raises:
            BenchError: the file cannot be read, or holds no cases in a format that this version reads.
        """
        path = as_path("path", path)
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BenchError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from error
        if not isinstance(given, dict) or not isinstance(given.get("cases"), list) or "format" not in given:
            raise BenchError(f"{path}: holds no captured cases; attnplug.capture() and save() make such files")
        if given["format"] != FORMAT:
            raise BenchError(f"{path}: has format {given['format']!r}; this attnplug reads {FORMAT}; capture again")
        cases = cls()
        for number, each in enumerate(given["cases"], 1):
            where = f"{path}: case {number}"
            count = each.get("count", 1) if isinstance(each, dict) else 1
            if type(count) is not int or count < 1:
                raise BenchError(f"{where}: count: expected a number from 1 on, got {count!r}")
            fields = (
                {name: value for name, value in each.items() if name != "count"} if isinstance(each, dict) else each
            )
            cases[Case.from_dict(fields, where)] += count
        cases.left_out.update(dict(given.get("left_out", {})))
        return cases

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        rows = [(str(count), case.name) for case, count in self.items()]
        left_out = "; ".join(f"left out, {count} calls: {reason}" for reason, count in self.left_out.items())
        return html_table(("calls", "case"), rows, caption=left_out)

    def __str__(self) -> str:
        shown = [table(("calls", "case"), [(str(count), case.name) for case, count in self.items()])] if self else []
        shown += [f"left out, {count} calls: {reason}" for reason, count in self.left_out.items()]
        return "\n".join(shown) or "no calls"
