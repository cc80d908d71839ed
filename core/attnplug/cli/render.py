"""How reports look, decided in one place: rich tables on a terminal, plain text in a pipe.

Without `rich` (the extra `attnplug[cli]`) a terminal gets the plain text too. While a command runs, only what goes
through here reaches stdout: a plugin that prints when it is imported prints to stderr, and `--json` can be read.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from attnplug import SDPBackend
from attnplug._tables import table

_GAP = "  "
_LAST = 30
_STYLES = {
    "available": "green",
    "runs": "bold green",
    "could": "cyan",
    "unavailable": "yellow",
    "no": "yellow",
    "broken": "bold red",
    "passed": "green",
    "failed": "bold red",
    "declined": "yellow",
    "not applicable": "dim",
}


_out: TextIO | None = None


@contextmanager
def only_reports_on_stdout() -> Iterator[None]:
    """Send whatever else is printed to stderr."""
    global _out
    before, _out = _out, sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _out = before


def out() -> TextIO:
    """Return where reports go, for a `rich.console.Console`."""
    return sys.stdout if _out is None else _out


def put(text: object = "") -> None:
    """Print a part of a report."""
    print(text, file=out())


def family(backend: SDPBackend | None) -> str:
    """Return the name of a family, or a dash for what belongs to none. (MATH is 0, hence false.)"""
    return "-" if backend is None else backend.name


def print_json(value: Any) -> None:
    """Print `value` as JSON; anything but JSON's own types is a mistake."""
    put(json.dumps(value, indent=2))


def print_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], status: int, expendable: Sequence[str] = ()
) -> None:
    """Print a table; a pipe gets all of it, one line a row.

    Args:
        headers: of the columns.
        rows: the cells.
        status: the column that colours are for.
        expendable: headers of the columns that a narrow terminal does without, the first one first; the
            command has a `--verbose` that shows them.
    """
    if out().isatty() and importlib.util.find_spec("rich") is not None:
        _print_rich(headers, rows, status, expendable)
    else:
        put(table(headers, rows))


def _print_rich(headers: Sequence[str], rows: Sequence[Sequence[str]], status: int, expendable: Sequence[str]) -> None:
    """Print a table as wide as the terminal, its last column wrapped. `Text` is not read as markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=out())
    shown = fitting(headers, rows, console.width, expendable)
    grid = Table(box=None, pad_edge=False, padding=(0, len(_GAP), 0, 0), header_style="bold")
    for position in shown:
        grid.add_column(headers[position], no_wrap=position != shown[-1], overflow="fold")
    for row in rows:
        grid.add_row(*(Text(row[at], _STYLES.get(row[at], "") if at == status else "") for at in shown))
    console.print(grid)
    missing = [header for position, header in enumerate(headers) if position not in shown]
    if missing:
        console.print(Text(f"\nNot shown for want of width: {', '.join(missing)}; --verbose shows all."))


def fitting(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int, expendable: Sequence[str]) -> list[int]:
    """Return the columns that fit into `width` beside a last one of which at least `_LAST` is seen."""
    needed = [max(len(line[column]) for line in (headers, *rows)) for column in range(len(headers))]
    needed[-1] = min(needed[-1], _LAST)
    shown = list(range(len(headers)))
    for header in expendable:
        if sum(needed[column] + len(_GAP) for column in shown) <= width:
            break
        shown.remove(headers.index(header))
    return shown
