"""What options take: shapes, dtypes, families, names. Each reader raises `ArgumentTypeError` with what it accepts."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from attnplug import SDPBackend, _types
from attnplug._control.registration import check_name
from attnplug._errors import did_you_mean

DTYPES = dict(zip(_types.DTYPES, ("f16", "bf16", "f32", "f64"), strict=True))
"""The dtypes, each with the short name that tables show."""

_ALIASES = {short: name for name, short in DTYPES.items()} | {
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "fp64": "float64",
    "double": "float64",
}
DTYPE_HELP = f"{', '.join(DTYPES)}, or as tables show them: {', '.join(DTYPES.values())}"


def dtype(text: str) -> str:
    """Read a dtype by any of its names: `bfloat16`, `bf16`, `torch.bfloat16`."""
    name = text.lower().removeprefix("torch.")
    name = _ALIASES.get(name, name)
    if name not in DTYPES:
        close = did_you_mean(name, (*DTYPES, *_ALIASES))
        raise argparse.ArgumentTypeError(f"expected {DTYPE_HELP}; got {text!r}{close}")
    return name


def sizes(text: str) -> tuple[int, ...]:
    """Read sizes or lengths such as `1,8,128,64`."""
    try:
        read = tuple(int(part) for part in text.split(","))
    except ValueError:
        read = (-1,)
    if min(read) < 0:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,8,128,64, got {text!r}")
    return read


def capability(text: str) -> tuple[int, int]:
    """Read a compute capability such as `9.0`; which there may be, the library checks."""
    major, dot, minor = text.partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected a compute capability such as 9.0 or 12.0, got {text!r}")
    return int(major), int(minor)


def size(text: str) -> int:
    """Read one size above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return int(text)


def count(text: str) -> int:
    """Read a number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number from 0 on, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """Read a time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, such as 0.5, got {text!r}")
    return value


def window(text: str) -> tuple[int, ...]:
    """Read the two sides of a window; what they may be, the library checks."""
    try:
        left, right = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected LEFT,RIGHT such as 256,0 or -1,0, got {text!r}") from None
    return left, right


def mask(text: str) -> tuple[str, tuple[int, ...] | None]:
    """Read `bool`, `float`, or one of them with a shape, such as `bool:1,1,128,128`."""
    kind, colon, shape = text.partition(":")
    if kind not in ("bool", "float"):
        raise argparse.ArgumentTypeError(f"expected bool or float, with :SHAPE or without, got {text!r}")
    return kind, sizes(shape) if colon else None


def varlen(text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Read the lengths of the sequences of queries and, after a colon, of keys: `5,3,8` or `1,1:12,40`."""
    queries, colon, keys = text.partition(":")
    lengths = sizes(queries), sizes(keys if colon else queries)
    if len(lengths[0]) != len(lengths[1]):
        raise argparse.ArgumentTypeError(f"expected as many sequences of keys as of queries, got {text!r}")
    return lengths


def names(text: str) -> list[str]:
    """Read names separated by commas."""
    return [part.strip() for part in text.split(",")]


def scope(items: Iterable[str], option: str) -> list[str | SDPBackend]:
    """Return what `sdpa_kernel` takes for names of implementations and, in upper or lower case, of families.

    Raises:
        UnknownImplementationError: a name is neither.
    """
    read: list[str | SDPBackend] = []
    for item in items:
        family = _types.FAMILIES.get(item.upper())
        if family is None:
            check_name(item, option, also=_types.FAMILIES)
        read.append(item if family is None else family)
    return read
