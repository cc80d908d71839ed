"""Choices by size: what a call compares, and a trace guards on.

Choices of one problem differ by size alone, so they are a tree of upper bounds: of batch times heads, then of queries,
then of keys. Neighbours with the same choice are one branch, so that a length may grow in a compiled function until the
choice is another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Tree = str | tuple[tuple[int, Any], ...] | None
"""The name of an implementation, None, or branches, each with its upper bound; above the last there is none."""


def grown(found: Mapping[tuple[int, ...], str | None]) -> Tree:
    """Return the tree of choices by sizes, each of which stands for those above its half."""
    if () in found:
        return found[()]
    branches: list[tuple[int, Tree]] = []
    for size in sorted({sizes[0] for sizes in found}):
        below = branches[-1][0] if branches else 0
        if size // 2 > below:
            branches.append((size // 2, None))
        branches.append((size, grown({sizes[1:]: name for sizes, name in found.items() if sizes[0] == size})))
    merged: list[tuple[int, Tree]] = []
    for bound, branch in branches:
        if merged and merged[-1][1] == branch:
            merged.pop()
        merged.append((bound, branch))
    while merged and merged[-1][1] is None:
        merged.pop()
    return tuple(merged) or None


def walked(tree: Tree, sizes: Sequence[int]) -> str | None:
    """Return the choice for sizes; 0.3 us."""
    for size in sizes:
        if type(tree) is not tuple:
            break
        for bound, branch in tree:
            if size <= bound:
                tree = branch
                break
        else:
            return None
    return tree  # type: ignore[return-value]  # it is as deep as there are sizes
