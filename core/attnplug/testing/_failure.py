"""What a check raises: what is wrong, what it looks like, and how to see it again."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import FrameType

from attnplug._messages import printable
from attnplug.testing._fields import Fields

AGAIN, CALL = "again: ", "call: "
"""How the lines of a failure begin that show it again, and the call that it was seen in."""
_OURS = "attnplug"
_LIBRARIES = (_OURS, "torch", "triton")
_PYTHONS = os.path.join(os.path.dirname(os.__file__), ""), "<frozen "


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
    return CheckFailure("\n".join(lines), "" if call is None else f"{CALL}{call!r}")


@contextmanager
def failing(call: Fields | None, what: str) -> Iterator[None]:
    """Make a failure of what is raised inside, after `what`: a kernel may raise anything, and it is the kernel's."""
    try:
        yield
    except Exception as error:  # any, as said above
        raise failure(call, f"{what}{told(error)}") from error


def told(error: Exception) -> str:
    """Return an exception, with the innermost line of the kernel; what attnplug, or PyTorch, raises has none.

    A kernel is what attnplug calls, and all that is called from there but libraries, in which there is nothing to mend.
    """
    text = f"{type(error).__name__}: {error}"
    frames = [
        (_package(frame), frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not _stands_between(frame)
    ]
    packages = [package for package, _, _ in frames]
    called = next(
        (at for at, pair in enumerate(pairwise(packages)) if pair[0] == _OURS and pair[1] not in _LIBRARIES), None
    )
    if called is None:
        return text
    _, file, line = [each for each in frames[called:] if each[0] not in _LIBRARIES][-1]
    return f"{text} (in {printable(file)}, line {line})"


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _stands_between(frame: FrameType) -> bool:
    """Whether this is of a decorator, such as `torch.no_grad()`, or of Python's own library, and no `test.py`."""
    is_pythons = frame.f_code.co_filename.startswith(_PYTHONS) and _package(frame) in sys.stdlib_module_names
    return is_pythons or frame.f_globals.get("__name__") == "torch.utils._contextlib"
