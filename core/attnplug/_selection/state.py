"""What holds now: the blocks that a thread is in, and what the process prefers.

A block (a scope, a recording) is taken out by identity, not by position: blocks that are left out of order, or in
another thread than they were entered in, remove what they put in place, and nothing else.

A scope is a plain tuple, `(set_priority, (entry, ...))`, its entries strings: `aten_math`, or `:MATH` for a
family. It is held in a `threading.local` whose attributes are set in `__init__`: that is the form of thread
state on which `torch.compile` places guards, so that a compiled function sees a change of scope and
recognises a scope that it has seen before. (`contextvars` cannot be traced, class-level defaults of a
`threading.local` silently go stale, and numbers may be taken for symbolic ones.)
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attnplug._errors import ChoicesError, ConfigError, ScopeError
from attnplug._registry.config import get_config
from attnplug._registry.discovery import get_registry
from attnplug._registry.forks import START, lock
from attnplug._registry.registry import Registry
from attnplug._selection.choices import Choices
from attnplug._tracing import constant_in_traces

Scope = tuple[bool, tuple[str, ...]]
Block = tuple[Scope | None, bool]
"""A scope that was entered, and whether, unless the process prefers another, `torch` is the first that it allows."""

OUTSIDE: Block = (None, True)
REFERENCE = "math_ref"  # by which ATTNPLUG_VERIFY verifies


class State:
    """What holds in one thread. Plain, because a trace drops what it assigned to a `threading.local`.

    To enter a block is `state.scopes = (*state.scopes, block)` and a store of its parts; to leave it is the reverse.
    Both are written inline: an interrupt, or another thread, can come between two calls, but not between stores, so
    that either all of it has happened or none.
    """

    def __init__(self) -> None:
        self.scopes: tuple[Block, ...] = (OUTSIDE,)
        self.scope, self.torch_first = OUTSIDE  # the innermost of `scopes`
        self.module = ""  # the class of the innermost bound module that runs
        number = id(self)
        self.watchers: tuple[Any, ...] = ()
        self.watched = ""  # see `watching`
        _states[number] = weakref.ref(self, lambda _: _states.pop(number, None))
        self.watchers, self.watched = process.watchers, process.watched  # a change from now on reaches this state


_states: dict[int, weakref.ref[State]] = {}


class _Thread(threading.local):
    def __init__(self) -> None:
        self.state = State()
        # Whether a plugin's kernel runs, for which PyTorch's function is PyTorch's. Not in `state`: a trace, which must
        # drop it, loses what is stored in a plain object after a flex_attention, and would keep it.
        self.in_kernel = False


class _ProcessState:
    """What the whole process prefers; `registry` is None until the first use of the library."""

    def __init__(self) -> None:
        self.registry: Registry | None = None
        self.activation: str | None = None
        self.preferred: tuple[str, ...] = ()
        self.choices: Choices | None = None  # measured, and in use
        self.plain = False  # whether, unless measured otherwise, `torch` runs whatever it supports, outside any scope
        self.watchers: tuple[Any, ...] = ()  # of every thread
        self.watched = ""
        self.bindings = 0  # how many modules are bound
        self.is_patched = False  # whether PyTorch's function is replaced by one that asks attnplug
        self.listeners: list[Callable[[Registry], None]] = []  # told about the registry before anybody sees it

    def activate(self, name: str | None) -> None:
        """Make `name`, or nothing, the first choice of the process."""
        start()
        self.activation = name
        self.plain = name is None and not self.preferred


process = _ProcessState()
thread = _Thread()


def leave_scope(block: Block) -> None:
    """Take the innermost occurrence of `block` from this thread, or else from the one that entered it.

    Raises:
        ScopeError: several other threads are in it.
    """
    for state in _holders(block):
        while True:
            scopes = state.scopes
            kept = without(scopes, block)
            innermost = kept[-1]
            if state.scopes is scopes:  # no call stands between this and the stores: nothing can come between
                state.scopes = kept
                state.scope, state.torch_first = innermost
                return


def _holders(block: Block) -> list[State]:
    """Return the state that holds `block`, in a list that is empty if the thread that entered it has ended."""
    if any(item is block for item in thread.state.scopes):
        return [thread.state]
    holding = [state for state in states() if any(item is block for item in state.scopes)]
    if len(holding) > 1:
        raise ScopeError(
            "a scope that several threads are in is left in none of them; make one scope for each with statement"
        )
    return holding


def states() -> list[State]:
    """Return the state of each thread that has one."""
    return [state for reference in list(_states.values()) if (state := reference()) is not None]


def without(blocks: tuple[Any, ...], block: object) -> tuple[Any, ...]:
    """Return `blocks` without the last that is `block`."""
    for position in reversed(range(len(blocks))):
        if blocks[position] is block:
            return blocks[:position] + blocks[position + 1 :]
    return blocks


def when_started(listener: Callable[[Registry], None]) -> None:
    """Call `listener` with the registry: at once, or when it is there."""
    if process.registry is None:
        process.listeners.append(listener)
    else:
        listener(process.registry)


def start() -> Registry:
    """Return the registry; at the first use, check what the environment prefers.

    Raises:
        ConfigError, PluginError: what reading the environment and loading the plugins raise.
        UnknownImplementationError: `ATTNPLUG_IMPL` names an implementation that does not exist.
        ConfigError: `ATTNPLUG_CHOICES` names a file that holds no measured choices.
    """
    if process.registry is None:
        with _start_lock:
            _start()
    assert process.registry is not None
    return process.registry


_start_lock = lock(START)


def _start() -> None:
    """Fill the registry, let listeners complete it, and only then make it visible."""
    if process.registry is not None:  # another thread was first
        return
    registry, config = get_registry(), get_config()
    process.preferred = tuple(registry.get(name, "ATTNPLUG_IMPL").name for name in config.impl)
    if config.verify:
        registry.get(REFERENCE, "ATTNPLUG_VERIFY")
    process.choices = choices_of_environment()
    while process.listeners:  # each once, though a signal's handler may come here in the middle of it
        process.listeners.pop(0)(registry)
    process.plain = process.activation is None and not process.preferred
    process.registry = registry


def choices_of_environment() -> Choices | None:
    """Return the measured choices that `ATTNPLUG_CHOICES` names; None if it names none.

    Raises:
        ConfigError: the file cannot be read, or holds no choices.
    """
    named = get_config().choices
    if not named:
        return None
    try:
        return automatic_choices() if named == "auto" else Choices.load(Path(named).expanduser())
    except ChoicesError as error:
        raise ConfigError(f"ATTNPLUG_CHOICES: {error}") from error


def automatic_choices() -> Choices:
    """Return this user's choices, which `auto` stands for; it may be said before there are any."""
    from attnplug._selection.choice_files import default_place

    place = default_place()
    return Choices.load(place) if place.exists() else Choices(source=str(place))


@constant_in_traces
def start_outside() -> None:
    """Fill the registry; in a trace, outside the graph, which could not take the locks."""
    start()
