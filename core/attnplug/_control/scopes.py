"""`sdpa_kernel`: a thread's choice for the length of a block."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch.compiler import is_compiling

from attnplug._errors import ScopeError
from attnplug._selection.selection import describe_scope, parse_scope
from attnplug._selection.state import Scope, process, start, thread
from attnplug._tracing import constant_in_traces
from attnplug._types import SDPBackend

_Function = TypeVar("_Function", bound=Callable[..., Any])


class sdpa_kernel:
    """Restrict this thread's choice to some families or implementations, in a `with` block or a function.

    An inner scope replaces the outer one; leaving, also by an exception, restores exactly what was. No
    other thread sees it, and PyTorch's own process-wide flags are not touched.

    Args:
        backends: one or a list of `SDPBackend` (attnplug's or PyTorch's), names of implementations, or
            both mixed. A family stands for all its implementations. `torch`, which belongs to no
            family, takes part only if it is named.
        set_priority: whether the order of `backends` is the order of preference; otherwise the
            activation, the environment and the priorities decide among them.

    Raises:
        TypeError, ValueError: `backends` is empty, or holds something else.
        UnknownImplementationError: a name that no implementation has.

    Examples:
        >>> import torch, attnplug
        >>> query = torch.randn(1, 2, 4, 8)
        >>> with attnplug.sdpa_kernel([attnplug.SDPBackend.MATH, "torch"]):
        ...     out = attnplug.scaled_dot_product_attention(query, query, query)
    """

    def __init__(self, backends: Any, set_priority: bool = False) -> None:
        self._arguments = (backends, set_priority)
        self._scope, self._torch_first = _parsed(backends, set_priority)

    def __enter__(self) -> sdpa_kernel:
        state = thread.state
        state.scopes = (*state.scopes, self._scope)
        state.scope = self._scope
        state.torch_first = self._torch_first
        return self

    def __exit__(self, *exception: object) -> None:
        state = thread.state
        scopes = state.scopes
        if not scopes or (scopes[-1] is not self._scope and scopes[-1] != self._scope):
            raise ScopeError(
                f"{describe_scope(self._scope)} is left out of order, or in another thread than it was entered in; "
                f"the innermost scope of this thread is {describe_scope(scopes[-1]) if scopes else 'none'}"
            )
        state.scopes = outer = scopes[:-1]
        if outer:
            state.scope, state.torch_first = outer[-1], _is_torch_first(outer[-1])
        else:
            state.scope, state.torch_first = None, True

    def __call__(self, function: _Function) -> _Function:
        if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
            raise TypeError(
                f"sdpa_kernel cannot decorate {function.__qualname__}: the scope would end before its body runs; "
                f"enter it inside with a with statement"
            )

        backends, set_priority = self._arguments

        @functools.wraps(function)
        def scoped(*args: Any, **kwargs: Any) -> Any:
            with sdpa_kernel(backends, set_priority):  # a new one: a trace cannot enter one that was made outside
                return function(*args, **kwargs)

        return scoped  # type: ignore[return-value]


def _is_torch_first(scope: Scope) -> bool:
    set_priority, allowed = scope
    return allowed[0] == "torch" if set_priority else "torch" in allowed


_seen: dict[Hashable, tuple[Scope, bool]] = {}


def _parsed(backends: Any, set_priority: bool) -> tuple[Scope, bool]:
    """Return the scope that the arguments describe and whether `torch` is its first; from memory if it can be.

    The key holds types because 0 equals False and MATH. About 0.6 us.
    """
    if is_compiling():
        plain = tuple(item if isinstance(item, str) else int(item) for item in _listed(backends))
        return _parsed_outside(plain, set_priority)
    registry = process.registry or start()
    kind, key = type(backends), None
    if set_priority is False or set_priority is True:
        several = kind is list or kind is tuple
        key = (
            (set_priority, registry.generation, *backends, *map(type, backends))
            if several
            else (set_priority, registry.generation, backends, kind)
        )
    try:
        found = _seen.get(key)
    except TypeError:  # something unhashable, which parse_scope has words for
        found, key = None, None
    if found is None:
        scope = parse_scope(backends, set_priority, registry)
        found = scope, _is_torch_first(scope)
        if len(_seen) >= 256:
            _seen.clear()
        if key is not None:
            _seen[key] = found
    return found


def _listed(backends: Any) -> Any:
    return backends if isinstance(backends, (list, tuple)) else (backends,)


@constant_in_traces
def _parsed_outside(items: tuple[Any, ...], set_priority: bool) -> tuple[Scope, bool]:
    """Check a scope outside the graph; in it, families are plain numbers."""
    scope = parse_scope([item if isinstance(item, str) else SDPBackend(item) for item in items], set_priority, start())
    return scope, _is_torch_first(scope)
