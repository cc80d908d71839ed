"""The list of checks. A check is a function that takes a `Subject` and raises where a promise is broken.

pytest, the command line and the report read this one list, so a check that is added here reaches every
author with the next release.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from attnplug import Feature
from attnplug.testing._subject import Subject


@dataclass(frozen=True)
class Check:
    """One check, and when it applies.

    Attributes:
        features: what an implementation must declare for the check to apply.
        gradients: whether it needs a backward.
        every_dtype: whether a quick run makes it for each declared dtype; a full run does so always.
        only_dtype: the dtype that it is about, if it is about one.
        full: whether only a full run makes it.
        may_decline: whether an implementation may decline all of its calls: they ask for something that
            no feature stands for, such as strides.
    """

    function: Callable[[Subject], None]
    features: tuple[Feature, ...] = ()
    gradients: bool = False
    every_dtype: bool = False
    only_dtype: str = ""
    full: bool = False
    may_decline: bool = False

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def claim(self) -> str:
        """The first sentence of what it says of itself."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]


_registered: list[Check] = []


def check(
    *features: Feature,
    gradients: bool = False,
    every_dtype: bool = False,
    only_dtype: str = "",
    full: bool = False,
    may_decline: bool = False,
) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Add a function to the list of checks; see `Check` for the arguments."""

    def add(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        _registered.append(Check(function, features, gradients, every_dtype, only_dtype, full, may_decline))
        return function

    return add


@cache
def all_checks() -> tuple[Check, ...]:
    """Return every check, in the order of the modules' names and of their lines."""
    from attnplug.testing import checks

    for module in sorted(item.name for item in pkgutil.iter_modules(checks.__path__)):
        importlib.import_module(f"{checks.__name__}.{module}")
    return tuple(_registered)
