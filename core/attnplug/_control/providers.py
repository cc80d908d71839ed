"""Providers of `torch.nn.attention`: functions that override PyTorch's flash operators when they are called.

A provider runs only while it is active, and then it is PyTorch's flash operator: its specification is that of
`aten_flash` with another name. FlashAttention 3 and 4 are built into PyTorch that way, and need their packages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.nn.attention as torch_attention

from attnplug._registry.kernel import Kernel
from attnplug._selection.state import start
from attnplug._types import ImplSpec, SDPAParams

FLASH = "aten_flash"


def provider_kernel(register_fn: Callable[[], Any]) -> Kernel:
    """Return the kernel behind a `register_fn` as `torch.nn.attention.register_flash_attention_impl` takes it."""
    return Kernel(forward=_flash, composite=True, register_fn=register_fn)


def provider_spec(name: str, register_fn: Callable[[], Any]) -> ImplSpec:
    """Return the specification of a provider, which does what PyTorch's flash operator does."""
    return replace(start().get(FLASH).spec, name=name, kernel=provider_kernel(register_fn), priority=-10)


class ActivatedByTorch:
    """The `register_fn` of a provider that PyTorch's registry has; also the handle that undoes it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self) -> ActivatedByTorch:
        torch_attention.activate_flash_attention_impl(self.name)
        return self

    def remove(self) -> None:
        if torch_attention.current_flash_attention_impl() == self.name:
            torch_attention.restore_flash_attention_impl()


def _flash(params: SDPAParams) -> Any:
    kernel = start().get(FLASH).load()
    assert kernel is not None
    return kernel.forward(params)


FA3 = provider_kernel(ActivatedByTorch("FA3"))
FA4 = provider_kernel(ActivatedByTorch("FA4"))
