"""Names to implementations, and a generation that every change raises.

What caches a decision (the plan cache, a compiled graph) caches the generation with it, and so
never acts on a registry that has changed since.
"""

from __future__ import annotations

import importlib
import itertools
import os
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from attnplug._errors import (
    BROKEN,
    DuplicateImplementationError,
    PluginError,
    PluginWarning,
    UnknownImplementationError,
)
from attnplug._messages import is_stop, of_error, printable, warn
from attnplug._registry import remedies
from attnplug._registry.catalogue import KNOWN, OWN
from attnplug._registry.config import get_config
from attnplug._registry.forks import KERNEL, REGISTRY, lock
from attnplug._registry.kernel import Kernel, load_kernel
from attnplug._registry.machine import device_types, missing_modules
from attnplug._tracing import constant_in_traces
from attnplug._types import FAMILIES, Capabilities, ImplRecord, ImplSpec

BUILTIN = "attnplug"
PROGRAM = "this program"
DEFAULT = "torch"
NOTHING = Capabilities(devices=(), dtypes=())
"""What is known to be supported by a plugin that is not loaded."""
_FAMILIES = {
    spelling: f"is a family: sdpa_kernel takes SDPBackend.{name}"
    for name in FAMILIES
    for spelling in (name, name.lower())
}
"""What is said to those who write a family where a name is asked for."""
_ELSEWHERE = {
    other: f"is called {name!r} here"
    for name, others in {
        "torch": ("sdpa", "native"),
        "math_ref": ("eager", "reference"),
        "flash_attn2": ("flash_attention_2", "FA2", "fa2"),
        "flash_attn3": ("flash_attention_3",),
        "flash_attn4": ("flash_attention_4",),
        "sage_attention": ("sage", "sageattn"),
        "flex": ("flex_attention",),
        "efficient_cuda": ("cutlass", "mem_efficient", "memory_efficient"),
    }.items()
    for other in others
} | dict.fromkeys(("flash", "FLASH"), "may be the family SDPBackend.FLASH_ATTENTION, or 'flash_attn2'")
"""What is said to those who write what an implementation is called in transformers, diffusers or PyTorch."""

_HERE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
_KERNELS = os.path.join(_HERE, "builtin", "")
_IMPORTS = "<frozen importlib", os.path.join(os.path.dirname(importlib.__file__), "")
_OF_A_DATACLASS = "<string>"
"""The file of the `__init__` that Python generates for a declaration."""


@dataclass(eq=False)
class Entry:
    """An implementation in the registry, with what was found out about it since."""

    spec: ImplSpec
    distribution: str
    version: str = ""
    plugin: str = ""
    """The name of the entry point that brought it; empty if none did."""
    module: str = ""
    """What that entry point names."""
    broken: str = ""
    remedy: str = ""
    """The command that fixes it where it is broken."""
    loaded: Kernel | None = None
    _error: BaseException | None = None
    _loading: bool = False
    _lock: Any = field(default_factory=partial(lock, KERNEL))

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def rank(self) -> tuple[bool, bool, int, str, str]:
        """What the implementations are sorted by: `torch`, attnplug's own, then all others.

        Within each, by priority, distribution and name. Whatever priority a plugin claims, installing it takes no
        call away from what ran before. A distribution cannot claim to be one of attnplug's: an installed one is
        known by its metadata, and no two of one name can be installed.
        """
        own = self.distribution in OWN
        return (not own or self.name != DEFAULT, not own, -self.spec.priority, self.distribution, self.name)

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
        """Return why no call on this machine can use this; empty if one may. Asks the author's code."""
        devices = self.spec.capabilities.devices
        if devices is not None and {"cpu", "cuda"}.issuperset(devices) and device_types().isdisjoint(devices):
            return (
                f"needs a {' or '.join(sorted(devices))} device, and this machine has none"  # first: nothing brings it
            )
        return self.missing() or ("; ".join(self.loaded.faults()) if self.loaded is not None else "")

    def load(self) -> Kernel | None:
        """Return the kernel, importing it at the first call.

        None if it is broken, which `broken` explains, or if it asks for itself while it is imported.

        Raises:
            PluginError: the import failed, and `ATTNPLUG_STRICT` is set. Without it the first failure warns.
        """
        with self._lock:
            if self.loaded is None and not self._loading:
                what = f"the kernel of implementation {self.name!r} ({self.distribution})"
                if self._error is not None:
                    if get_config().strict:
                        report_broken(what, self._error)
                    return None
                self._loading = True
                try:
                    self.loaded = load_kernel(self.spec)
                except BaseException as error:  # whatever a kernel raises must not end the host
                    if is_stop(error):
                        raise
                    self._error, self.broken = error, describe(error)
                    self.remedy = remedies.reinstalled(self.distribution) if self.plugin else ""
                    report_broken(what, error)
                finally:
                    self._loading = False
        return self.loaded

    @constant_in_traces
    def constant(self, function: Callable[[Entry], str]) -> str:
        """Return what `function` says of this entry, outside the graph; a trace has to guard on the entry."""
        return function(self)

    def record(self) -> ImplRecord:
        """Return what is known of this. Asks the author's code, so no lock may be held."""
        reason = self.broken or self.unavailable()
        status = "broken" if self.broken else "unavailable" if reason else "available"
        spec = self.spec
        return ImplRecord(
            *(spec.name, spec.backend, spec.priority, self.distribution, self.version, spec.capabilities),
            *(status, reason, self.remedy if self.broken else self._brings() if reason else ""),
            *(self.plugin, self.module, spec.kernel if isinstance(spec.kernel, str) else ""),
        )

    def _brings(self) -> str:
        """Return the command that brings what this needs; empty if none does."""
        devices = self.spec.capabilities.devices
        if devices is not None and "cuda" in devices and device_types().isdisjoint(devices):
            return remedies.gpu_build()
        return self.spec.install if missing_modules(self.spec.requires) else ""


class Registry:
    """The implementations of this process. Every method is safe to call from any thread."""

    def __init__(self) -> None:
        self.generation = 0
        self._lock = lock(REGISTRY)
        self._entries: dict[str, Entry] = {}
        self._names: tuple[str, ...] = ()
        self._contested: dict[str, list[Entry]] = {}
        self._plugins_out: list[ImplRecord] = []
        self.listeners: list[Callable[[Registry], None]] = []
        """Called after each change; callers keep something in step with this registry."""
        self.installed_since: Callable[[], Collection[str]] = tuple
        """Returns the names of the entry points that were not there when plugins were looked for."""

    def add(self, spec: ImplSpec, distribution: str, version: str = "", *, replace: bool = False) -> None:
        """Add an implementation, in the place of one of the same name and distribution if `replace` is set.

        Raises:
            DuplicateImplementationError: the name is taken; the registry is unchanged.
        """
        with self._lock:
            owner = self._owner(spec.name)
            if owner is not None and not (replace and owner == distribution == PROGRAM):
                again = f"unregister_impl({spec.name!r}) first, or register with replace=True"
                way_out = again if owner == distribution == PROGRAM else "choose another name"
                raise DuplicateImplementationError(spec.name, owner, distribution, way_out)
            self._entries[spec.name] = Entry(spec, distribution, version)
        self.changed()

    def claim(self, entries: Iterable[Entry]) -> list[DuplicateImplementationError]:
        """Add the implementations of installed plugins, and return an error for each name that several claim.

        They are all listed, and none of them runs under it. The names of the built-in ones are not to be had.
        """
        claims: dict[str, list[Entry]] = {}
        errors = []
        for entry in entries:
            claims.setdefault(entry.name, []).append(entry)
        with self._lock:
            for name, claimants in claims.items():
                owner = self._entries.get(name)
                if owner is None and len(claimants) == 1:
                    self._entries[name] = claimants[0]
                    continue
                error = _duplicate(owner, claimants)
                errors.append(error)
                for entry in claimants:
                    entry.broken = describe(error)
                    entry.remedy = remedies.left_out(_unique_name(claimants, entry))
                    if owner is not None:
                        self.leave_out(
                            ImplRecord(
                                *(entry.plugin, None, 0, entry.distribution, entry.version, NOTHING, "broken"),
                                *(entry.broken, entry.remedy, entry.plugin, entry.module),
                            )
                        )
                if owner is None:
                    self._contested[name] = claimants
        self.changed()
        return errors

    def leave_out(self, record: ImplRecord) -> None:
        """Remember a plugin that is not loaded, or not all of it, by a record under its entry point's name."""
        with self._lock:
            self._plugins_out.append(record)

    def remove(self, name: str) -> None:
        """Remove an implementation that a program registered.

        Raises:
            UnknownImplementationError: there is none of this name.
            ValueError: it is built in or comes from an installed package.
        """
        with self._lock:
            entry = self.get(name, "name")
            if entry.distribution != PROGRAM:
                raise ValueError(
                    f"name: {name!r} belongs to the distribution {entry.distribution}; only implementations added "
                    f"with register_impl can be unregistered (ATTNPLUG_DISABLE keeps a plugin from loading)"
                )
            del self._entries[name]
        self.changed()

    def get(self, name: str, where: str = "", also: Iterable[str] = ()) -> Entry:
        """Return the implementation of this name.

        Raises:
            TypeError: `name` is not a string.
            UnknownImplementationError: there is none, or it is broken, disabled or not installed, which the message
                says; `where` says where the name came from, `also` what else would have been accepted there.
            DuplicateImplementationError: several distributions claim the name.
        """
        if not isinstance(name, str):
            raise TypeError(f"{where}: expected the name of an implementation, got {name!r}")
        entry = self._entries.get(name)
        if entry is not None:
            return entry
        contested = self._contested.get(name)
        if contested is not None:
            raise _duplicate(None, contested)
        absent = _ELSEWHERE | _FAMILIES | self.absent() | self._installed_since()
        raise UnknownImplementationError(name, (*self.names(), *also), where, absent)

    def absent(self) -> dict[str, str]:
        """Return the names that are known and cannot be used, each with the reason, which completes a sentence."""
        with self._lock:
            entries, contested, records = dict(self._entries), dict(self._contested), list(self._plugins_out)
        broken, left_out = BROKEN + ": {}", "is {}"
        out = {
            record.name: (broken if record.status == "broken" else left_out).format(record.reason) for record in records
        }
        loaded = {entry.plugin for entry in (*entries.values(), *itertools.chain(*contested.values()))}
        absent = dict(out)
        for name, known in KNOWN.items():
            if known.entry_point in out:
                absent.setdefault(name, f"belongs to the plugin {known.entry_point!r}, which {out[known.entry_point]}")
            elif known.entry_point not in loaded:
                absent.setdefault(name, f"is not installed: {known.install}")
        absent |= {name: f"is claimed by {_joined(claimants)}" for name, claimants in contested.items()}
        return {name: reason for name, reason in absent.items() if name not in entries}

    def _installed_since(self) -> dict[str, str]:
        """Return the names of `absent()` whose plugin has been installed since, as in a notebook, with what helps."""
        later = self.installed_since()
        names = {*later, *(name for name, known in KNOWN.items() if known.entry_point in later)}
        return dict.fromkeys(names, "was installed after this process had looked for plugins; restart it")

    def remedy(self, name: str) -> str:
        """Return the command that brings an implementation of the catalogue that is among `absent()`."""
        known = KNOWN[name]
        with self._lock:
            out = [record.remedy for record in self._plugins_out if record.entry_point == known.entry_point]
        return out[0] if out else known.install

    def __contains__(self, name: str) -> bool:
        """Whether the name is taken."""
        return name in self._entries or name in self._contested

    def __iter__(self) -> Iterator[Entry]:
        with self._lock:
            entries = list(self._entries.values())
        return iter(sorted(entries, key=lambda entry: entry.rank))

    def names(self) -> list[str]:
        """Return the sorted names; without a lock, which a trace could not take."""
        return list(self._names)

    def records(self) -> list[ImplRecord]:
        """Return a record for each implementation, in the order of preference, and for what cannot be used."""
        with self._lock:
            contested = [entry for name in sorted(self._contested) for entry in self._contested[name]]
            out = list(self._plugins_out)
        return [entry.record() for entry in (*self, *contested)] + out

    def changed(self) -> None:
        """Raise the generation: every decision made before is void."""
        with self._lock:
            self._names = tuple(sorted(self._entries))
            self.generation += 1
        for listener in self.listeners:
            listener(self)

    def _owner(self, name: str) -> str | None:
        """Return the distribution, or distributions, that have or claim a name."""
        entries = [self._entries[name]] if name in self._entries else self._contested.get(name, [])
        return _joined(entries) or None


def _joined(entries: list[Entry]) -> str:
    return " and ".join(entry.distribution for entry in entries)


def _duplicate(owner: Entry | None, claimants: list[Entry]) -> DuplicateImplementationError:
    """Return the error of a name that `claimants` want, and that is `owner`'s if there is one."""
    name = claimants[0].name
    if owner is not None:
        return DuplicateImplementationError(name, owner.distribution, _joined(claimants), "choose another name")
    first, *others = claimants
    settings = " or ".join(f"ATTNPLUG_DISABLE={_unique_name(claimants, entry)}" for entry in claimants)
    way_out = f"neither runs under this name until one is left out, with {settings}"
    return DuplicateImplementationError(name, first.distribution, _joined(others), way_out)


def _unique_name(claimants: list[Entry], entry: Entry) -> str:
    """Return what `ATTNPLUG_DISABLE` may call an entry's plugin that tells it from those of the others."""
    alone = [each.plugin for each in claimants].count(entry.plugin) == 1
    return entry.plugin if alone else f"{entry.distribution}:{entry.plugin}"


def describe(error: BaseException) -> str:
    """Return an exception in one line, with the innermost place in which it was raised.

    What attnplug raises about a declaration is found where that is made, and not in attnplug; what Python raises where
    it looks for a module, where somebody asked for that.
    """
    text = of_error(error)
    frames = list(traceback.extract_tb(error.__traceback__))
    while frames and _is_import(frames[-1]):
        frames.pop()
    if isinstance(error, SyntaxError) or not frames:
        return text
    if _is_machinery(frames[-1]):
        frames = [frame for frame in frames if not (_is_machinery(frame) or frame.filename == _OF_A_DATACLASS)]
    return f"{text} (in {printable(frames[-1].filename)}, line {frames[-1].lineno})" if frames else text


def _is_import(frame: traceback.FrameSummary) -> bool:
    """Whether this is of what Python, or the library that replaces a part of it where it is installed, imports with."""
    folder = os.path.basename(os.path.dirname(frame.filename))
    return frame.filename.startswith(_IMPORTS) or folder == "importlib_metadata"


def _is_machinery(frame: traceback.FrameSummary) -> bool:
    """Whether this is code of attnplug, and none of its kernels."""
    return frame.filename.startswith(_HERE) and not frame.filename.startswith(_KERNELS)


def report_broken(what: str, error: BaseException, reason: str = "") -> None:
    """Warn that a plugin is broken, or raise it under `ATTNPLUG_STRICT`."""
    message = f"{what} could not be loaded: {reason or describe(error)}"
    if get_config().strict:
        raise PluginError(message) from error
    warn(PluginWarning(message))
