"""What a trace runs outside the graph, as a constant, and what it may ask of sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.compiler import is_compiling, is_exporting

_Function = TypeVar("_Function", bound=Callable[..., object])


def constant_in_traces(function: _Function) -> _Function:
    """Mark `function` as `torch.compiler.assume_constant_result` does, which would first import Dynamo: seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions declare none
    return function


def holds(comparison: bool) -> bool:
    """Whether a comparison of sizes holds: in a trace with a guard, in an exported program for all that they may be.

    Such a program has one form for the whole range of a size, which a guard would narrow. `builtin.rewrites.holds` is
    the same: built-in kernels keep to public names.
    """
    if not is_compiling():
        return comparison
    from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true  # a trace has imported it

    return statically_known_true(comparison) if is_exporting() else guard_or_false(comparison)
