"""`attnplug` among PyTorch's libraries of operators: where ours are defined, and under what names."""

from __future__ import annotations

import keyword
import re
from functools import cache

import torch

_defined: set[str] = set()


@cache
def library() -> torch.library.Library:
    """Return the namespace of the operators, made when the first one is."""
    return torch.library.Library("attnplug", "FRAGMENT")


def free_name(name: str) -> str:
    """Return an operator name that was never used: an operator, once defined, stays."""
    base = free = operator_name(name)
    while not {free, f"{free}_backward"}.isdisjoint(_defined):
        free = f"{base}_{len(_defined)}"
    _defined.update((free, f"{free}_backward"))
    return free


def operator_name(name: str) -> str:
    """Return the name of an implementation's operator, which PyTorch's schemas can hold."""
    base = re.sub(r"\W", "_", name)
    if base == "name" or keyword.iskeyword(base) or hasattr(torch._ops._OpNamespace, base):  # no name of an operator
        return f"{base}_"
    try:
        torch._C.parse_schema(f"attnplug::{base}() -> ()")
    except RuntimeError:  # a word of the language of schemas, such as `class`
        return f"{base}_"
    return base
