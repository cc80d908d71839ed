"""How the gradients of one call are seen when backward runs, without changing what runs.

The call gets aliases of the tensors whose gradients are wanted, made by one node of autograd: the gradients that arrive
there are those of this call alone, whatever else uses the tensors. The gradients of its results are those that reach
the node that made them. Nothing is saved for backward, so that checkpoints and hooks on saved tensors see the call as
it is; its tensors are looked at again only if nobody has changed them since.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.compiler import is_compiling

from attnplug._run.batched import is_wrapped
from attnplug._run.contract import DIFFERENTIABLE, TENSORS
from attnplug._types import SDPAParams

Judge = Callable[[dict[str, Tensor], Tensor | None, Tensor | None], None]


def wanted(params: SDPAParams) -> tuple[str, ...]:
    """Return the arguments whose gradients autograd records."""
    if not torch.is_grad_enabled():
        return ()
    given = {name: getattr(params, name) for name in DIFFERENTIABLE}
    return tuple(name for name, tensor in given.items() if tensor is not None and tensor.requires_grad)


class Backward:
    """One call's backward, each time that it runs.

    Args:
        params: the call.
        names: of the arguments whose gradients are wanted.
        judge: is given the gradients of these, and those of out and lse, None for 0.
        skip: is told why they could not be judged.
    """

    def __init__(self, params: SDPAParams, names: tuple[str, ...], judge: Judge, skip: Callable[[str], None]) -> None:
        self._names, self._judge, self._skip = names, judge, skip
        self._versions = [
            (name, tensor, tensor._version)
            for name in TENSORS
            if (tensor := getattr(params, name)) is not None and not tensor.is_inference()
        ]
        self._twice = False
        """Whether backward itself was recorded: aliases then get gradients from what it computed, too."""
        self._pass = -1
        self._arrived: dict[str, Tensor] = {}

    def of_aliases(self, params: SDPAParams) -> SDPAParams:
        """Return the same call, of aliases."""
        aliases = _Aliases.apply(self, *(getattr(params, name) for name in self._names))
        return replace(params, **dict(zip(self._names, aliases, strict=True)))

    def listen(self, out: Tensor, lse: Tensor | None) -> None:
        """Look at the gradients that reach the results of the call. The results stay what they are."""
        places: dict[Any, dict[str, int]] = {}
        for name, tensor in (("out", out), ("lse", lse)):
            if tensor is not None and tensor.grad_fn is not None:
                places.setdefault(tensor.grad_fn, {})[name] = tensor.output_nr
        for node, outputs in places.items():
            node.register_prehook(_Hook(self, outputs))

    def reached(self, outputs: dict[str, int], gradients: tuple[Tensor | None, ...]) -> None:
        """Keep the gradients of the results until those of the arguments arrive."""
        number = torch._C._current_graph_task_id()
        if number != self._pass:
            self._pass, self._arrived = number, {}
        for name, position in outputs.items():
            if (gradient := gradients[position]) is not None:
                self._arrived[name] = gradient if is_wrapped(gradient) else gradient.detach()

    def finished(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Have the gradients of the arguments judged."""
        arrived, number = self._arrived, self._pass
        self._arrived, self._pass = {}, -1
        if self._twice:
            self._skip("gradients: of a call that was differentiated with create_graph=True before")
            return
        self._twice = torch.is_grad_enabled()
        if number != torch._C._current_graph_task_id():
            self._skip("gradients: the result was changed in place, or backward runs in several threads at once")
            return
        if any(map(is_wrapped, (*arrived.values(), *gradients))):
            self._skip("gradients: many at once, as is_grads_batched or torch.func.vmap has them")
            return
        for name, tensor, version in self._versions:
            if tensor._version != version:
                self._skip(f"gradients: {name} was changed in place between forward and backward")
                return
        given = {name: tensor for name, tensor, _ in self._versions if name in self._names}
        found = {
            name: torch.zeros_like(given[name]) if gradient is None else gradient.detach()
            for name, gradient in zip(self._names, gradients, strict=True)
        }
        self._judge(found, arrived.get("out"), arrived.get("lse"))


def _outside_traces(function: Callable[..., None], *arguments: Any) -> None:
    """Call `function`. The graph of compiled autograd breaks here: Dynamo would compile all that compares."""
    if is_compiling():
        _uncompiled(function, *arguments)
    else:
        function(*arguments)


@_disable_dynamo  # imports Dynamo when it is called: a trace has
def _uncompiled(function: Callable[..., None], *arguments: Any) -> None:
    function(*arguments)


class _Hook:
    """What a node of autograd calls; it must not keep the node alive."""

    def __init__(self, backward: Backward, outputs: dict[str, int]) -> None:
        self._backward, self._outputs = backward, outputs

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        _outside_traces(self._backward.reached, self._outputs, gradients)


class _Aliases(torch.autograd.Function):
    """Other tensors in the same memory, which nobody else's gradients reach."""

    apply: Any  # PyTorch's has no types

    @staticmethod
    def forward(ctx: Any, backward: Backward, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.backward_of_call = backward
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        _outside_traces(ctx.backward_of_call.finished, gradients)
        return (None, *gradients)
