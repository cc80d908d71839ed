"""What traces need: constants, which are computed outside the graph, and comparisons of sizes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

_Function = TypeVar("_Function", bound=Callable[..., object])


def constant_in_traces(function: _Function) -> _Function:
    """Mark `function` as `torch.compiler.assume_constant_result` does, which would first import Dynamo: seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions declare none
    return function


@constant_in_traces
def is_exporting() -> bool:
    """Whether `torch.export` traces; of PyTorch's own answer a trace of 2.11 makes True, whatever traces."""
    from torch import compiler

    return compiler.is_exporting()


@constant_in_traces
def cudnn_version() -> int | None:
    """Return the version of cuDNN that PyTorch uses for attention, or None if it has no cuDNN.

    If PyTorch considers this version too old for itself, or too new for a GPU, it raises the first time it is asked
    for it. Its attention does not ask.
    """
    from torch.backends import cudnn

    with suppress(RuntimeError):
        return cudnn.version()
    return cudnn.version()


def holds_in_trace(comparison: bool) -> bool:
    """Whether a comparison of sizes holds: with a guard, or in an exported program for all that they may be.

    Such a program has one form for the whole range of a size, which a guard would narrow.
    """
    from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true  # a trace has imported it

    return statically_known_true(comparison) if is_exporting() else guard_or_false(comparison)
