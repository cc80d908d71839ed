"""Every promise, a module for each subject; a failure of an early one often explains those of later ones.

pytest, the command line and the report read this one list, so a check that is added here reaches every author with the
next release.
"""

from __future__ import annotations

import importlib
from functools import cache

from attnplug.testing._checks import Check, registered

SIMPLEST_FIRST = (
    "loading",
    "values",
    "heads",
    "causal",
    "masks",
    "logits",
    "gradients",
    "varlen",
    "nested",
    "dropout",
    "memory",
    "running",
    "compiling",
    "pairs",
)


@cache
def all_checks() -> tuple[Check, ...]:
    """Return every check, the simplest first."""
    for module in SIMPLEST_FIRST:
        importlib.import_module(f"{__name__}.{module}")
    return tuple(sorted(registered, key=lambda check: SIMPLEST_FIRST.index(check.module)))
