"""Choices as a measurement would have given them, without one; and put to use for a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attnplug
from attnplug.bench import Case, Record, Timing
from attnplug.tuning import choices_from


def records(case: Case, seconds: dict[str, float], spread: float = 0.0, wrong: tuple[str, ...] = ()) -> list[Record]:
    """Return what was found about a case: so many seconds for each implementation, half of `spread` either way."""
    return [
        Record(
            case,
            impl,
            "ran",
            correct=impl not in wrong,
            forward=Timing(each, each - spread / 2, each + spread / 2, 9),
            backward=Timing(each, each, each, 9) if case.backward else None,
        )
        for impl, each in seconds.items()
    ]


def fastest(*found: tuple[Case, str]) -> attnplug.Choices:
    """Return the choices of a measurement in which, for each case, this implementation took half of torch's time."""
    return choices_from([one for case, impl in found for one in records(case, {"torch": 2.0, impl: 1.0})])


@contextmanager
def in_use(choices: attnplug.Choices | str | Path) -> Iterator[None]:
    attnplug.use_choices(choices)
    try:
        yield
    finally:
        attnplug.restore_choices()
