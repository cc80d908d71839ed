"""Causal masks and windows, at every edge, in both alignments."""

from __future__ import annotations

import itertools
from typing import Any

from attnplug import Feature
from attnplug.testing._checks import check
from attnplug.testing._subject import Subject

UNEQUAL = [(13, 40), (40, 13), (113, 203), (1, 70), (70, 1), (65, 64)]
UNEQUAL_GRADIENTS = [(13, 40), (40, 13), (70, 99)]
WINDOWS = [(0, 0), (1, 0), (0, 1), (3, 5), (-1, 0), (-1, 4), (4, -1), (15, 16), (16, 0), (31, 31), (63, 64), (500, 500)]


@check(Feature.CAUSAL, dtypes="every")
def check_causal(subject: Subject) -> None:
    """With as many keys as queries, query i sees the keys up to i, itself included."""
    lse = subject.has(Feature.LSE)
    for length in (17, 1, 2, 16, 64, 130):  # in two rows one mistake looks like another
        subject.compare(subject.call(queries=length, keys=length, heads=1, is_causal=True, lse=lse))


@check(Feature.CAUSAL, gradients=True)
def check_causal_gradients(subject: Subject) -> None:
    """Gradients flow to visible keys only."""
    for length in (16, 17, 70):
        subject.compare(subject.call(queries=length, keys=length, is_causal=True, gradients=subject.gradients))


@check(Feature.CAUSAL, Feature.UPPER_LEFT)
def check_causal_upper_left(subject: Subject) -> None:
    """With unequal lengths and UPPER_LEFT, query i sees the keys j <= i."""
    _unequal(subject, [{"is_causal": True, "causal_variant": "UPPER_LEFT"}])


@check(Feature.CAUSAL, Feature.LOWER_RIGHT)
def check_causal_lower_right(subject: Subject) -> None:
    """With unequal lengths and LOWER_RIGHT, query i sees the keys j <= i + Sk - Sq."""
    _unequal(subject, [{"is_causal": True, "causal_variant": "LOWER_RIGHT"}])


def _unequal(subject: Subject, forms: list[dict[str, Any]]) -> None:
    """Compare calls of unequal lengths, which ask for one form after the other in turn."""
    turn = itertools.cycle(forms)
    for queries, keys in UNEQUAL:
        fields = {"batch": 1, "queries": queries, "keys": keys, **next(turn)}
        subject.compare(subject.call(**fields, lse=subject.has(Feature.LSE)))
    if subject.gradients:
        for queries, keys in UNEQUAL_GRADIENTS:
            fields = {"batch": 1, "queries": queries, "keys": keys, **next(turn)}
            subject.compare(subject.call(**fields, gradients=subject.gradients))


@check(Feature.WINDOW)
def check_window(subject: Subject) -> None:
    """Query i sees the keys from i - left to i + right, both included; -1 leaves a side open."""
    lse = subject.has(Feature.LSE)
    for window in WINDOWS:
        subject.compare(subject.call(queries=70, keys=70, batch=1, window_size=window, lse=lse))


@check(Feature.WINDOW, gradients=True)
def check_window_gradients(subject: Subject) -> None:
    """Gradients flow to keys inside the window only."""
    for window in ((5, 3), (16, 0), (0, 16), (-1, 2)):
        fields = {"batch": 1, "queries": 70, "keys": 70, "window_size": window}
        subject.compare(subject.call(**fields, gradients=subject.gradients))


@check(Feature.WINDOW, Feature.UPPER_LEFT)
def check_window_upper_left(subject: Subject) -> None:
    """With unequal lengths and UPPER_LEFT, a window is counted from key i."""
    _unequal(subject, [{"window_size": window, "causal_variant": "UPPER_LEFT"} for window in ((9, 4), (9, 0))])


@check(Feature.WINDOW, Feature.LOWER_RIGHT)
def check_window_lower_right(subject: Subject) -> None:
    """With unequal lengths and LOWER_RIGHT, a window is counted from key i + Sk - Sq."""
    _unequal(subject, [{"window_size": window, "causal_variant": "LOWER_RIGHT"} for window in ((9, 4), (9, 0))])


@check(Feature.WINDOW, Feature.CAUSAL)
def check_causal_window(subject: Subject) -> None:
    """A causal mask closes a window's right side, whatever it says."""
    for window in ((8, 5), (16, -1), (-1, 3), (0, 0)):
        subject.compare(subject.call(queries=70, keys=70, batch=1, is_causal=True, window_size=window))
