"""Installed plugins to registered implementations, one at a time, so that no plugin can hide another.

pluggy's own `load_setuptools_entrypoints` stops at the first plugin that raises; here each entry point
is loaded, validated and asked by itself, and one that fails becomes a record with its exception.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import threading
import warnings
from typing import Any

import pluggy

from attnplug._errors import ConfigError, DuplicateImplementationError, PluginWarning, SpecError, did_you_mean
from attnplug._registry import hooks
from attnplug._registry.config import get_config
from attnplug._registry.registry import BUILTIN, Registry, report_broken
from attnplug._types import ImplSpec
from attnplug._version import __version__

GROUP = "attnplug"
BUILTIN_PLUGIN = "attnplug.builtin"

_lock = threading.RLock()
_registry: Registry | None = None
_loading: Registry | None = None


def get_registry() -> Registry:
    """Return the registry of this process; the first call fills it with the built-ins and the plugins.

    Raises:
        ConfigError, PluginError: what `discover` raises; the next call tries again.
    """
    global _registry, _loading
    if _registry is not None:
        return _registry
    with _lock:
        if _registry is None and _loading is None:
            _loading = Registry()
            try:
                for spec in ask(BUILTIN_PLUGIN, importlib.import_module(BUILTIN_PLUGIN)):
                    _loading.add(spec, BUILTIN, __version__)
                discover(_loading)
                _registry = _loading
            finally:
                _loading = None
        return _registry or _loading  # type: ignore[return-value]  # a plugin may ask while it loads


def discover(registry: Registry) -> None:
    """Add the implementations of every installed plugin to `registry`.

    Distributions are taken in the order of their names, so that who wins a contested name does not
    depend on the order of `sys.path`.

    Raises:
        ConfigError: `ATTNPLUG_LOAD` names an entry point that is not installed.
    """
    for entry_point in _allowed(installed_plugins()):
        distribution, version = _origin(entry_point)
        try:
            specs = ask(entry_point.value, entry_point.load())
        except (Exception, SystemExit) as error:  # sys.exit in a plugin must not end the host
            registry.add_failed(entry_point.name, distribution, version, error)
            report_broken(f"plugin {entry_point.name!r} of {distribution} {version}", error)
            continue
        for spec in specs:
            try:
                registry.add(spec, distribution, version)
            except DuplicateImplementationError as error:
                registry.add_failed(entry_point.name, distribution, version, error)
                report_broken(f"implementation {spec.name!r} of {distribution} {version}", error)


def installed_plugins() -> list[Any]:
    """Return the entry points of group `attnplug`, by distribution and name; nothing is imported."""
    found = importlib.metadata.entry_points(group=GROUP)
    return sorted(found, key=lambda entry_point: (*_origin(entry_point), entry_point.name))


def _origin(entry_point: Any) -> tuple[str, str]:
    """Return the name and version of the distribution; an interrupted uninstall leaves one without metadata."""
    try:
        return entry_point.dist.name or "unknown", entry_point.dist.version or ""
    except Exception:  # what importlib.metadata raises for it depends on Python's version
        return "unknown", ""


def _allowed(entry_points: list[Any]) -> list[Any]:
    config, known = get_config(), {entry_point.name for entry_point in entry_points}
    for name in sorted(config.load or ()):
        if name not in known:
            raise ConfigError(
                f"ATTNPLUG_LOAD: no installed plugin is named {name!r}{did_you_mean(name, known)}; "
                f"installed: {', '.join(sorted(known)) or 'none'}"
            )
    for name in sorted(config.disable - known):
        warnings.warn(
            PluginWarning(f"ATTNPLUG_DISABLE: no installed plugin is named {name!r}{did_you_mean(name, known)}"),
            stacklevel=4,
        )
    return [
        entry_point
        for entry_point in entry_points
        if entry_point.name not in config.disable and (config.load is None or entry_point.name in config.load)
    ]


def ask(name: str, plugin: Any) -> list[ImplSpec]:
    """Return what one plugin, called `name` in messages, registers.

    A manager for each plugin keeps a failure, and a misspelt hook, where it belongs.

    Raises:
        Exception: whatever the plugin raises, or what pluggy has against it.
        SpecError: it does not answer the hook, misspells it, or answers with something else than specifications.
    """
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    manager.register(plugin, name=name)
    known = [role for role, hook in vars(manager.hook).items() if hook.has_spec()]
    for role, hook in vars(manager.hook).items():
        if role not in known and not all(answer.optionalhook for answer in hook.get_hookimpls()):
            raise SpecError(
                f"{name}: {role!r} is not a hook of attnplug{did_you_mean(role, known)}; "
                f"known: {', '.join(sorted(known))}"
            )
    if not manager.hook.attnplug_register_impls.get_hookimpls():
        raise SpecError(
            f"{name} answers no hook of attnplug; define attnplug_register_impls() and mark it with @attnplug.hookimpl"
        )
    answers = manager.hook.attnplug_register_impls()
    if not answers:  # pluggy drops an answer of None
        raise SpecError(f"{name}: attnplug_register_impls returned None; return a list of ImplSpec")
    return [spec for answer in answers for spec in _checked(name, answer)]


def _checked(name: str, answer: Any) -> list[ImplSpec]:
    answer = [answer] if isinstance(answer, ImplSpec) else answer
    if not isinstance(answer, (list, tuple)) or not all(isinstance(spec, ImplSpec) for spec in answer):
        raise SpecError(f"{name}: attnplug_register_impls must return a list of ImplSpec, got {answer!r}")
    return list(answer)
