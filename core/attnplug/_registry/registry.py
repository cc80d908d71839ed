"""Names to implementations, and a generation that every change raises.

Whoever keeps a decision (the plan cache, a compiled graph) keeps the generation beside it, and so
never acts on a registry that has changed since.
"""

from __future__ import annotations

import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from attnplug._errors import DuplicateImplementationError, PluginError, PluginWarning, UnknownImplementationError
from attnplug._registry.config import get_config
from attnplug._registry.kernel import Kernel, load_kernel
from attnplug._registry.machine import device_types, missing_modules
from attnplug._types import Capabilities, ImplRecord, ImplSpec

BUILTIN = "attnplug"
PROGRAM = "this program"
DEFAULT = "torch"


@dataclass(eq=False)
class Entry:
    """An implementation in the registry, with what was found out about it since."""

    spec: ImplSpec
    distribution: str
    version: str = ""
    broken: str = ""
    loaded: Kernel | None = None
    _loading: bool = False
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def rank(self) -> tuple[bool, int, str]:
        """What the implementations are sorted by: `torch`, then by priority, then by name.

        `torch` stands first whatever priority a plugin claims: installing a package never changes what
        runs by itself.
        """
        return (self.name != DEFAULT, -self.spec.priority, self.name)

    @property
    def kernel(self) -> Kernel:
        """The kernel of an implementation that was chosen, and so has been loaded."""
        assert self.loaded is not None, self.name
        return self.loaded

    def missing(self) -> str:
        """Return which modules this needs and does not find; empty if none."""
        missing = missing_modules(self.spec.requires)
        if not missing:
            return ""
        return f"needs {', '.join(missing)}, not installed" + (f" ({self.spec.install})" if self.spec.install else "")

    def unavailable(self) -> str:
        """Return why no call on this machine can use this; empty if one may."""
        devices = self.spec.capabilities.devices
        if devices is not None and {"cpu", "cuda"}.issuperset(devices) and device_types().isdisjoint(devices):
            return self.missing() or f"needs a {' or '.join(sorted(devices))} device, and this machine has none"
        return self.missing() or ("; ".join(self.loaded.faults()) if self.loaded is not None else "")

    def load(self) -> Kernel | None:
        """Return the kernel, importing it at the first call.

        None if it is broken, which `broken` explains, or if it asks for itself while it is imported.

        Raises:
            PluginError: the import failed, and `ATTNPLUG_STRICT` is set. Without it the first failure warns.
        """
        with self._lock:
            if self.loaded is None and not self.broken and not self._loading:
                self._loading = True
                try:
                    self.loaded = load_kernel(self.spec)
                except (Exception, SystemExit) as error:  # sys.exit in a kernel must not end the host
                    self.broken = describe(error)
                    report_broken(f"the kernel of implementation {self.name!r} ({self.distribution})", error)
                finally:
                    self._loading = False
        return self.loaded

    def record(self) -> ImplRecord:
        reason = self.broken or self.unavailable()
        status = "broken" if self.broken else "unavailable" if reason else "available"
        spec = self.spec
        return ImplRecord(
            spec.name, spec.backend, spec.priority, self.distribution, self.version, spec.capabilities, status, reason
        )


class Registry:
    """The implementations of this process. Every method is safe to call from any thread."""

    def __init__(self) -> None:
        self.generation = 0
        self._lock = threading.RLock()
        self._entries: dict[str, Entry] = {}
        self._names: tuple[str, ...] = ()
        self._failed: list[ImplRecord] = []
        self.listeners: list[Callable[[Registry], None]] = []
        """Called after each change, by whoever keeps something in step with this registry."""

    def add(self, spec: ImplSpec, distribution: str, version: str = "") -> None:
        """Add an implementation.

        Raises:
            DuplicateImplementationError: the name is taken; the registry is unchanged.
        """
        with self._lock:
            if (owner := self._entries.get(spec.name)) is not None:
                raise DuplicateImplementationError(spec.name, owner.distribution, distribution)
            self._entries[spec.name] = Entry(spec, distribution, version)
            self.changed()

    def add_failed(self, name: str, distribution: str, version: str, error: BaseException) -> None:
        """Remember a plugin that could not be loaded, under its entry point's name."""
        with self._lock:
            self._failed.append(
                ImplRecord(name, None, 0, distribution, version, Capabilities(), "broken", describe(error))
            )
            self.changed()

    def remove(self, name: str) -> None:
        """Remove an implementation that a program registered.

        Raises:
            UnknownImplementationError: there is none of this name.
            ValueError: it is built in or comes from an installed package.
        """
        with self._lock:
            entry = self.get(name)
            if entry.distribution != PROGRAM:
                raise ValueError(
                    f"name: {name!r} belongs to the distribution {entry.distribution}; only implementations added "
                    f"with register_impl can be unregistered (ATTNPLUG_DISABLE keeps a plugin from loading)"
                )
            del self._entries[name]
            self.changed()

    def get(self, name: str, where: str = "") -> Entry:
        """Return the implementation of this name.

        Raises:
            UnknownImplementationError: there is none; `where` says where the name came from.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise UnknownImplementationError(name, self._entries, where)
        return entry

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry]:
        with self._lock:
            return iter(sorted(self._entries.values(), key=lambda entry: entry.rank))

    def names(self) -> list[str]:
        """Return the sorted names; without a lock, which a trace could not take."""
        return list(self._names)

    def records(self) -> list[ImplRecord]:
        with self._lock:
            return [entry.record() for entry in self] + list(self._failed)

    def changed(self) -> None:
        """Raise the generation: every decision made before is void."""
        with self._lock:
            self._names = tuple(sorted(self._entries))
            self.generation += 1
        for listener in self.listeners:
            listener(self)


def describe(error: BaseException) -> str:
    """Return an exception in one line, with the innermost place in which it was raised."""
    try:
        message = " ".join(str(error).split())
    except Exception:  # an exception of a plugin may be anything, and must not break its own report
        message = "its message cannot be shown"
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) or not frames:
        return text
    return f"{text} (in {frames[-1].filename}, line {frames[-1].lineno})"


def report_broken(what: str, error: BaseException) -> None:
    """Warn that a plugin is broken, or raise it under `ATTNPLUG_STRICT`."""
    message = f"{what} could not be loaded: {describe(error)}"
    if get_config().strict:
        raise PluginError(message) from error
    warnings.warn(PluginWarning(message), stacklevel=3)
