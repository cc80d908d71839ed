"""Who decides: the thread's scopes, and what the process prefers.

A scope is a plain tuple, `(set_priority, (entry, ...))`, its entries strings: `aten_math`, or `:MATH` for a
family. It is held in a `threading.local` whose attributes are set in `__init__`: that is the form of thread
state on which `torch.compile` places guards, so that a compiled function sees a change of scope and
recognises a scope that it has seen before. (`contextvars` cannot be traced, class-level defaults of a
`threading.local` go stale in silence, and numbers may be taken for symbolic ones.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attnplug._config import get_config
from attnplug._constant import constant_in_traces
from attnplug._discovery import get_registry
from attnplug._errors import SpecError
from attnplug._registry import Entry, Registry
from attnplug._types import as_backend

Scope = tuple[bool, tuple[str, ...]]
FAMILY = ":"  # begins the entry of a family; no implementation's name begins so


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
        self.on_start: Callable[[Registry], None] | None = None  # told about the registry when it is there

    def activate(self, name: str | None) -> None:
        """Make `name`, or nothing, the first choice of the process."""
        start()
        self.activation = name
        self.plain = name is None and not self.preferred and not self.trace


thread = _Thread()
process = _ProcessState()


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
        if process.on_start is not None:
            process.on_start(registry)
    return process.registry


@constant_in_traces
def start_outside() -> None:
    """Fill the registry; in a trace, outside the graph, which could not take the locks."""
    start()


@dataclass(frozen=True)
class Selection:
    """All that decides about one call, besides the call itself."""

    impl: str | None = None
    scope: Scope | None = None
    activation: str | None = None
    preferred: tuple[str, ...] = ()

    @property
    def exact(self) -> str:
        """What names exactly the implementations that are allowed; empty if any is."""
        if self.impl is not None:
            return f"impl={self.impl!r}"
        return describe_scope(self.scope) if self.scope is not None else ""

    @property
    def wanted(self) -> tuple[str, ...]:
        """The first choices that may be passed over, but not in silence."""
        if self.impl is not None:
            return ()
        return tuple(name for name in (self.activation, *self.preferred) if name is not None)

    def candidates(self, registry: Registry) -> list[Entry]:
        """Return the allowed implementations, most preferred first."""
        if self.impl is not None:
            return [registry.get(self.impl, "impl")]
        order = list(dict.fromkeys(self.wanted))
        entries = sorted(registry, key=lambda entry: order.index(entry.name) if entry.name in order else len(order))
        if self.scope is None:
            return entries
        set_priority, allowed = self.scope
        if not set_priority:
            return [entry for entry in entries if any(_covers(item, entry) for item in allowed)]
        ordered = [entry for item in allowed for entry in entries if _covers(item, entry)]
        return list(dict.fromkeys(ordered))


def current_selection(impl: str | None = None) -> Selection:
    """Return what decides in this thread now."""
    return Selection(impl, thread.state.scope, process.activation, process.preferred)


def parse_scope(backends: Any, set_priority: bool, registry: Registry) -> Scope:
    """Check the arguments of `sdpa_kernel` and return the scope that they describe.

    Raises:
        TypeError, ValueError: `backends` is empty, or holds something that is neither a family nor a name.
        UnknownImplementationError: no implementation has a given name.
    """
    if not isinstance(set_priority, bool):
        raise TypeError(f"set_priority: expected a bool, got {set_priority!r}")
    items = list(backends) if isinstance(backends, (list, tuple, set, frozenset)) else [backends]
    if not items:
        raise ValueError("backends: got an empty list; name at least one SDPBackend or implementation")
    entries: list[str] = []
    for item in items:
        if isinstance(item, str):
            entries.append(registry.get(item, "backends").name)
        else:
            try:
                entries.append(FAMILY + as_backend(item, "backends").name)
            except SpecError as error:
                raise TypeError(f"{error}; or the name of an implementation") from None
    return (set_priority, tuple(dict.fromkeys(entries)))


def describe_scope(scope: Scope) -> str:
    """Return a scope as the user would write it."""
    set_priority, entries = scope
    shown = ", ".join(item.removeprefix(FAMILY) if item.startswith(FAMILY) else repr(item) for item in entries)
    return f"sdpa_kernel([{shown}]{', set_priority=True' if set_priority else ''})"


def _covers(item: str, entry: Entry) -> bool:
    if not item.startswith(FAMILY):
        return item == entry.name
    return entry.spec.backend is not None and entry.spec.backend.name == item.removeprefix(FAMILY)
