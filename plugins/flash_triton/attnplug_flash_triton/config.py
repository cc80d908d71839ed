"""Which tiles a kernel works on: a table for each architecture, so that nothing is timed at a user's first call.

The tables are files in `tables/`, `sm_90.json` for instance; where there is one for the Triton release at work,
`sm_90-triton3.6.json`, it goes before, because the best number of warps may differ between releases
(https://github.com/triton-lang/triton/issues/11373). `attnplug_flash_triton.tune` measures and writes them, and
`attnplug_flash_triton.cost` says what their entries cost in registers and memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import triton


class Tiles(NamedTuple):
    """The size of a program's tiles, its warps, and how many tiles are loaded ahead."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Cell(NamedTuple):
    """What one entry of a table is for."""

    kernel: str
    precision: str
    head_size: int
    logits: str

    def __str__(self) -> str:
        return ", ".join(map(str, self))


FORWARD, FEW_ROWS = "forward", "few rows"
QUERY, KEYS, MASK = "query gradient", "key and value gradients", "mask gradient"
KERNELS = (FORWARD, FEW_ROWS, QUERY, KEYS, MASK)
FEW = 16
"""Rows (queries, times the query heads that share a head of keys) up to which a call counts as one of few rows."""

HALF, SINGLE, TF32 = "half", "float32", "tf32"
"""Float16 and bfloat16; float32 with IEEE products; float32 where PyTorch allows TF32."""

SIZES = (64, 128, 256)
"""Classes of head sizes: the larger one of query and value, rounded up."""

PLAIN, EXTRA = "plain", "extra"
"""Whether there is more to the logits than products: a mask, softcap, ALiBi or dropout, which need registers."""

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
INTERPRETER = "interpreter"
SHARED_MEMORY = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes that one program may use. sm_80 stands for the GPUs from 8.0 on, of which the smallest have 99 KiB."""

ACCEPTED = dict(
    block_m=(16, 32, 64, 128, 256),
    block_n=(16, 32, 64, 128, 256),
    num_warps=(1, 2, 4, 8, 16),
    num_stages=tuple(range(1, 9)),
)
FOLDER = Path(__file__).parent / "tables"


def cells() -> Iterator[Cell]:
    """Yield every entry that a table has."""
    for kernel in KERNELS:
        for precision in (HALF, SINGLE, TF32):
            for size in SIZES:
                for logits in (PLAIN, EXTRA) if kernel != MASK else (EXTRA,):
                    yield Cell(kernel, precision, size, logits)


@dataclass(frozen=True)
class Table:
    """The tiles of every kernel on one architecture.

    Attributes:
        measured: the GPU and the Triton release on which these were the fastest; empty if nobody has timed them.
        spilling: why entries whose registers spill are in the table: what they took, and others that do not spill.
    """

    architecture: str
    tiles: Mapping[Cell, Tiles]
    measured: str = ""
    spilling: Mapping[Cell, str] = field(default_factory=dict)

    def choose(self, kernel: str, precision: str, head_size: int, extra: bool) -> Tiles:
        """Return the tiles of one kernel.

        Args:
            kernel: one of `KERNELS`.
            precision: `HALF`, `SINGLE` or `TF32`.
            head_size: the larger one of query and value.
            extra: whether there is more to the logits than products; see `EXTRA`.
        """
        size = next(limit for limit in SIZES if head_size <= limit)
        return self.tiles[Cell(kernel, precision, size, EXTRA if extra else PLAIN)]

    def but(self, cell: Cell, tiles: Tiles, spilling: str = "") -> Table:
        """Return this table with one entry changed."""
        reasons = {other: reason for other, reason in self.spilling.items() if other != cell}
        return replace(
            self, tiles={**self.tiles, cell: tiles}, spilling={**reasons, cell: spilling} if spilling else reasons
        )

    @classmethod
    def uniform(cls, architecture: str, tiles: Tiles) -> Table:
        """Return a table with the same tiles everywhere."""
        return cls(architecture, dict.fromkeys(cells(), tiles))

    @classmethod
    def read(cls, path: Path) -> Table:
        """Return the table in a file.

        Raises:
            ValueError: it is not one: says which entry is missing, unknown or out of range, and what is accepted.
        """
        try:
            content = json.loads(path.read_text())
            entries, architecture, measured = (content[name] for name in ("tiles", "architecture", "measured"))
            spilling = dict(content.get("spilling", {}))
        except (OSError, TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a table of tiles: {type(error).__name__}: {error}") from error
        if architecture not in (*ARCHITECTURES, INTERPRETER):
            accepted = ", ".join((*ARCHITECTURES, INTERPRETER))
            raise ValueError(f"{path}: architecture {architecture!r} is not one of {accepted}")
        wanted = {str(cell): cell for cell in cells()}
        for problem, names in (
            ("missing", wanted.keys() - entries.keys()),
            ("unknown", (entries.keys() | spilling.keys()) - wanted.keys()),
        ):
            if names:
                raise ValueError(f"{path}: {problem}: {'; '.join(sorted(names))}")
        tiles = {cell: _tiles(path, name, entries[name]) for name, cell in wanted.items()}
        return cls(architecture, tiles, measured, {wanted[name]: reason for name, reason in spilling.items()})

    def write(self, path: Path) -> None:
        """Write the table so that `read` finds it, one entry on a line."""
        tiles = {str(cell): self.tiles[cell]._asdict() for cell in cells()}
        spilling = {str(cell): self.spilling[cell] for cell in cells() if cell in self.spilling}
        head = f'  "architecture": {json.dumps(self.architecture)},\n  "measured": {json.dumps(self.measured)},\n'
        path.write_text("{\n" + head + f'  "spilling": {_lines(spilling)},\n  "tiles": {_lines(tiles)}\n' + "}\n")


def _lines(entries: Mapping[str, Any]) -> str:
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
    return "{\n" + lines + "\n  }" if lines else "{}"


def _tiles(path: Path, name: str, entry: Any) -> Tiles:
    if not isinstance(entry, dict) or set(entry) != set(Tiles._fields):
        raise ValueError(f"{path}: {name}: expected {', '.join(Tiles._fields)}, got {entry!r}")
    tiles = Tiles(**entry)
    for each, accepted in ACCEPTED.items():
        value = getattr(tiles, each)
        if value not in accepted:
            raise ValueError(f"{path}: {name}: {each} {value!r} is not one of {', '.join(map(str, accepted))}")
    return tiles


def release() -> str:
    """Return the release of Triton, such as 3.6."""
    return ".".join(triton.__version__.split(".")[:2])


def path_of(architecture: str) -> Path:
    """Return the file with the tiles of an architecture: the one for this release of Triton, if there is one."""
    own = FOLDER / f"{architecture}-triton{release()}.json"
    return own if own.exists() else FOLDER / f"{architecture}.json"


def _given() -> dict[str, Table]:
    """Return the table that `FLASH_TRITON_TABLE` names, by its architecture."""
    path = os.environ.get("FLASH_TRITON_TABLE")
    if not path:
        return {}
    try:
        table = Table.read(Path(path))
    except ValueError as error:
        raise ValueError(f"FLASH_TRITON_TABLE: {error}") from error
    return {table.architecture: table}


_in_use = _given()
_changes = 0


def table_of(architecture: str) -> Table:
    """Return the table in use for an architecture, which is read when first asked for."""
    if architecture not in _in_use:
        # Large tiles make few programs, and what the interpreter takes its time for is every operation of each.
        in_interpreter = architecture == INTERPRETER
        _in_use[architecture] = (
            Table.uniform(INTERPRETER, Tiles(64, 64, 1, 1)) if in_interpreter else Table.read(path_of(architecture))
        )
    return _in_use[architecture]


def version() -> int:
    """Return a number that changes whenever another table comes into use."""
    return _changes


def use(table: Table) -> Table:
    """Put a table in the place of the one in use for its architecture, and return that one."""
    global _changes
    _changes += 1
    before = table_of(table.architecture)
    _in_use[table.architecture] = table
    return before
