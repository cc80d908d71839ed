"""What a trace runs outside the graph, as a constant."""

from __future__ import annotations

from collections.abc import Callable
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
