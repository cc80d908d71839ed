"""`sdpa_kernel`: a thread's choice for the length of a block."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import torch
from torch.compiler import is_dynamo_compiling

from attnplug._dispatch.traced import or_eagerly
from attnplug._errors import AttnplugError, ScopeError
from attnplug._selection.selection import describe_scope, listed, parse_scope
from attnplug._selection.state import Block, Scope, leave_scope, process, start, thread
from attnplug._tracing import constant_in_traces
from attnplug._types import SDPBackend

_Function = TypeVar("_Function", bound=Callable[..., Any])


class sdpa_kernel:
    """Restrict this thread's choice to some families or implementations, in a `with` block or a function.

    An inner scope replaces the outer one; leaving it, in whatever way, removes this scope and nothing else.
    No other thread sees it, and PyTorch's own process-wide flags are not touched.

    A scope belongs to its thread. A coroutine or a generator that is suspended in a `with` block leaves the scope
    in place for whatever runs next in the thread, as `torch.no_grad` does. As a decorator of one, the scope is
    entered for each of its steps and left whenever it is suspended, so that nothing else sees it.

    Args:
        backends: one or a list of `SDPBackend` (attnplug's or PyTorch's), names of implementations, or
            both mixed. A family stands for all its implementations. `torch`, which belongs to no
            family, takes part only if it is named. A set will do where the order does not count.
        set_priority: whether the order of `backends` is the order of preference; otherwise the
            activation, the environment and the priorities decide among them.

    Raises:
        TypeError, ValueError: `backends` is empty, or holds something else.
        UnknownImplementationError: a name that no implementation has.
        ScopeError: a scope is left that was not entered.

    Examples:
        >>> import torch, attnplug
        >>> query = torch.randn(1, 2, 4, 8)
        >>> with attnplug.sdpa_kernel([attnplug.SDPBackend.MATH, "torch"]):
        ...     out = attnplug.scaled_dot_product_attention(query, query, query)
    """

    def __init__(self, backends: Any, set_priority: bool = False) -> None:
        self._open = 0
        self._outer: Block | None = None
        self.block: Block = (*_parsed(backends, set_priority),)  # of its own, because it is found by identity

    def __enter__(self) -> sdpa_kernel:
        state, block = thread.state, self.block
        # A graph puts back what it found, and rebuilds tuples: blocks would lose their identity.
        if is_dynamo_compiling():
            self._outer = state.scope, state.torch_first
        else:  # no call from here on: an interrupt cannot come between, and what is entered is always left
            state.scopes = (*state.scopes, block)
            self._open += 1
        state.scope, state.torch_first = block
        return self

    def __exit__(self, *exception: object) -> None:
        state = thread.state
        scopes, outer = state.scopes, self._outer
        if outer is not None:
            self._outer = None
            state.scope, state.torch_first = outer
        elif self._open and scopes[-1] is self.block:
            state.scopes = scopes = scopes[:-1]
            state.scope, state.torch_first = scopes[-1]
            self._open -= 1
        else:
            self._leave()

    def _leave(self) -> None:
        """Leave out of order, in another thread, or for the second time."""
        if not self._open:
            raise ScopeError(f"{described(self.block)} is left, but it was not entered")
        leave_scope(self.block)
        self._open -= 1

    def __del__(self) -> None:
        """Leave a block that can no longer be left by hand, because leaving it was interrupted."""
        if getattr(self, "_open", 0):
            self._leave()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: the scope, but not that somebody is in it, which only the original ends."""
        return {"_open": 0, "_outer": None, "block": (*self.block,)}

    def __call__(self, function: _Function) -> _Function:
        return _decorated(function, self.block)

    def __repr__(self) -> str:
        return described(self.block)


def described(block: Block) -> str:
    """Return a block as the user would write it."""
    scope = block[0]
    return "a scope" if scope is None else describe_scope(scope)


def _parsed(backends: Any, set_priority: bool) -> tuple[Scope, bool]:
    """Return the scope that the arguments describe and whether `torch` is its first; from memory if it can be."""
    if is_dynamo_compiling():
        return or_eagerly(_parsed_in_trace, backends, set_priority)
    generation, kind = (process.registry or start()).generation, type(backends)
    try:
        if kind is list or kind is tuple:
            return _kept(generation, set_priority, True, *backends)
        return _kept(generation, set_priority, False, backends)
    except TypeError:  # something unhashable, or wrong: parse_scope takes the first, and has words for the other
        pass
    scope = parse_scope(backends, set_priority, start())
    return scope, is_torch_first(scope)


@functools.lru_cache(256, typed=True)  # for 0 equals False and MATH
def _kept(generation: int, set_priority: bool, several: bool, *backends: Any) -> tuple[Scope, bool]:
    scope = parse_scope(backends if several else backends[0], set_priority, start())
    return scope, is_torch_first(scope)


def _parsed_in_trace(backends: Any, set_priority: bool) -> tuple[Scope, bool]:
    if not is_dynamo_compiling():  # the graph broke, because there is a mistake: this raises the error
        return _parsed(backends, set_priority)
    items = listed(backends, set_priority)
    families = tuple(isinstance(item, (SDPBackend, torch.nn.attention.SDPBackend)) for item in items)
    plain = tuple(int(item) if family else item for item, family in zip(items, families, strict=True))
    parsed = _parsed_outside(plain, families, set_priority)
    if isinstance(parsed, str):
        raise AttnplugError(parsed)
    return parsed


@constant_in_traces
def _parsed_outside(items: tuple[Any, ...], families: tuple[bool, ...], set_priority: bool) -> tuple[Scope, bool] | str:
    """Check a scope outside the graph, in which families are plain numbers; return what is wrong, if anything is."""
    try:
        given = [SDPBackend(item) if family else item for item, family in zip(items, families, strict=True)]
        scope = parse_scope(given, set_priority, start())
    except Exception as error:  # what leaves this function, Dynamo takes for a fault of its own
        return str(error)
    return scope, is_torch_first(scope)


def is_torch_first(scope: Scope) -> bool:
    """Whether, unless the process prefers another, `torch` is the first that `scope` allows."""
    set_priority, allowed = scope
    return allowed[0] == "torch" if set_priority else "torch" in allowed


def run_in(block: Block, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call `function` in a scope.

    As `with sdpa_kernel(...)`, but written out: Python may raise KeyboardInterrupt at the beginning of an `__exit__`,
    and here nothing is called to leave.
    """
    state = thread.state
    if is_dynamo_compiling():
        outer = state.scope, state.torch_first
        state.scope, state.torch_first = block
        try:
            return function(*args, **kwargs)
        finally:
            state.scope, state.torch_first = outer
    block = (*block,)  # of its own, because it is found by identity
    state.scopes = (*state.scopes, block)
    state.scope, state.torch_first = block
    try:
        return function(*args, **kwargs)
    finally:
        scopes = state.scopes
        if scopes[-1] is block:
            state.scopes = scopes = scopes[:-1]
            state.scope, state.torch_first = scopes[-1]
        else:
            leave_scope(block)


def _decorated(function: Any, block: Block) -> Any:
    """Return `function` such that its body runs in a scope."""
    shown = getattr(function, "__qualname__", repr(function))
    if isinstance(function, (type, staticmethod, classmethod)) or not callable(function):
        raise TypeError(
            f"sdpa_kernel decorates functions, methods and modules; {shown} is {type(function).__name__!r} "
            f"(write the decorator below @staticmethod or @classmethod, and on the methods of a class)"
        )

    def is_(kind: Callable[[Any], bool]) -> bool:
        return kind(function) or kind(type(function).__call__)

    if is_(inspect.isasyncgenfunction):
        raise TypeError(
            f"sdpa_kernel cannot decorate the asynchronous generator {shown}: enter the scope inside, with a with "
            f"statement around the attention calls"
        )
    if is_(inspect.iscoroutinefunction):

        @functools.wraps(function)
        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            return await _Steps(block, function(*args, **kwargs))

        return coroutine
    if is_(inspect.isgeneratorfunction):

        @functools.wraps(function)
        def generator(*args: Any, **kwargs: Any) -> Any:
            return (yield from _Steps(block, function(*args, **kwargs)))

        return generator

    @functools.wraps(function)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        return run_in(block, function, *args, **kwargs)

    return scoped


class _Steps(Generator[Any, Any, Any]):
    """A generator or a coroutine, each of whose steps runs in a scope."""

    def __init__(self, block: Block, inner: Any) -> None:
        self._block, self._inner = block, inner

    def send(self, value: Any) -> Any:
        return run_in(self._block, self._inner.send, value)

    def throw(self, *error: Any) -> Any:
        return run_in(self._block, self._inner.throw, *error)

    def close(self) -> None:
        run_in(self._block, self._inner.close)

    def __await__(self) -> Any:
        return self
