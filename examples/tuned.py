"""What the examples share: a program timed with and without measured choices, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import attnplug

TURNS = 15


def with_and_without(choices: attnplug.Choices, seconds: Callable[[], float]) -> tuple[float, float]:
    """Time a program with choices in use and without, one after the other, so that a slow machine slows both.

    Args:
        choices: what `attnplug.tune` found.
        seconds: runs the program once, and returns how long that took.

    Returns:
        The median of the seconds with choices in use, and how many times as fast that is as without.
    """
    taken: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(TURNS):
        for in_use in (turn % 2 == 0, turn % 2 == 1):
            if in_use:
                attnplug.use_choices(choices)
            seconds()  # decides, and warms the caches
            taken[in_use].append(seconds())
            if in_use:
                attnplug.restore_choices()
    ratios = [without / tuned for without, tuned in zip(taken[False], taken[True], strict=True)]
    return statistics.median(taken[True]), statistics.median(ratios)


def chosen(choices: attnplug.Choices) -> str:
    """Say what was chosen for which calls."""
    return "; ".join(f"{choice.impl} for {choice.kind}" for choice in choices)
