"""PyTorch's own registry, both ways, kept in step whenever a registry changes.

Providers that others registered with `torch.nn.attention` appear here; implementations of attnplug can be
activated through `torch.nn.attention.activate_flash_attention_impl` by their names, once attnplug has been
used; and both say the same is active. Importing this module asks to be told when that is; it changes nothing in
PyTorch.
"""

from __future__ import annotations

import functools

import torch.nn.attention as torch_attention

from attnplug._control.activation import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    followers,
    restore_flash_attention_impl,
)
from attnplug._control.providers import ActivatedByTorch, provider_spec
from attnplug._errors import PluginWarning, SpecError
from attnplug._messages import printable, warn
from attnplug._registry.registry import Registry
from attnplug._selection.state import process, when_started

TORCH = "torch"
_theirs = torch_attention.register_flash_attention_impl.__globals__  # PyTorch's registry can only be added to


def refresh() -> None:
    """Bring both registries into step, if attnplug's has been used."""
    if process.registry is not None:
        synchronise(process.registry)


def synchronise(registry: Registry) -> None:
    """Bring providers of PyTorch's registry into `registry`, and offer its implementations there."""
    for name in torch_attention.list_flash_attention_impls():
        if name not in registry and not _is_offered(name):  # adding one comes back here, and may have added others
            _bring(name, registry)
    known = set(registry.names())
    for name in torch_attention.list_flash_attention_impls():
        if name not in known and _is_offered(name):
            _theirs["_FLASH_ATTENTION_IMPLS"].pop(name, None)
    for name in known.difference(torch_attention.list_flash_attention_impls()):
        torch_attention.register_flash_attention_impl(name, register_fn=functools.partial(_offer, name))


def _bring(name: str, registry: Registry) -> None:
    """Add a provider of PyTorch's registry, in which any text is a name; of one that cannot be had here, warn once."""
    try:
        spec = provider_spec(name, ActivatedByTorch(name))
    except SpecError as error:
        if name not in _refused:
            _refused.add(name)
            warn(PluginWarning(f"provider {printable(name)!r} of torch.nn.attention is left out: {error}"))
    else:
        registry.add(spec, TORCH)


_refused: set[str] = set()


def _is_offered(name: str) -> bool:
    function = _theirs["_FLASH_ATTENTION_IMPLS"].get(name)
    return isinstance(function, functools.partial) and function.func is _offer


class _Offered:
    """The handle of an activation in PyTorch's registry."""

    def __init__(self, name: str) -> None:
        self._name = name

    def remove(self) -> None:
        if current_flash_attention_impl() == self._name:
            restore_flash_attention_impl()


def _offer(name: str) -> _Offered:
    """Activate an implementation of attnplug's through PyTorch's registry."""
    activate_flash_attention_impl(name)
    return _Offered(name)


def _say_in_pytorch(name: str | None) -> None:
    """Let PyTorch's registry say what is active here; providers that it activates itself it knows."""
    active = _theirs["_FLASH_ATTENTION_ACTIVE"]
    if name is None and active is not None and isinstance(active[1], _Offered):
        _theirs["_FLASH_ATTENTION_ACTIVE"] = None
    elif name is not None and (active is None or active[0] != name):
        _theirs["_FLASH_ATTENTION_ACTIVE"] = (name, _Offered(name))


def _follow(registry: Registry) -> None:
    registry.listeners.append(synchronise)
    synchronise(registry)


followers.append(_say_in_pytorch)
when_started(_follow)
