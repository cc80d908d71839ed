"""Tables as text and as HTML: what `str()` of a report gives, what a notebook shows, what the command line prints.

No word is ever cut: a table that is too wide loses the columns that it can do without, then wraps its last column
between words, beside the others or below them, and where even they do not fit it becomes a list.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 80
"""Of what `repr()` and `str()` show, in columns."""

_GAP = "  "
_INDENT = "    "
_LAST = 20
"""The least width of a last column that is wrapped."""

Rows = Sequence[Sequence[str]]


def table(headers: Sequence[str], rows: Rows, width: int | None = None, expendable: Sequence[str] = ()) -> str:
    """Return left-aligned columns under `headers`.

    Args:
        headers: of the columns.
        rows: the cells.
        width: that no line exceeds; by default each row is one line, however long.
        expendable: headers of the columns that a narrow table does without, the first one first.
    """
    shown = range(len(headers)) if width is None else fitting(headers, rows, width, expendable)
    lines = [[line[column] for column in shown] for line in (headers, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(shown))]
    if width is None:
        return "\n".join(_aligned(line, widths) for line in lines)
    if sum(widths[:-1]) + len(_GAP) * (len(widths) - 2) > width:
        return "\n".join(_listed(lines[0], line, width) for line in lines[1:])
    return "\n".join(part for line in lines for part in _row(line, widths, width))


def fitting(headers: Sequence[str], rows: Rows, width: int, expendable: Sequence[str]) -> list[int]:
    """Return the columns that fit into `width` beside a last one of which at least `_LAST` is seen."""
    needed = [max(len(line[column]) for line in (headers, *rows)) for column in range(len(headers))]
    needed[-1] = min(needed[-1], _LAST)
    shown = list(range(len(headers)))
    for header in expendable:
        if sum(needed[column] + len(_GAP) for column in shown) - len(_GAP) <= width:
            break
        shown.remove(headers.index(header))
    return shown


def html_table(headers: Sequence[str], rows: Rows, *, strong: Iterable[int] = (), caption: str = "") -> str:
    """Return a table for a notebook, with every text escaped; the rows numbered in `strong` stand out."""
    chosen = set(strong)
    lines = ["<table>"]
    if caption:
        lines.append(f'<caption style="caption-side: bottom; text-align: left">{escaped(caption)}</caption>')
    lines.append(f"<thead><tr>{''.join(_cell('th', header) for header in headers)}</tr></thead>\n<tbody>")
    for number, row in enumerate(rows):
        weight = ' style="font-weight: bold"' if number in chosen else ""
        lines.append(f"<tr{weight}>{''.join(_cell('td', cell) for cell in row)}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _cell(tag: str, text: str) -> str:
    return f'<{tag} style="text-align: left">{escaped(text)}</{tag}>'


def escaped(text: str) -> str:
    """Return a text for HTML."""
    from html import escape  # whose list of entities takes a millisecond

    return escape(text)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    return _GAP.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _row(cells: Sequence[str], widths: Sequence[int], width: int) -> list[str]:
    """Return the lines of a row, the last cell's words spread over them; below the others where they do not fit."""
    start = sum(widths[:-1]) + len(_GAP) * (len(widths) - 1)
    first = _GAP.join(cell.ljust(space) for cell, space in zip(cells[:-1], widths[:-1], strict=True))
    last = cells[-1]
    if width - start < min(_LAST, len(last)) or max(map(len, last.split()), default=0) > width - start:
        return [first.rstrip(), *wrap(last, width, _INDENT, _INDENT)]
    parts = wrap(last, width - start) or [""]
    return [f"{first}{_GAP if len(cells) > 1 else ''}{parts[0]}".rstrip(), *(" " * start + part for part in parts[1:])]


def _listed(headers: Sequence[str], cells: Sequence[str], width: int) -> str:
    """Return a row as its first cell, and below it a line or more for each of the others that says something."""
    lines = [cells[0]]
    for header, cell in zip(headers[1:], cells[1:], strict=True):
        if cell:
            lines += wrap(f"{header}: {cell}" if header else cell, width, "  ", "    ")
    return "\n".join(lines)


def wrap(text: str, width: int, first: str = "", others: str = "") -> list[str]:
    """Return the lines of `text`, broken between words alone, with an indent for the first and one for the others."""
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )
