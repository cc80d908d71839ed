"""Ranges of a profiler: `attnplug::<implementation>`, and `attnplug::<implementation>_backward`.

They have the names of the operators by which compiled code calls an opaque kernel. `torch.profiler` shows them, and
under `torch.autograd.profiler.emit_nvtx` so does Nsight Systems. Where no profiler runs, a call pays one question.
Who watches may put another range around those of a call, forward and backward (`labelled`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch.profiler import record_function

from attnplug._run.contract import DIFFERENTIABLE, Result
from attnplug._tracing import constant_in_traces
from attnplug._types import SDPAParams

MOST = 256
"""How many nodes of autograd a call may have; the backward of one that has more gets no ranges."""


@constant_in_traces
def is_profiled() -> bool:
    """Whether a profiler runs. A trace keeps the answer, without a guard: profiling shall compile nothing anew."""
    return _profiler_enabled()


_labels = threading.local()


@contextmanager
def labelled(label: str) -> Iterator[None]:
    """Put a range of this name around those of the calls that this thread makes meanwhile, and of their backward."""
    before, _labels.names = _names(), (*_names(), label)
    try:
        yield
    finally:
        _labels.names = before


def _names() -> tuple[str, ...]:
    """Return the ranges around those of a call, the outermost first."""
    return getattr(_labels, "names", ())


def in_range(name: str, params: SDPAParams, run: Callable[[SDPAParams], Result]) -> Result:
    """Run a call in a range of the profiler; each node of its backward will run in another."""
    outer = _names()
    with _entered((*outer, f"attnplug::{name}")):
        out, lse = run(params)
    if torch.is_grad_enabled():
        for node in _nodes(params, out, lse):
            _Range((*outer, f"attnplug::{name}_backward")).surround(node)
    return out, lse


def _entered(names: tuple[str, ...]) -> ExitStack:
    stack = ExitStack()
    for name in names:
        stack.enter_context(record_function(name))
    return stack


def _nodes(params: SDPAParams, out: Tensor, lse: Tensor | None) -> list[Any]:
    """Return the nodes of autograd between the inputs of a call and its results."""
    inputs = (getattr(params, field) for field in DIFFERENTIABLE)
    seen = {tensor.grad_fn for tensor in inputs if tensor is not None}
    found: list[Any] = []
    waiting = [out.grad_fn, None if lse is None else lse.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node.name() == "torch::autograd::AccumulateGrad":
            continue
        seen.add(node)
        found.append(node)
        if len(found) > MOST:
            return []
        waiting += [following for following, _ in node.next_functions]
    return found


class _Range:
    """Ranges around one node of autograd, each time that it runs under a profiler."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._entered = threading.local()

    def surround(self, node: Any) -> None:
        node.register_prehook(self._enter)
        node.register_hook(self._leave)

    def _enter(self, gradients: object) -> None:
        self._entered.ranges = _entered(self._names) if is_profiled() else None

    def _leave(self, *gradients: object) -> None:
        entered, self._entered.ranges = getattr(self._entered, "ranges", None), None
        if entered is not None:
            entered.close()
