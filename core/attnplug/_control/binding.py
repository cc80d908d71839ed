"""Scopes that belong to a module.

A bound module gets a class of its own, derived from the one that it had, whose `__call__` enters the scope. Hooks
cannot do that: PyTorch calls none when KeyboardInterrupt ends a forward. Nor can an attribute `forward`: copies of
the module, such as the replicas of `nn.DataParallel`, would call the forward of the original.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_compiling

from attnplug._control.scopes import described, run_in, sdpa_kernel
from attnplug._handles import Removable
from attnplug._registry.forks import BINDING, lock
from attnplug._selection.state import Block, process, start, thread

_lock = lock(BINDING)  # a module may be collected while it is held
_counted: dict[int, weakref.finalize[Any, Any]] = {}
"""What each bound module, by its identity, does when it is collected."""


class BindingHandle(Removable):
    """Undoes one `bind()`; also a context manager."""

    def __init__(self, module: torch.nn.Module, block: Block) -> None:
        self._module: Callable[[], torch.nn.Module | None] = weakref.ref(module)
        self._block = block

    def remove(self) -> None:
        """Undo the binding; a second call does nothing."""
        with _lock:
            module = self._bound()
            if module is None:
                return
            kept = tuple(block for block in module.__dict__[_BLOCKS] if block is not self._block)
            if kept:
                module.__dict__[_BLOCKS] = kept
            else:
                del module.__dict__[_BLOCKS]
                _forget(id(module))
                if _Bound in type(module).__bases__:  # else somebody has derived another class from it since
                    module.__class__ = type(module).__bases__[1]

    def _bound(self) -> torch.nn.Module | None:
        """Return the module, while it is there and bound by this."""
        module = self._module()
        blocks = () if module is None else module.__dict__.get(_BLOCKS, ())
        return module if any(block is self._block for block in blocks) else None

    def __getstate__(self) -> tuple[torch.nn.Module | None, Block]:
        """Return what a copy has: the module, which in a copied or saved model is the copied or saved one."""
        return self._bound(), self._block

    def __setstate__(self, state: tuple[torch.nn.Module | None, Block]) -> None:
        module, self._block = state
        self._module = _nothing if module is None else weakref.ref(module)

    def __repr__(self) -> str:
        module = self._bound()
        if module is None:
            return "<BindingHandle: removed>"
        return f"<BindingHandle: {type(module).__name__} in {described(self._block)}>"


def bind(module: torch.nn.Module, backends: Any, set_priority: bool = False) -> BindingHandle:
    """Run every attention call made inside this module's forward in the scope `sdpa_kernel(backends)`.

    A reference for one layer, another kernel for cross-attention: `bind(model.layers[3], "math_ref")`.
    Calls of `torch.nn.functional.scaled_dot_product_attention` follow while `patch_torch()`, or an
    activation, is in place. Of several bindings of one module the last one counts. Copies of the module, and what
    `torch.load` makes of it, are bound too; a handle that is an attribute of a model is copied with it.

    Modules inside a compiled one may be bound, and their bindings removed, at any time. What is itself given to
    `torch.compile` is bound before: PyTorch keeps the forward that it was given.

    While a module is bound, its class is derived from the one that it had, and has the same name.

    Args:
        module: whose forward it is for, and that of everything that it calls.
        backends: as for `sdpa_kernel`.
        set_priority: as for `sdpa_kernel`.

    Returns:
        A handle; its `remove()` undoes the binding, as does the end of a `with` block.

    Raises:
        TypeError: `module` is not a `torch.nn.Module`; is one of TorchScript, which calls nothing of Python's; or has
            no forward, as a `ModuleList` has none.
        ValueError: `module` is lazy and not initialized, so that its class will still change.
        TypeError, ValueError, UnknownImplementationError: as `sdpa_kernel`.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"module: {type(module).__name__} is TorchScript, which computes attention by itself")
    if not _is_called(module):
        raise TypeError(
            f"module: {type(module).__name__} has no forward to bind; "
            "bind each module that it holds, or one that calls them"
        )
    if getattr(module, "cls_to_become", None) is not None:
        raise ValueError(f"module: {type(module).__name__} is not initialized; call it once before it is bound")
    block = sdpa_kernel(backends, set_priority).block  # a mistake is an error here, not in the middle of a forward
    start()
    with _lock:
        _give_class(module)
        module.__dict__[_BLOCKS] = (*module.__dict__.get(_BLOCKS, ()), block)
        _count(module)
    return BindingHandle(module, block)


def _is_called(module: torch.nn.Module) -> bool:
    """Whether calling the module runs anything."""
    own, kind = torch.nn.Module, type(module)
    if kind.__call__ is not own.__call__:
        return kind.__call__ not in (torch.nn.ParameterList.__call__, torch.nn.ParameterDict.__call__)  # which raise
    return kind.forward is not own.forward or "forward" in module.__dict__


class _Bound:
    """What a bound module's class has before the class that the module had."""

    _attnplug_blocks = ()

    def __init_subclass__(cls, **arguments: Any) -> None:
        if _Bound not in cls.__bases__:  # else a module's class, which may keep a list of such, would hear of a binding
            super().__init_subclass__(**arguments)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        blocks = self._attnplug_blocks
        if not blocks:  # removed, by somebody whose class is derived from this
            return super().__call__(*args, **kwargs)  # type: ignore[misc]  # behind this comes the module's class
        if is_compiling():
            return run_in(blocks[-1], super().__call__, *args, **kwargs)
        state = thread.state
        outer = state.module
        state.module = type(self).__name__
        try:
            return run_in(blocks[-1], super().__call__, *args, **kwargs)
        finally:
            state.module = outer

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = type(self)
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *state = reduced
        if _Bound not in kind.__bases__:
            return make, arguments, *state
        plain = kind.__bases__[1]
        return _rebuilt, (make, tuple(plain if item is kind else item for item in arguments)), *state


_BLOCKS = "_attnplug_blocks"


def _give_class(module: torch.nn.Module) -> None:
    """Derive the class of a bound module from the one that it has, once."""
    plain = type(module)
    if issubclass(plain, _Bound):
        return
    names = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    derived = (kind for kind in plain.__subclasses__() if kind.__bases__ == (_Bound, plain))
    module.__class__ = next(derived, None) or types.new_class(
        plain.__name__, (_Bound, plain), exec_body=lambda body: body.update(names)
    )


def _rebuilt(make: Any, arguments: tuple[Any, ...]) -> Any:
    """Make the bound module that was copied or saved; its attributes follow."""
    module = make(*arguments)
    _give_class(module)
    _count(module)
    return module


def _count(module: torch.nn.Module) -> None:
    """Count a bound module, until its last binding is removed or it goes."""
    with _lock:
        if id(module) not in _counted:
            _counted[id(module)] = weakref.finalize(module, _forget, id(module))
        process.bindings = len(_counted)


def _forget(key: int) -> None:
    with _lock:
        # A copy is not counted if its class was derived from that of a bound module: see `_Bound.__reduce_ex__`.
        counted = _counted.pop(key, None)
        if counted is not None:
            counted.detach()
        process.bindings = len(_counted)


def _nothing() -> None:
    """Return what a reference to a module that has gone returns."""
