"""How reports look, decided in one place: tables as wide as a terminal, a line a row in a pipe.

With `rich` (the extra `attnplug[cli]`) a terminal gets colours. While a command runs, only what goes through here
reaches stdout: a plugin that prints when it is imported prints to stderr, and `--json` can be read.
"""

from __future__ import annotations

import codecs
import errno
import importlib.util
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import Any, TextIO

from attnplug._tables import fitting, table, wrap

FORMAT = 1
"""The number that all JSON of the command line has as `format`; a later one means that a field has changed."""

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
_ROW = re.compile(r"\S.*(?:\n .*)*")
"""A row of a table that is laid out: its first line, and those below that are indented."""

_PLAIN = {"·": "*", "≤": "<=", "µ": "u"}
"""What stands for signs of reports where stdout has another encoding than UTF-8."""

_Instead = tuple[str | bytes, int]

_out: TextIO | None = None


class Unwritable(Exception):
    """Stdout is closed or full."""


@contextmanager
def checked_stdout() -> Iterator[None]:
    """Raise `Unwritable` where what is printed cannot be written; a reader that has left has read enough.

    What is left in the buffer is thrown away, so that the interpreter does not complain when it ends.
    """
    if sys.stdout is None:
        raise Unwritable("stdout is closed")
    try:
        try:
            with _in_any_encoding(sys.stdout):
                yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        if not _is_of_stdout(error):
            raise
        _discard()
        if isinstance(error, BrokenPipeError):
            return
        raise Unwritable(f"stdout cannot be written: {error.strerror}") from error


@contextmanager
def _in_any_encoding(stream: TextIO) -> Iterator[None]:
    """Write what the encoding of `stream` lacks in plain letters: a report is not lost for a sign in it."""
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    before = stream.errors or "strict"
    codecs.register_error("attnplug", partial(_plainly, codecs.lookup_error(before)))
    try:
        stream.reconfigure(errors="attnplug")
    except OSError:  # the file below was exchanged for one that cannot seek; it is written as its encoding has it
        yield
        return
    try:
        yield
    finally:
        stream.reconfigure(errors=before)


def _plainly(handle: Callable[[UnicodeError], _Instead], error: UnicodeError) -> _Instead:
    try:
        return handle(error)  # in the locale C, that of bytes which are no text and must stay what they are
    except UnicodeEncodeError:
        assert isinstance(error, UnicodeEncodeError)
        return "".join(_PLAIN.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


def _is_of_stdout(error: OSError) -> bool:
    """Whether an error came from writing: one that concerns a file has its name."""
    return error.filename is None and error.errno in (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF)


def _discard() -> None:
    """Let stdout lead nowhere from now on."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, io.UnsupportedOperation):  # what stands for it in a notebook or a test has no number
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, open until the interpreter ends


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
    """Print a part of a report. A reader that has left, as `head` does, has read enough: the rest goes nowhere."""
    try:
        print(text, file=out(), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out().fileno())


def width(most: int) -> int:
    """Return in how many columns text is wrapped: the terminal's, but `most` where it has more, and in a pipe."""
    columns = _columns()
    return most if columns is None else min(most, columns)


def _columns() -> int | None:
    """Return the width of the terminal; None in a pipe."""
    return shutil.get_terminal_size().columns if out().isatty() else None


def put_prose(*sentences: str) -> None:
    """Print sentences below a table, each on a line of its own that a terminal's width wraps between words."""
    columns = _columns()
    lines = [line for text in sentences for line in ([text] if columns is None else wrap(text, columns))]
    put("\n".join(["", *lines]))


def print_json(fields: Mapping[str, Any]) -> None:
    """Print an object as JSON, with the number of its format; anything but JSON's own types is a mistake."""
    put(json.dumps({"format": FORMAT, **fields}, indent=2))


def print_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], status: int, expendable: Sequence[str] = ()
) -> None:
    """Print a table, as wide as the terminal; a pipe gets all of it, one line a row.

    Args:
        headers: of the columns.
        rows: the cells.
        status: the column that colours are for.
        expendable: headers of the columns that a narrow terminal does without, the first one first; the
            command has a `--verbose` that shows them.
    """
    columns = _columns()
    if columns is None:
        put(table(headers, rows))
        return
    shown = fitting(headers, rows, columns, expendable)
    text = table(headers, rows, columns, expendable)
    if importlib.util.find_spec("rich") is None:
        put(text)
    else:
        _print_rich(text, [row[status] for row in rows])
    missing = [header for position, header in enumerate(headers) if position not in shown]
    if missing:
        put_prose(f"Not shown for want of width: {', '.join(missing)}; --verbose shows all.")


def _print_rich(text: str, statuses: Sequence[str]) -> None:
    """Print a table that is laid out already with its headers bold and each row's status in its colour."""
    from rich.console import Console
    from rich.text import Text

    styled = Text(text)
    styled.stylize("bold", 0, text.index("\n"))
    for status, row in zip(statuses, _ROW.finditer(text, text.index("\n") + 1), strict=False):
        found = re.search(rf"(?<=\s){re.escape(status)}(?=\s|$)", row[0]) if status else None
        if found is not None:
            styled.stylize(_STYLES.get(status, ""), row.start() + found.start(), row.start() + found.end())
    Console(file=out()).print(styled, soft_wrap=True)


def put_status(text: str) -> None:
    """Show what was just done on stderr, in the place of what was shown before, if that is a terminal that can."""
    if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):  # as `rich` decides it
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """Show a bar on stderr while it works, if that is a terminal and `rich` is there."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(24),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1)
        yield lambda step, done, total: bar.update(task, description=step, completed=done, total=total)
