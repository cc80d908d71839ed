"""Causal masks and windows, at every edge, in both alignments."""

from __future__ import annotations

from typing import Any

from attnplug import Feature
from attnplug.testing._checks import check
from attnplug.testing._subject import Subject

UNEQUAL = [(13, 40), (40, 13), (113, 203), (1, 70), (70, 1), (65, 64)]
WINDOWS = [(0, 0), (1, 0), (0, 1), (3, 5), (-1, 0), (-1, 4), (4, -1), (15, 16), (16, 0), (31, 31), (63, 64), (500, 500)]


@check(Feature.CAUSAL, every_dtype=True)
def check_causal(subject: Subject) -> None:
    """With as many keys as queries, query i sees the keys up to i, itself included."""
    lse = subject.has(Feature.LSE)
    for length in (1, 2, 16, 17, 64, 130):
        subject.compare(subject.call(queries=length, keys=length, heads=1, is_causal=True, lse=lse))


@check(Feature.CAUSAL, gradients=True)
def check_causal_gradients(subject: Subject) -> None:
    """Gradients flow to visible keys only."""
    for length in (16, 17, 70):
        subject.compare(subject.call(queries=length, keys=length, is_causal=True, gradients=subject.gradients))


@check(Feature.CAUSAL, Feature.UPPER_LEFT)
def check_causal_upper_left(subject: Subject) -> None:
    """With unequal lengths and UPPER_LEFT, query i sees the keys j <= i."""
    _unequal(subject, is_causal=True, causal_variant="UPPER_LEFT")


@check(Feature.CAUSAL, Feature.LOWER_RIGHT)
def check_causal_lower_right(subject: Subject) -> None:
    """With unequal lengths and LOWER_RIGHT, query i sees the keys j <= i + Sk - Sq."""
    _unequal(subject, is_causal=True, causal_variant="LOWER_RIGHT")


def _unequal(subject: Subject, **fields: Any) -> None:
    for queries, keys in UNEQUAL:
        subject.compare(subject.call(queries=queries, keys=keys, heads=1, lse=subject.has(Feature.LSE), **fields))
    if subject.gradients:
        for queries, keys in UNEQUAL[:3]:
            subject.compare(subject.call(queries=queries, keys=keys, heads=1, gradients=subject.gradients, **fields))


@check(Feature.WINDOW)
def check_window(subject: Subject) -> None:
    """Query i sees the keys from i - left to i + right, both included; -1 leaves a side open."""
    for window in WINDOWS:
        subject.compare(subject.call(queries=70, keys=70, heads=1, window_size=window))
    for window in ((5, 3), (0, 0), (17, -1), (-1, 16)):
        if subject.has(Feature.LSE):
            subject.compare(subject.call(window_size=window, lse=True))


@check(Feature.WINDOW, gradients=True)
def check_window_gradients(subject: Subject) -> None:
    """Gradients flow to keys inside the window only."""
    for window in ((5, 3), (16, 0), (0, 16), (-1, 2)):
        subject.compare(subject.call(queries=70, keys=70, window_size=window, gradients=subject.gradients))


@check(Feature.WINDOW, Feature.UPPER_LEFT)
def check_window_upper_left(subject: Subject) -> None:
    """With unequal lengths and UPPER_LEFT, a window is counted from key i."""
    _unequal(subject, window_size=(9, 4), causal_variant="UPPER_LEFT")


@check(Feature.WINDOW, Feature.LOWER_RIGHT)
def check_window_lower_right(subject: Subject) -> None:
    """With unequal lengths and LOWER_RIGHT, a window is counted from key i + Sk - Sq."""
    _unequal(subject, window_size=(9, 4), causal_variant="LOWER_RIGHT")


@check(Feature.WINDOW, Feature.CAUSAL)
def check_causal_window(subject: Subject) -> None:
    """A causal mask closes a window's right side, whatever it says."""
    for window in ((8, 5), (16, -1), (-1, 3), (0, 0)):
        subject.compare(subject.call(queries=70, keys=70, is_causal=True, window_size=window))
