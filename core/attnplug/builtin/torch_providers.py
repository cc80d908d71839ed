"""Providers of `torch.nn.attention`: functions that override PyTorch's flash operators when they are called.

FlashAttention 3 and 4 are built into PyTorch that way, and need their packages. A provider runs only while
it is activated, and then it is PyTorch's flash operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.attention as torch_attention

from attnplug._selection import process
from attnplug._types import ImplSpec, SDPAParams, SDPBackend
from attnplug.builtin import FLASH_CPU, FLASH_CUDA, aten_flash


class Provider:
    """The kernel behind a `register_fn` as `torch.nn.attention.register_flash_attention_impl` takes it."""

    composite = True

    def __init__(self, name: str, register_fn: Callable[[], Any]) -> None:
        self.name = name
        self.register_fn = register_fn

    def forward(self, params: SDPAParams) -> Any:
        return aten_flash.forward(params)

    def supports(self, params: SDPAParams) -> str | None:
        if process.activation == self.name:
            return None
        return f"overrides PyTorch's flash operator, so it runs only after activate_flash_attention_impl({self.name!r})"


class _ActivatedByTorch:
    """Activates a provider in PyTorch's registry; is also the handle that undoes it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self) -> _ActivatedByTorch:
        torch_attention.activate_flash_attention_impl(self.name)
        return self

    def remove(self) -> None:
        if torch_attention.current_flash_attention_impl() == self.name:
            torch_attention.restore_flash_attention_impl()


def provider_of_torch(name: str) -> Provider:
    """Return the provider that PyTorch's registry knows as `name`."""
    return Provider(name, _ActivatedByTorch(name))


def provider_spec(name: str, provider: Any) -> ImplSpec:
    """Return the specification of a provider, which does what PyTorch's flash operator does."""
    return ImplSpec(
        name=name,
        kernel=provider,
        backend=SDPBackend.FLASH_ATTENTION,
        capabilities=FLASH_CPU | FLASH_CUDA,
        priority=-10,
    )


FA3 = provider_of_torch("FA3")
FA4 = provider_of_torch("FA4")
