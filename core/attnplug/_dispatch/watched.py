"""How calls are made and reported while there are watchers (`_selection.watching`), in eager code and in graphs."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from attnplug._dispatch.resolver import Decision
from attnplug._run.contract import Result
from attnplug._run.operator import ARGUMENTS, arguments_of, params_from
from attnplug._selection.state import thread
from attnplug._selection.watching import TENSORS, RecordedCall, Watcher
from attnplug._tracing import constant_in_traces
from attnplug._types import SDPAParams, SDPBackend

Run = Callable[[SDPAParams], Result]


def among_watchers(decision: Decision, params: SDPAParams, run: Run, whole: bool = True) -> Run:
    """Report an eager call to this thread's watchers, and return what runs it: `run`, or `run` within their `around`.

    The first watcher is nearest to the kernel. Those that see tensors are left out where these are not the `whole`
    call: what one of several ranks has of a call is not a call that one rank could make.
    """
    call = decision.call(params)
    for watcher in thread.state.watchers:
        if not watcher.stands_around:
            watcher.told(call)
        elif whole or not watcher.sees_tensors:
            run = _around(watcher, call, run)
    return run


def _around(watcher: Watcher, call: RecordedCall, run: Run) -> Run:
    return lambda params: watcher.around(call, params, run)


def tell(call: tuple[str, ...]) -> None:
    """Put into the graph that is being traced a report of the call that follows."""
    _define()
    torch.ops.attnplug_watched.told.default(*call)


def show(call: tuple[str, ...], params: SDPAParams, out: Any, lse: Any) -> None:
    """Put into the graph that is being traced a report of a call, with its tensors, if a watcher wants them."""
    if call and thread.state.watched == TENSORS:
        torch.ops.attnplug_watched.seen.default(*call, *arguments_of(params), out, lse)


def as_constants(decision: Decision) -> tuple[str, ...]:
    """Return what `tell` takes. Which kernel PyTorch's own function comes to in a graph is not known yet."""
    backend = decision.backend
    family = "" if backend is None else backend.name
    return decision.name, family, json.dumps(dict(decision.passed_over)), decision.device


_GIVEN = ARGUMENTS.replace("float scale", "float? scale")  # kernels of any form get None where the user gave none
_CALL = "str impl, str family, str passed_over, str device"


@cache
def _operators() -> Any:
    """Define the operators with which a graph tells the watchers of the thread that runs it.

    In a namespace of their own: in `attnplug` an implementation may have any name.
    """
    from torch._higher_order_ops.effects import _EffectType
    from torch.fx.node import has_side_effect
    from torch.library import _register_effectful_op

    library = torch.library.Library("attnplug_watched", "FRAGMENT")
    for name, more, function in (("told", "", _told), ("seen", f", {_GIVEN}, Tensor out, Tensor? lse", _seen)):
        library.define(f"{name}({_CALL}{more}) -> ()")
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"attnplug_watched::{name}", lambda *_: None, lib=library)
        operator = getattr(torch.ops.attnplug_watched, name).default
        has_side_effect(operator)  # or a graph would drop it, as nothing uses what it returns
        _register_effectful_op(operator, _EffectType.ORDERED)
    torch.library.register_vmap("attnplug_watched::seen", _each_seen, lib=library)
    return library


@constant_in_traces
def _define() -> None:
    _operators()


def _told(*call: str) -> None:
    described = _call(*call)
    for watcher in thread.state.watchers:
        watcher.told(described)


def _seen(impl: str, family: str, passed_over: str, device: str, *given: Any) -> None:
    described = _call(impl, family, passed_over, device)
    *arguments, out, lse = given
    params = params_from(tuple(arguments))
    for watcher in thread.state.watchers:
        if watcher.sees_tensors:
            watcher.seen(described, params, (out, lse))


def _each_seen(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[None, None]:
    """Show each element that `vmap` has as a call, which it was for an opaque kernel."""
    for position in range(info.batch_size):
        element = (
            argument.select(dim, position) if isinstance(dim, int) else argument
            for argument, dim in zip(arguments, in_dims, strict=True)
        )
        torch.ops.attnplug_watched.seen.default(*element)
    return None, None


def _call(impl: str, family: str, passed_over: str, device: str) -> RecordedCall:
    reasons = {name: tuple(each) for name, each in json.loads(passed_over).items()}
    return RecordedCall(impl, SDPBackend[family] if family else None, reasons, device)
