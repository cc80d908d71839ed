"""Who decides about one call: `impl=`, the scope, the activation, the environment, measurement, and the registry.

The registry's order is `Entry.rank`: `torch`, attnplug's own implementations, all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnplug._errors import SpecError
from attnplug._registry.registry import Entry, Registry
from attnplug._selection.state import Scope, process, thread
from attnplug._types import ImplSpec, as_backend

FAMILY = ":"  # begins the entry of a family; no implementation's name begins so


@dataclass(frozen=True)
class Selection:
    """All that decides about one call, besides the call itself."""

    impl: str | None = None
    scope: Scope | None = None
    activation: str | None = None
    preferred: tuple[str, ...] = ()
    choice: str | None = None
    """What was measured to be the fastest for this kind of call."""

    @property
    def exact(self) -> str:
        """What names exactly the implementations that are allowed; empty if any is."""
        if self.impl is not None:
            return f"impl={self.impl!r}"
        return describe_scope(self.scope) if self.scope is not None else ""

    @property
    def wanted(self) -> tuple[str, ...]:
        """The preferred choices, which may be passed over with a warning."""
        if self.impl is not None:
            return ()
        return tuple(name for name in (self.activation, *self.preferred, self.choice) if name is not None)

    def candidates(self, registry: Registry) -> list[Entry]:
        """Return the allowed implementations, most preferred first; those that say so only if they are named."""
        if self.impl is not None:
            return [registry.get(self.impl, "impl")]
        order = list(dict.fromkeys(self.wanted))
        named = {*order, *(self.scope[1] if self.scope is not None else ())}
        possible = (entry for entry in registry if entry.name in named or not runs_only_where_named(entry.spec))
        entries = sorted(possible, key=lambda entry: order.index(entry.name) if entry.name in order else len(order))
        if self.scope is None:
            return entries
        set_priority, allowed = self.scope
        if not set_priority:
            return [entry for entry in entries if self.allows(entry.spec)]
        ordered = [entry for item in allowed for entry in entries if _covers(item, entry.spec)]
        return list(dict.fromkeys(ordered))

    def allows(self, spec: ImplSpec) -> bool:
        """Whether an implementation may run, here or where it is installed."""
        if self.impl is not None:
            return spec.name == self.impl
        return self.scope is None or any(_covers(item, spec) for item in self.scope[1])

    def exclusion(self, entry: Entry) -> str:
        """Return why `entry`, which is none of the candidates, is left out."""
        if self.impl is None and self.allows(entry.spec):
            quantized = "is quantized, and " if entry.spec.capabilities.quantized else ""
            return f"{quantized}runs only where {entry.name!r} is named"
        return f"outside {self.exact}"


def check_kind(impl: Any) -> None:
    """Raise TypeError unless `impl` is a name or None; which names there are, the registry says."""
    if not (impl is None or isinstance(impl, str)):
        raise TypeError(
            f"impl: expected the name of an implementation or None, got {impl!r}; sdpa_kernel takes families too"
        )


def current_selection(impl: str | None, choice: str | None = None) -> Selection:
    """Return what decides in this thread now; `choice` is what was measured for the call."""
    return Selection(impl, thread.state.scope, process.activation, process.preferred, choice)


def parse_scope(backends: Any, set_priority: bool, registry: Registry) -> Scope:
    """Check the arguments of `sdpa_kernel` and return the scope that they describe.

    Raises:
        TypeError, ValueError: `backends` is empty, holds something that is neither a family nor a name, or is a set
            whose order would count.
        UnknownImplementationError: no implementation has a given name.
    """
    if not isinstance(set_priority, bool):
        raise TypeError(f"set_priority: expected a bool, got {set_priority!r}")
    items = listed(backends, set_priority)
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


def listed(backends: Any, set_priority: bool) -> list[Any]:
    """Return what `backends` holds, in its order."""
    if not isinstance(backends, (list, tuple, set, frozenset)):
        return [backends]
    if set_priority and isinstance(backends, (set, frozenset)) and len(backends) > 1:
        raise TypeError("backends: a set has no order, which set_priority=True asks for; pass a list")
    return list(backends)


def describe_scope(scope: Scope) -> str:
    """Return a scope as the user would write it."""
    set_priority, entries = scope
    shown = ", ".join(item.removeprefix(FAMILY) if item.startswith(FAMILY) else repr(item) for item in entries)
    return f"sdpa_kernel([{shown}]{', set_priority=True' if set_priority else ''})"


def runs_only_where_named(spec: ImplSpec) -> bool:
    """Whether neither the order of the registry nor a family chooses an implementation."""
    return spec.named_only or spec.capabilities.quantized


def _covers(item: str, spec: ImplSpec) -> bool:
    if not item.startswith(FAMILY):
        return item == spec.name
    return spec.backend is not None and spec.backend.name == item.removeprefix(FAMILY)
