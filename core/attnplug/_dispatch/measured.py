"""What was measured to be the fastest for a call, while measured choices are in use; where nothing was, why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from attnplug._call.facts import CallFacts
from attnplug._call.kinds import Problem, kind_of, problem_of, sizes_of
from attnplug._call.machine import device_identity, plugin_versions, runtime_versions
from attnplug._errors import ChoicesWarning
from attnplug._messages import warn
from attnplug._registry.registry import DEFAULT, Registry
from attnplug._selection.choice_tables import Choice, Kind, Table, describe_problem
from attnplug._selection.choices import Choices
from attnplug._selection.state import process, start, thread, when_started
from attnplug._selection.trees import Tree, grown, walked
from attnplug._types import SDPAParams


@dataclass
class _Here:
    """The choices that hold on one device.

    Attributes:
        choices: by kind of call.
        names: by problem, the registered implementations by sizes.
        trees: of these.
        reason: why there are none, a phrase.
    """

    choices: dict[Kind, Choice] = field(default_factory=dict)
    names: dict[Problem, dict[tuple[int, ...], str | None]] = field(default_factory=dict)
    trees: dict[Problem, Tree] = field(default_factory=dict)
    reason: str = ""


_here: dict[torch.device, _Here] = {}
_told: set[str] = set()


def applies(impl: str | None) -> bool:
    """Whether a measured choice may decide: nothing stronger names the order."""
    scope = thread.state.scope
    return process.choices is not None and impl is None and (scope is None or not scope[0])


def tree_of(facts: CallFacts) -> Tree:
    """Return the choices for all sizes of a call's problem."""
    return _choices_on(facts.device).trees.get(problem_of(facts))


def tree_of_trace(facts: CallFacts) -> Tree:
    """Return the same with nothing where PyTorch's function, which comes first anyway, was the fastest."""
    names = _choices_on(facts.device).names.get(problem_of(facts), {})
    return grown({sizes: None if name == DEFAULT else name for sizes, name in names.items()})


def choice_of(facts: CallFacts, params: SDPAParams) -> str | None:
    """Return what was measured to be the fastest for a call; None if nothing was."""
    return walked(tree_of(facts), sizes_of(params))


def because(facts: CallFacts, params: SDPAParams) -> str:
    """Return, in a sentence, what was measured for a call, or why no measured choice holds for it."""
    here = _choices_on(facts.device)
    if here.reason:
        return f"no measured choice: {here.reason}"
    if params.query.is_nested:
        return "no measured choice: calls of nested tensors are not measured"
    kind = kind_of(facts, params)
    found = here.choices.get(kind)
    if found is None:
        return f"no measured choice: {_UNMEASURED} ({kind}); {_WAY_OUT}"
    if found.impl not in start():
        return f"no measured choice: {found.impl!r} was the fastest, and is not registered here ({kind})"
    gain = f", {found.gain:.2f} times as fast as {found.default}" if found.impl != found.default else ""
    return f"measured choice: {found.impl}{gain} ({kind})"


_UNMEASURED = "calls of this kind were not measured"
_WAY_OUT = "attnplug.capture() and attnplug.tune() measure what a program calls"


def tell(facts: CallFacts, params: SDPAParams) -> None:
    """Warn, once for each cause, that a call for which nothing was measured runs in the default order."""
    _say(because(facts, params))


def tell_of_problem(facts: CallFacts) -> None:
    """Do the same for a call in a trace, whose sizes may be symbolic, where no size was measured."""
    here, problem = _choices_on(facts.device), problem_of(facts)
    if here.reason:
        _say(f"no measured choice: {here.reason}")
    elif problem not in here.names:
        _say(f"no measured choice: {_UNMEASURED} ({describe_problem(problem)}); {_WAY_OUT}")


def _say(reason: str) -> None:
    cause = reason.partition(" (")[0]
    if cause not in _told:
        _told.add(cause)
        warn(ChoicesWarning(f"{reason}. Such calls run in the default order; this warning is given once"))


def why_not_here(one: Table) -> str:
    """Return why a table holds on no device of this machine; empty if it does."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.device("cpu"), *(torch.device("cuda", number) for number in range(count))]
    identities = [identity for device in devices if (identity := device_identity(device)) is not None]
    if (one.device, one.capability) not in identities:
        return f"measured on another device; here is {', '.join(f'{name} ({what})' for name, what in identities)}"
    different = _differences(one, runtime_versions() | plugin_versions(start()))
    return f"measured with {different}" if different else ""


def _choices_on(device: torch.device) -> _Here:
    found = _here.get(device)
    if found is None:
        found = _here[device] = _holding(Choices() if process.choices is None else process.choices, device, start())
    return found


def _holding(choices: Choices, device: torch.device, registry: Registry) -> _Here:
    """Return those of all choices that hold on a device, with what is installed."""
    here, identity = _Here(), device_identity(device)
    if identity is None:
        here.reason = f"{device} is not a device of this machine"
        return here
    on_device = [one for one in choices.tables if (one.device, one.capability) == identity]
    versions = runtime_versions() | plugin_versions(registry)
    stale = {id(one): _differences(one, versions) for one in on_device}
    fresh = [one for one in on_device if not stale[id(one)]]
    for one in sorted((one for table in fresh for one in table.choices), key=lambda one: one.created):
        here.choices[one.kind] = one
    if not fresh:
        here.reason = _why_none(choices, identity, [stale[id(one)] for one in on_device])
    for kind, one in here.choices.items():
        here.names.setdefault(kind.problem, {})[kind.sizes] = one.impl if one.impl in registry else None
    here.trees = {problem: grown(found) for problem, found in here.names.items()}
    return here


def _differences(one: Table, here: Mapping[str, str | None]) -> str:
    """Return which versions a table was measured with and are others now; what is no longer installed is none."""
    return "; ".join(
        f"{name} {version or 'absent'}, here is {here[name] or 'none'}"
        for name, version in one.versions.items()
        if name in here and here[name] != version
    )


def _why_none(choices: Choices, identity: tuple[str, str], stale: list[str]) -> str:
    where = f" in {choices.source}" if choices.source else ""
    if stale:
        return f"those{where} were measured with {stale[-1]}; measure again: attnplug tune"
    if not choices.tables:
        return f"there are none yet{where}; attnplug tune measures this machine"
    others = ", ".join(dict.fromkeys(f"{one.device} ({one.capability})" for one in choices.tables))
    return f"those{where} were measured on {others}, and this is {identity[0]} ({identity[1]}); attnplug tune adds it"


def _forget(registry: Registry) -> None:
    """Forget what holds where: implementations, their versions, or the choices in use have changed."""
    _here.clear()


def forget_warnings() -> None:
    """Say again what was said of the choices that were in use before."""
    _told.clear()


when_started(lambda registry: registry.listeners.append(_forget))
