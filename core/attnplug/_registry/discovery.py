"""Installed plugins to registered implementations, one at a time, so that no plugin can hide another.

pluggy's own `load_setuptools_entrypoints` stops at the first plugin that raises; here each entry point
is loaded, validated and asked by itself, and one that fails becomes a record with its exception.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pluggy

from attnplug._errors import ConfigError, PluginError, PluginWarning, SpecError, did_you_mean
from attnplug._messages import is_stop, printable, warn
from attnplug._registry import hooks, remedies
from attnplug._registry.catalogue import KNOWN
from attnplug._registry.config import get_config
from attnplug._registry.forks import DISCOVERY, lock
from attnplug._registry.registry import BUILTIN, NOTHING, Entry, Registry, describe, report_broken
from attnplug._types import ImplRecord, ImplSpec
from attnplug._version import __version__

GROUP = "attnplug"
BUILTIN_PLUGIN = "attnplug.builtin"

_UNKNOWN_HERE = re.compile(
    r"Feature of attnplug|unknown dtype|from 'attnplug'|(module 'attnplug'|'SDPBackend') has no attribute"
    r"|(Capabilities|ImplSpec)\.__init__\(\) got an unexpected keyword"
)
"""In the error of a plugin that uses what this version of attnplug does not have, or that has a typing error."""

_lock = lock(DISCOVERY)
_registry: Registry | None = None
_filling = False


def get_registry() -> Registry:
    """Return the registry of this process; the first call fills it with the built-ins and the plugins.

    It cannot be used before it is filled: other threads wait, and what asks meanwhile, a plugin that is being
    imported or a signal handler, is refused.

    Raises:
        ConfigError: the environment means nothing.
        PluginError: a plugin is broken and `ATTNPLUG_STRICT` is set; or it is asked for while it is being filled. The
            next call tries again.
    """
    global _registry, _filling
    if _registry is not None:
        return _registry
    with _lock:
        if _registry is None:
            if _filling:
                raise PluginError(
                    "attnplug was asked for its implementations while it loads the plugins; a plugin only implements "
                    "the hook attnplug_register_impls here, and may ask once it is used"
                )
            _filling = True
            try:
                _registry = _filled()
            finally:
                _filling = False
        return _registry


def _filled() -> Registry:
    registry = Registry()
    for spec in ask(BUILTIN_PLUGIN, importlib.import_module(BUILTIN_PLUGIN)):
        registry.add(spec, BUILTIN, __version__)
    discover(registry)
    return registry


@dataclass(frozen=True)
class Plugin:
    """An entry point of group `attnplug`, and the distribution that it belongs to."""

    name: str
    distribution: str
    version: str
    needs: str
    """The range of attnplug that the distribution asks for, such as `>=0.2,<0.3`; empty if it asks for none."""
    entry_point: Any

    @property
    def names(self) -> frozenset[str]:
        """What `ATTNPLUG_LOAD` and `ATTNPLUG_DISABLE` may call it; the longer one, where two have one name."""
        return frozenset({self.name, f"{self.distribution}:{self.name}"})

    @property
    def module(self) -> str:
        """The module, or the object in one, that the entry point names."""
        return printable(self.entry_point.value)

    def left_out(self, status: str, reason: str, remedy: str) -> ImplRecord:
        """Return the record of a plugin that is not loaded, or not all of it, under its own name."""
        return ImplRecord(
            *(self.name, None, 0, self.distribution, self.version, NOTHING, status, reason, remedy),
            *(self.name, self.module),
        )

    def __str__(self) -> str:
        return f"plugin {self.name!r} of {self.distribution} {self.version}".rstrip()


def discover(registry: Registry) -> None:
    """Add the implementations of every installed plugin to `registry`.

    Raises:
        ConfigError: `ATTNPLUG_LOAD` names an entry point that is not installed.
        PluginError: a plugin is broken, and `ATTNPLUG_STRICT` is set.
    """
    entries: list[Entry] = []
    installed = installed_plugins()
    registry.installed_since = partial(_installed_since, frozenset(plugin.names for plugin in installed))
    for plugin in _allowed(registry, installed):
        try:
            specs = ask(plugin.name, plugin.entry_point.load(), plugin.entry_point.value)
        except BaseException as error:  # whatever a plugin raises must not end the host
            if is_stop(error):
                raise
            mismatch, remedy = _version_mismatch(plugin, error)
            reason = describe(error) + _unfound(plugin, error) + mismatch
            registry.leave_out(plugin.left_out("broken", reason, remedy or remedies.reinstalled(plugin.distribution)))
            report_broken(str(plugin), error, reason)
        else:
            origin = plugin.distribution, plugin.version, plugin.name, plugin.module
            entries += [Entry(spec, *origin) for spec in specs]
    for duplicate in registry.claim(entries):
        report_broken(f"implementation {duplicate.name!r}", duplicate)


def installed_plugins() -> list[Plugin]:
    """Return the entry points of group `attnplug`, by distribution and name; nothing is imported."""
    import importlib_metadata  # 20 ms that `import attnplug` need not pay

    found: Iterable[Any]
    try:
        found = importlib_metadata.entry_points(group=GROUP)
    except ValueError:  # some releases stop at the first entry point, in any group, that means nothing
        found = _entry_points_one_by_one()
    plugins = [_plugin(entry_point) for entry_point in found]
    return sorted(plugins, key=lambda plugin: (plugin.distribution, plugin.version, plugin.name))


def misspelt_groups() -> list[tuple[str, Plugin]]:
    """Return the groups that look like `attnplug` misspelt, each with an entry point that nothing reads there.

    A distribution that has plugins in the right group knows how it is spelt, and may have groups of its own.
    """
    import importlib_metadata

    try:
        every = list(importlib_metadata.entry_points())
    except ValueError:  # as in `installed_plugins`
        return []
    right = {plugin.distribution for plugin in installed_plugins()}
    meant = [GROUP, *(f"{GROUP}{word}" for word in ("impls", "plugins", "kernels", "registerimpls"))]
    found = []
    for entry_point in every:
        bare = re.sub(r"[\W_]", "", entry_point.group).lower()
        if entry_point.group != GROUP and difflib.get_close_matches(bare, meant, cutoff=0.85):
            found.append((printable(entry_point.group), _plugin(entry_point)))
    return [(group, plugin) for group, plugin in found if plugin.distribution not in right]


def _installed_since(before: frozenset[frozenset[str]]) -> set[str]:
    return {plugin.name for plugin in installed_plugins() if plugin.names not in before}


@dataclass(frozen=True)
class _EntryPoint:
    """An entry point whose value is looked at when it is loaded."""

    name: str
    value: str
    dist: Any

    def load(self) -> Any:
        from importlib_metadata import EntryPoint

        return EntryPoint(self.name, self.value, GROUP).load()


def _entry_points_one_by_one() -> Iterator[_EntryPoint]:
    """Return the entry points of the first distribution of each name, as importlib-metadata does."""
    import configparser

    from importlib_metadata import distributions

    seen = set()
    for distribution in distributions():
        name = re.sub(r"[-_.]+", "-", _fields(distribution)[0].get("Name", "")).lower()
        sections = configparser.ConfigParser(delimiters=("=",), interpolation=None, strict=False)
        sections.optionxform = str  # type: ignore[assignment, method-assign]  # configparser's documented way
        try:
            sections.read_string(distribution.read_text("entry_points.txt") or "")
        except (configparser.Error, UnicodeDecodeError):  # nothing in it can be named
            continue
        if name not in seen and GROUP in sections:
            yield from (_EntryPoint(key, value, distribution) for key, value in sections[GROUP].items())
        seen.add(name)


def _plugin(entry_point: Any) -> Plugin:
    """Return an entry point with its origin; an interrupted uninstall leaves one without metadata."""
    first, every = _fields(entry_point.dist)
    asked = (re.match(r"attnplug\s*\(?([<>=!~][^;)]*)", value) for name, value in every if name == "Requires-Dist")
    return Plugin(
        name=printable(entry_point.name),
        distribution=printable(first.get("Name", "unknown")),
        version=printable(first.get("Version", "")),
        needs=printable(next((match[1] for match in asked if match), "")),
        entry_point=entry_point,
    )


def _fields(distribution: Any) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Return the first of each, and all, of the fields of a distribution's metadata.

    They are read from the text: to parse it, importlib-metadata imports 30 modules for electronic mail.
    """
    try:
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    except (AttributeError, UnicodeDecodeError):  # there is no distribution, or what it has is not text
        text = ""
    lines = (line.partition(": ") for line in text.partition("\n\n")[0].splitlines())
    every = [(name, value) for name, _, value in lines]
    return dict(reversed(every)), every


def _allowed(registry: Registry, plugins: list[Plugin]) -> list[Plugin]:
    """Return the plugins that the environment lets load; the others are listed with the variable that forbids it."""
    config, built_in = get_config(), registry.names()
    names, known = sorted({plugin.name for plugin in plugins}), {name for plugin in plugins for name in plugin.names}
    for name in sorted((config.load or frozenset()) - known):
        close = _meant(name, known, built_in)
        install = f"; to install it: {KNOWN[name].install}" if name in KNOWN and not close else ""
        raise ConfigError(
            f"ATTNPLUG_LOAD: no installed plugin is named {name!r}{close or ';'} "
            f"installed: {', '.join(names) or 'none'}{install}"
        )
    for name in sorted(config.disable - known):
        warn(PluginWarning(f"ATTNPLUG_DISABLE: no installed plugin is named {name!r}{_meant(name, known, built_in)}"))
    allowed = []
    for plugin in plugins:
        reason = ""
        if config.disable & plugin.names:
            reason = "disabled by ATTNPLUG_DISABLE"
        elif config.load is not None and not config.load & plugin.names:
            reason = "not among the plugins of ATTNPLUG_LOAD"
        if reason:
            registry.leave_out(plugin.left_out("unavailable", reason, remedies.allowed_again(plugin.names)))
        else:
            allowed.append(plugin)
    return allowed


def _meant(name: str, plugins: set[str], built_in: Collection[str]) -> str:
    """Return which plugin was probably meant, by a name that none has, among others that of an implementation."""
    if name in built_in:
        return "; that implementation is built in, and always there."
    own = KNOWN.get(name)
    if own is not None and own.entry_point in plugins:
        return f"; did you mean {own.entry_point!r}, which has this implementation?"
    return did_you_mean(name, plugins)


def _unfound(plugin: Plugin, error: BaseException) -> str:
    """Return what the entry point says, if the module that it names is what was not found."""
    named = plugin.module.partition(":")[0]
    if isinstance(error, ModuleNotFoundError) and f"{named}.".startswith(f"{error.name}."):
        return f"; its entry point is {printable(f'{plugin.name} = {plugin.module}')}"
    return ""


def _version_mismatch(plugin: Plugin, error: BaseException) -> tuple[str, str]:
    """Return that a plugin was written for a later attnplug, or may have been, if that may be why it failed.

    Returns:
        The continuation of a reason, and the command that fixes it; both empty if that is not why.
    """
    upgrade = "pip install --upgrade attnplug"
    origin = f"{plugin.distribution} {plugin.version}"
    least = re.search(r">=?\s*([\d.]+)", plugin.needs)
    if least and _numbers(least[1]) > _numbers(__version__):
        return f"; {origin} needs attnplug {plugin.needs}, and this is {__version__}: {upgrade}", upgrade
    if isinstance(error, (AttributeError, ImportError, SpecError, TypeError)) and _UNKNOWN_HERE.search(describe(error)):
        needs = f", for attnplug {plugin.needs}" if plugin.needs else ""
        return f"; this is attnplug {__version__}, and {origin} may be written for a later one{needs}", upgrade
    return "", ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def ask(name: str, plugin: Any, where: str = "") -> list[ImplSpec]:
    """Return what one plugin, called `name` in messages and found at `where`, registers.

    A manager for each plugin keeps a failure, and a misspelt hook, where it belongs.

    Raises:
        Exception: whatever the plugin raises, or what pluggy has against it.
        SpecError: it is neither a module nor an instance, does not answer the hook, misspells it, or answers with
            something else than specifications.
    """
    if inspect.isclass(plugin) or inspect.isroutine(plugin):
        kind = "a class" if inspect.isclass(plugin) else "a function"
        raise SpecError(
            f"{name}: the entry point names {kind}, {where}; name the module that defines attnplug_register_impls, or "
            f"an instance that has it"
        )
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    manager.register(plugin, name=name)
    known = [role for role, hook in vars(manager.hook).items() if hook.has_spec()]
    for role, hook in vars(manager.hook).items():
        if role not in known and not all(answer.optionalhook for answer in hook.get_hookimpls()):
            raise SpecError(
                f"{name}: {role!r} is not a hook of attnplug{did_you_mean(role, known) or ';'} "
                f"known: {', '.join(sorted(known))}"
            )
    if not manager.hook.attnplug_register_impls.get_hookimpls():
        raise SpecError(
            f"{name} implements no hook of attnplug; define attnplug_register_impls() and mark it with "
            "@attnplug.hookimpl"
        )
    answers = manager.hook.attnplug_register_impls()
    if not answers:  # pluggy drops an answer of None
        raise SpecError(f"{name}: attnplug_register_impls returned None; return a list of ImplSpec")
    return _checked(name, answers)


def _checked(name: str, answers: Iterable[Any]) -> list[ImplSpec]:
    specs: list[ImplSpec] = []
    for answer in answers:
        given = [answer] if isinstance(answer, ImplSpec) else answer
        if not isinstance(given, (list, tuple)) or not all(isinstance(spec, ImplSpec) for spec in given):
            raise SpecError(f"{name}: attnplug_register_impls must return a list of ImplSpec, got {answer!r}")
        specs += given
    names = [spec.name for spec in specs]
    for twice in dict.fromkeys(spec for spec in names if names.count(spec) > 1):
        raise SpecError(f"{name}: attnplug_register_impls returned two ImplSpecs named {twice!r}; rename one")
    return specs
