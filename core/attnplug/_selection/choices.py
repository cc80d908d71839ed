"""Measured choices as data: which implementation was the fastest right one, for which kind of call, and where.

A table is worth something only on the device and with the versions that it was measured on, so it says which; a file
may hold the tables of many machines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from attnplug._arguments import as_path
from attnplug._tables import html_table, table


class Kind(NamedTuple):
    """A kind of call. The last three are upper bounds, powers of two: 1024 stands for 513 to 1024.

    Attributes:
        dtype: of the query, such as `bfloat16`.
        head_size: of query and key.
        value_head_size: of value.
        group: how many query heads share one head of keys.
        features: sorted names of the `Feature`s that the call asks for.
        gradients: whether autograd records the call.
        batch_heads: sequences times query heads.
        queries: the length of a sequence of queries.
        keys: the length of a sequence of keys.
    """

    dtype: str
    head_size: int
    value_head_size: int
    group: int
    features: tuple[str, ...]
    gradients: bool
    batch_heads: int
    queries: int
    keys: int

    @property
    def problem(self) -> tuple[Any, ...]:
        """The kind without its sizes."""
        return self[:6]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The upper bounds of batch times heads, of queries and of keys."""
        return self[6:]

    def __str__(self) -> str:
        """Return such as `float32 D64 causal gradients, B·H ≤16, S ≤512x1024`."""
        length = str(self.queries) if self.queries == self.keys else f"{self.queries}x{self.keys}"
        return f"{describe_problem(self.problem)}, B·H ≤{self.batch_heads}, S ≤{length}"


def describe_problem(problem: tuple[Any, ...]) -> str:
    """Return a kind without its sizes, such as `float32 D64 causal gradients`."""
    dtype, head_size, value_head_size, group, features, gradients = problem
    size = f"D{head_size}" + (f"/{value_head_size}" if value_head_size != head_size else "")
    asked = [f"groups-of-{group}"] if group > 1 else []
    asked += [name.lower().replace("_", "-") for name in features if name not in _SAID]
    asked += ["gradients"] if gradients else []
    return " ".join([dtype, size, *asked])


_SAID = ("GQA", "VALUE_HEAD_SIZE")


def rounded_up(size: int) -> int:
    """Return the smallest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


@dataclass(frozen=True)
class Choice:
    """What was found for one kind of call.

    Attributes:
        kind: of call.
        impl: the fastest right implementation; within the noise, the earlier one in the default order.
        default: what runs without measured choices.
        seconds: of one call, forward and, with gradients, backward.
        default_seconds: the same of `default`.
        created: when it was measured, in UTC, ISO 8601.
    """

    kind: Kind
    impl: str
    default: str
    seconds: float
    default_seconds: float
    created: str = ""

    @property
    def gain(self) -> float:
        """How many times faster than the default; 1 where that is what was chosen."""
        return self.default_seconds / self.seconds if self.impl != self.default else 1.0


@dataclass(frozen=True)
class Table:
    """The choices of one device with one set of versions.

    Attributes:
        device: its name, such as `NVIDIA H100 80GB HBM3`.
        capability: such as `9.0`, or of a CPU its vector instructions.
        versions: of torch, cuda, cudnn and triton, and of each distribution whose implementations were measured.
        choices: one for each kind of call.
    """

    device: str
    capability: str
    versions: Mapping[str, str | None]
    choices: tuple[Choice, ...] = ()

    @property
    def place(self) -> tuple[Any, ...]:
        """What two tables must have in common to be one."""
        return self.device, self.capability, tuple(sorted(self.versions.items()))

    def merged(self, other: Table) -> Table:
        """Return the choices of both; of one kind, those measured last."""
        choices = sorted((*self.choices, *other.choices), key=lambda choice: choice.created)
        return replace(self, choices=tuple({choice.kind: choice for choice in choices}.values()))


@dataclass(frozen=True)
class Choices:
    """Measured choices; `str()` is a table, iteration gives each `Choice`.

    `first | second` holds what both hold; of one kind of call on one machine, what was measured last.

    Attributes:
        tables: one for each device and set of versions.
        notes: what is worth knowing of the measurement, in sentences; not saved.
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

        return read(default_place() if path is None else as_path("path", path))

    def save(self, path: str | Path | None = None) -> Path:
        """Add these choices to a file, and return its path.

        What the file holds already stays, but for kinds of calls that were measured again. Several processes may save
        to one file at once; who reads it meanwhile finds it whole.

        Args:
            path: of the file, whose folder is made; by default `choices.json` in this user's cache folder.

        Raises:
            ChoicesError: it cannot be written, or what is there holds no choices.
        """
        from attnplug._selection.choice_files import add, default_place

        return add(self, default_place() if path is None else as_path("path", path))

    def __or__(self, other: Choices) -> Choices:
        if not isinstance(other, Choices):
            return NotImplemented
        tables = {one.place: one for one in self.tables}
        for one in other.tables:
            known = tables.get(one.place)
            tables[one.place] = one if known is None else known.merged(one)
        return replace(self, tables=tuple(tables.values()))

    def __iter__(self) -> Iterator[Choice]:
        return (choice for one in self.tables for choice in one.choices)

    def __len__(self) -> int:
        return sum(len(one.choices) for one in self.tables)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        parts = [html_table(HEADERS, rows(one.choices), caption=described(one)) for one in self.tables]
        return "\n".join([*parts, *(f"<p>{escape(note)}</p>" for note in self.notes)] or ["no measured choices"])

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
