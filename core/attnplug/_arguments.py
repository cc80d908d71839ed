"""Arguments of what is called rarely, checked: an error names the argument, what came, and what is accepted."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def expect(argument: str, value: Any, kind: type[T] | tuple[type, ...], wanted: str) -> T:
    """Return `value` if it is of a kind.

    Raises:
        TypeError: it is not; `wanted` says what is.
    """
    if not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, Integral, Real)):
        raise TypeError(f"{argument}: expected {wanted}, got {shown(value)}")
    return value  # type: ignore[return-value]  # `kind` may be several types, which a variable cannot say


def as_int(argument: str, value: Any, wanted: str) -> int:
    """Return an integer, one of numpy too, as Python's."""
    return int(expect(argument, value, Integral, wanted))


def as_float(argument: str, value: Any, wanted: str) -> float:
    """Return a number, one of numpy too, as Python's."""
    return float(expect(argument, value, Real, wanted))


def one_of(argument: str, value: Any, known: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of the known words."""
    known = list(known)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, known))}, got {shown(value)}")


def as_path(argument: str, value: Any) -> Path:
    """Return the path of a file, given as text or as a path.

    Raises:
        TypeError, ValueError: it is neither, or it is empty.
    """
    path = os.fspath(expect(argument, value, (str, os.PathLike), "the path of a file"))
    if not isinstance(path, str) or not path:
        raise ValueError(f"{argument}: expected the path of a file, got {path!r}")
    return Path(path)


def as_list(argument: str, value: Any, wanted: str) -> list[Any]:
    """Return the items of a collection that is not text.

    Raises:
        TypeError: it is not a collection, or it is text.
    """
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return list(value)
    except (TypeError, RuntimeError):  # RuntimeError: a nested tensor, whose items are none
        raise TypeError(f"{argument}: expected {wanted}, got {shown(value)}") from None


def as_dict(argument: str, value: Any, wanted: str) -> dict[str, Any]:
    """Return a copy of a mapping."""
    return dict(expect(argument, value, Mapping, wanted))


def shown(value: Any) -> str:
    """Return a value as a message shows it: itself where it is short, else its type."""
    if value is None or isinstance(value, (str, bytes, int, float, complex)):
        return repr(value) if len(repr(value)) <= 60 else f"{type(value).__name__} {repr(value)[:50]}..."
    return value.__name__ if isinstance(value, type) else type(value).__name__
