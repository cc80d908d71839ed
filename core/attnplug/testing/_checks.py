"""What a check is: a function that takes a `Subject` and raises where a promise is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attnplug import Feature
from attnplug.testing._subject import Subject


@dataclass(frozen=True)
class Check:
    """One check, and when it applies.

    Attributes:
        features: what an implementation must declare for the check to apply.
        gradients: whether it needs a backward.
        dtypes: which of the declared ones it is made for: `every`; `every in full`, where a quick run takes
            the first; `first`, in a full run too; or the name of the one that it is about.
        full: whether only a full run makes it.
        may_decline: whether an implementation may decline all of its calls: they ask for something that
            no feature stands for, such as strides.
        pieces: into how many a full run divides it where several processes share the work (`Subject.share`).
    """

    function: Callable[[Subject], None]
    features: tuple[Feature, ...] = ()
    gradients: bool = False
    dtypes: str = "every in full"
    full: bool = False
    may_decline: bool = False
    pieces: int = 1

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def module(self) -> str:
        """The module that it is in: what it is about."""
        return self.function.__module__.rpartition(".")[2]

    def dtypes_of(self, declared: list[str], level: str) -> list[str]:
        """Return those of the `declared` dtypes, which are not none, that a run makes the check for.

        A check of one dtype that is not declared is made for another, to say that it does not apply.
        """
        if self.dtypes in declared:
            return [self.dtypes]
        every = self.dtypes == "every" or (self.dtypes == "every in full" and level == "full")
        return declared if every else declared[:1]

    @property
    def claim(self) -> str:
        """The first sentence of what it says of itself."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]


registered: list[Check] = []
"""What the modules of `checks` that were imported so far have added."""


def check(
    *features: Feature,
    gradients: bool = False,
    dtypes: str = "every in full",
    full: bool = False,
    may_decline: bool = False,
    pieces: int = 1,
) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Add a function to the list of checks; see `Check` for the arguments."""

    def add(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        registered.append(Check(function, features, gradients, dtypes, full, may_decline, pieces))
        return function

    return add
