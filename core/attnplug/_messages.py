"""What reaches a user's eyes: where a warning points, and text of others made safe to show."""

from __future__ import annotations

import sys
import warnings

LONGEST = 2000
UNROUTED = "PyTorch's function runs through attnplug, and is seen, inside patch_torch()"
"""What is said where no call was seen."""
_MACHINERY = frozenset({"attnplug", "torch", "pluggy", "importlib", "contextlib", "functools"})


def warn(message: Warning) -> None:
    """Issue a warning at the line of the program, or of the model, that called attnplug or PyTorch.

    `warnings.warn(skip_file_prefixes=...)` does this from Python 3.12 on, and counts no frames of PyTorch's,
    through which calls of `torch.nn.functional` and compiled calls come.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _MACHINERY:
        frame = frame.f_back
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    module = frame.f_globals.get("__name__") or "<unknown>"
    warnings.warn_explicit(message, type(message), frame.f_code.co_filename, frame.f_lineno, module, registry)


def printable(text: object) -> str:
    """Return foreign text in one line of at most about `LONGEST` characters that is safe to print in a terminal.

    What does not print, such as the escapes that move a terminal's cursor, is written as Python writes it.
    """
    whole = str(text)
    line = " ".join(whole[: 2 * LONGEST].split())
    if not line.isprintable():
        line = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line)
    if len(line) <= LONGEST and len(whole) <= 2 * LONGEST:
        return line
    return f"{line[:LONGEST]}... (cut: {len(whole):,} characters)"


def of_error(error: BaseException) -> str:
    """Return an exception in one line: its class, and its message if it has one that can be shown."""
    try:
        message = printable(error)
    except Exception:  # an exception of a plugin may be anything, and must not break its own report
        message = "its message cannot be shown"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def is_stop(error: BaseException) -> bool:
    """Whether somebody stops what runs, which is no failure of the plugin that it passes through.

    `sys.exit` in a plugin is one, and so is a panic of an extension written in Rust, which is no `Exception` either.
    """
    return isinstance(error, (KeyboardInterrupt, GeneratorExit))
