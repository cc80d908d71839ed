"""What a check raises: what is wrong, what it looks like, and how to see it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from attnplug.testing._fields import Fields

AGAIN = "again: "


class CheckFailure(AssertionError):
    """What a check found wrong; `str()` ends with what an author needs to reproduce it.

    Attributes:
        again: the call, or a line of Python that fails in the same way.
    """

    def __init__(self, message: str, again: str = "") -> None:
        super().__init__(message)
        self.again = again

    def __str__(self) -> str:
        return "\n".join(filter(None, (super().__str__(), self.again)))


class Declined(Exception):
    """The implementation does not take the call, and says why."""


def failure(call: Fields | None, message: str, hint: str = "") -> CheckFailure:
    """Return the failure to raise: what is wrong, what it looks like, and the call, if it is about one."""
    lines = [message]
    if hint:
        lines.append(f"hint: {hint}")
    return CheckFailure("\n".join(lines), "" if call is None else f"call: {call!r}")


@contextmanager
def failing(call: Fields | None, what: str) -> Iterator[None]:
    """Make a failure of what is raised inside, after `what`: a kernel may raise anything, and it is the kernel's."""
    try:
        yield
    except Exception as error:  # any, as said above
        raise failure(call, f"{what}{type(error).__name__}: {error}") from error
