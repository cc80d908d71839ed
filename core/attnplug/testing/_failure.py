"""What a check raises: what is wrong, what it looks like, and how to see it again."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import attnplug
from attnplug._messages import printable
from attnplug.testing._fields import Fields

AGAIN = "again: "
_HERE, _TORCH = (os.path.join(os.path.dirname(module.__file__ or ""), "") for module in (attnplug, torch))


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
        raise failure(call, f"{what}{told(error)}") from error


def told(error: Exception) -> str:
    """Return an exception, with the line of the kernel that raised it; what attnplug raises has none."""
    text = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [place for place, frame in enumerate(frames) if frame.filename.startswith(_HERE)]
    called = frames[ours[-1] + 1 :] if ours else []
    if not called or called[0].filename.startswith(_TORCH):
        return text
    line = [frame for frame in called if not frame.filename.startswith(_TORCH)][-1]
    return f"{text} (in {printable(line.filename)}, line {line.lineno})"
