"""Measured choices, saved and shown: what `tune`, `bench --save-choices` and `list --choices` share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attnplug.cli import render

if TYPE_CHECKING:
    from attnplug import Choices


def save(choices: Choices, place: Path) -> None:
    """Save choices; if that fails after all, they are printed, since measuring them took long."""
    from attnplug import ChoicesError
    from attnplug._selection.choice_files import as_plain

    try:
        choices.save(place)
    except ChoicesError:
        render.print_json(as_plain(choices.tables, choices.notes))
        raise


def counted(choices: Choices) -> str:
    """Return how many choices there are, in words."""
    return f"{len(choices)} choice{'' if len(choices) == 1 else 's'}"


def show(choices: Choices) -> None:
    """Print a table for each machine, and the notes."""
    from attnplug._selection.choices import HEADERS, described, rows

    for one in choices.tables:
        render.put(described(one))
        render.print_table(HEADERS, rows(one.choices), HEADERS.index("is now"))
        render.put()
    for note in choices.notes or (() if choices.tables else ("Nothing was measured.",)):
        render.put(note)
