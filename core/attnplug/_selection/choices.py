"""Measured choices, as a program holds them: the tables of one or many machines, loaded, saved and shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from attnplug._arguments import as_path
from attnplug._selection.choice_tables import Choice, Table, joined
from attnplug._tables import escaped, html_table, table


@dataclass(frozen=True)
class Choices:
    """Measured choices; `str()` is a table, iteration gives each `Choice`.

    `first | second` has the choices of both; of one kind of call on one machine, the one measured last.

    Attributes:
        tables: one for each device and set of versions.
        notes: remarks on the measurement, in sentences; a file has those of the one that was saved last.
        source: the file that they came from, if any.
    """

    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)
    source: str = field(default="", compare=False)

    @classmethod
    def load(cls, path: str | Path | None = None) -> Choices:
        """Read choices that were saved.

        Args:
            path: of the file; by default this user's, which `attnplug tune` writes.

        Raises:
            ChoicesError: there is no such file, it cannot be read, or it holds no choices in a format that this version
                reads.
        """
        from attnplug._selection.choice_files import default_place, read

        place = default_place() if path is None else as_path("path", path)
        return cls(*read(place), source=str(place))

    def save(self, path: str | Path | None = None) -> Path:
        """Add these choices to a file, and return its path.

        The file keeps what it has, except for kinds of calls that were measured again, and the notes. Several
        processes may save to one file at once; a concurrent reader sees a complete file.

        Args:
            path: of the file, whose folder is made; by default `choices.json` in this user's cache folder.

        Raises:
            ChoicesError: it cannot be written, or what is there holds no choices.
        """
        from attnplug._selection.choice_files import add, default_place

        return add(self.tables, self.notes, default_place() if path is None else as_path("path", path))

    def __or__(self, other: Choices) -> Choices:
        if not isinstance(other, Choices):
            return NotImplemented
        return replace(self, tables=joined((*self.tables, *other.tables)))

    def __iter__(self) -> Iterator[Choice]:
        return (choice for one in self.tables for choice in one.choices)

    def __len__(self) -> int:
        return sum(len(one.choices) for one in self.tables)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        parts = [html_table(HEADERS, rows(one.choices), caption=described(one)) for one in self.tables]
        return "\n".join([*parts, *(f"<p>{escaped(note)}</p>" for note in self.notes)] or ["no measured choices"])

    def __str__(self) -> str:
        parts = [f"{described(one)}:\n{table(HEADERS, rows(one.choices))}" for one in self.tables]
        return "\n\n".join([*parts, *self.notes] or ["no measured choices"])


HEADERS = ("kind of call", "was", "is now", "gain")


def rows(choices: Iterable[Choice]) -> list[tuple[str, str, str, str]]:
    """Return the cells of a table."""
    return [(str(one.kind), one.default, one.impl, f"{one.gain:.2f}" if one.gain != 1 else "-") for one in choices]


def described(one: Table) -> str:
    """Return where a table holds, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in one.versions.items() if version)
    return f"{one.device} ({one.capability}), {versions}"
