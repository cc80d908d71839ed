"""PyTorch's own registry, both ways, kept in step whenever a registry changes.

Providers that others registered with `torch.nn.attention` appear here; implementations of attnplug can be
activated through `torch.nn.attention.activate_flash_attention_impl` by their names, once attnplug has been
used. Importing this module asks to be told when that is; it changes nothing in PyTorch.
"""

from __future__ import annotations

import functools

import torch.nn.attention as torch_attention

from attnplug._control.activation import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)
from attnplug._control.providers import ActivatedByTorch, provider_spec
from attnplug._registry.registry import Registry
from attnplug._selection.state import when_started

TORCH = "torch"
_offered: set[str] = set()


def synchronise(registry: Registry) -> None:
    """Bring providers of PyTorch's registry into `registry`, and offer its implementations there."""
    theirs = set(torch_attention.list_flash_attention_impls()) - _offered
    for name in sorted(name for name in theirs if name not in registry):
        registry.add(provider_spec(name, ActivatedByTorch(name)), TORCH)
    for name in registry.names():
        if name not in theirs and name not in _offered:
            _offered.add(name)
            torch_attention.register_flash_attention_impl(name, register_fn=functools.partial(_Offer, name))


class _Offer:
    """An activation that came through PyTorch's registry, and the handle that undoes it."""

    def __init__(self, name: str) -> None:
        self.name = name
        activate_flash_attention_impl(name)

    def remove(self) -> None:
        if current_flash_attention_impl() == self.name:
            restore_flash_attention_impl()


def _follow(registry: Registry) -> None:
    registry.listeners.append(synchronise)
    synchronise(registry)


when_started(_follow)
