"""Attention over several ranks as an implementation like any other: run eagerly, traced, and on DTensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch.distributed as dist
from torch.compiler import is_compiling

from attnplug._arguments import expect
from attnplug._call.prepare import empty, is_empty
from attnplug._registry.registry import PROGRAM, Entry
from attnplug._run.autograd import run
from attnplug._run.contract import Result
from attnplug._run.operator import SAVES, arguments_of, is_watched, operator_of
from attnplug._tracing import constant_in_traces
from attnplug._types import Capabilities, ImplSpec, SDPAParams
from attnplug.parallel._ring import FEATURES, Ring

_entries: WeakKeyDictionary[dist.ProcessGroup, dict[str | None, Entry]] = WeakKeyDictionary()
"""By group and `impl`. Connections of a group are closed when it is destroyed and nobody refers to it."""


class _Operators:
    """The operators that were traced so far, by attribute: adding one does not touch the guards on another."""


_operators = _Operators()


def run_ring(params: SDPAParams, group: dist.ProcessGroup, impl: str | None) -> Result:
    """Run a checked call in the form that kernels know."""
    check_impl(impl)
    if is_empty(params):
        return empty(params)
    if is_compiling():
        out, lse, _ = getattr(_operators, _traced(group.group_name, impl))(*arguments_of(params), SAVES)
        return out, lse if params.return_lse else None
    entry = _entry(group, impl)
    if is_watched(params.query):
        return operator_of(entry).run(params)
    return run(entry, params, params.needs_grad)


def check_impl(impl: Any) -> None:
    expect("impl", impl, (str, type(None)), "the name of an implementation or None")


def _entry(group: dist.ProcessGroup, impl: str | None) -> Entry:
    entries = _entries.setdefault(group, {})
    if impl not in entries:
        entries[impl] = _ring(ref(group), impl)
    return entries[impl]


@cache
def _named_entry(group_name: str, impl: str | None) -> Entry:
    resolve: Any = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]  # private to PyTorch
    return _ring(partial(resolve, group_name), impl)


def _ring(group: Callable[[], dist.ProcessGroup | None], impl: str | None) -> Entry:
    entry = Entry(
        ImplSpec(
            name="ring_attention",
            kernel=Ring(group, impl),
            backend=None,
            capabilities=Capabilities(features=FEATURES),
        ),
        PROGRAM,
    )
    entry.load()
    return entry


@constant_in_traces
def _traced(group_name: str, impl: str | None) -> str:
    """Return the attribute under which the operator of a ring is kept; in a trace, a group is not itself.

    The operator asks for the group by its name when it runs: a compiled function tells groups apart by nothing else,
    and may be called with one that was destroyed and made again.
    """
    forward = operator_of(_named_entry(group_name, impl)).forward
    name = forward.name().partition("::")[2]
    setattr(_operators, name, forward)
    return name
