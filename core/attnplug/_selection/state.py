"""What holds now: the thread's scopes, and what the process prefers.

A scope is a plain tuple, `(set_priority, (entry, ...))`, its entries strings: `aten_math`, or `:MATH` for a
family. It is held in a `threading.local` whose attributes are set in `__init__`: that is the form of thread
state on which `torch.compile` places guards, so that a compiled function sees a change of scope and
recognises a scope that it has seen before. (`contextvars` cannot be traced, class-level defaults of a
`threading.local` go stale in silence, and numbers may be taken for symbolic ones.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from attnplug._registry.config import get_config
from attnplug._registry.discovery import get_registry
from attnplug._registry.registry import Registry
from attnplug._tracing import constant_in_traces

Scope = tuple[bool, tuple[str, ...]]


class _State:
    """What holds in one thread. Plain, because a trace drops what it assigned to a `threading.local`."""

    def __init__(self) -> None:
        self.scopes: tuple[Scope, ...] = ()
        self.scope: Scope | None = None  # the innermost of `scopes`
        self.torch_first = True  # whether, unless the process prefers another, `torch` is the first that it allows
        self.recordings: tuple[Any, ...] = ()  # lists and replays


class _Thread(threading.local):
    def __init__(self) -> None:
        self.state = _State()


class _ProcessState:
    """What the whole process prefers; `registry` is None until the first use of the library."""

    def __init__(self) -> None:
        self.registry: Registry | None = None
        self.activation: str | None = None
        self.preferred: tuple[str, ...] = ()
        self.plain = False  # whether `torch` runs whatever it supports, outside any scope
        self.trace = False
        self.bindings = 0  # how many modules are bound
        self.listeners: list[Callable[[Registry], None]] = []  # told about the registry when it is there

    def activate(self, name: str | None) -> None:
        """Make `name`, or nothing, the first choice of the process."""
        start()
        self.activation = name
        self.plain = name is None and not self.preferred and not self.trace


thread = _Thread()
process = _ProcessState()


def when_started(listener: Callable[[Registry], None]) -> None:
    """Call `listener` with the registry: at once, or when it is there."""
    process.listeners.append(listener)
    if process.registry is not None:
        listener(process.registry)


def start() -> Registry:
    """Return the registry; at the first use, check what the environment prefers.

    Raises:
        ConfigError, PluginError: what reading the environment and loading the plugins raise.
        UnknownImplementationError: `ATTNPLUG_IMPL` names an implementation that does not exist.
    """
    if process.registry is None:
        registry, config = get_registry(), get_config()
        process.preferred = tuple(registry.get(name, "ATTNPLUG_IMPL").name for name in config.impl)
        process.trace = config.trace
        process.plain = process.activation is None and not process.preferred and not config.trace
        process.registry = registry
        for listener in process.listeners:
            listener(registry)
    return process.registry


@constant_in_traces
def start_outside() -> None:
    """Fill the registry; in a trace, outside the graph, which could not take the locks."""
    start()
