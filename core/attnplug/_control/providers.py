"""Providers of `torch.nn.attention`: functions that override PyTorch's flash operators when they are called.

A provider runs only while it is active, and then it is PyTorch's flash operator: its specification is that of
`aten_flash` with another name. FlashAttention 3 and 4 are built into PyTorch that way, and need their packages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.nn.attention as torch_attention
from torch import Tensor

from attnplug._call.device import compute_capability
from attnplug._registry.kernel import Kernel
from attnplug._selection.state import start
from attnplug._types import ImplSpec, SDPAParams

FLASH = "aten_flash"


def provider_kernel(
    register_fn: Callable[[], Any], supports: Callable[[SDPAParams], str | None] | None = None
) -> Kernel:
    """Return the kernel behind a `register_fn` as `torch.nn.attention.register_flash_attention_impl` takes it."""
    return Kernel(
        forward=_flash,
        partial_backward=_flash_backward,
        composite=True,
        register_fn=register_fn,
        supports=supports,
    )


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


def _supports_fa3(params: SDPAParams) -> str | None:
    """Decline what `torch/nn/attention/_fa3.py` refuses in the middle of a call."""
    return _not_of(params, {9})


def _supports_fa4(params: SDPAParams) -> str | None:
    """Decline what `torch/nn/attention/_fa4.py`, and FlashAttention 4 on Blackwell, refuse in the middle of a call."""
    if reason := _not_of(params, {9, 10}):
        return reason
    size, found = params.query.shape[-1], compute_capability(params.query.device)
    if found is not None and found[0] == 10 and 128 < size < 256:
        return f"head size {size} is above 128 and not 256, which compute capability 10 requires"
    return None


def _not_of(params: SDPAParams, majors: set[int]) -> str | None:
    found = compute_capability(params.query.device)
    if found is None or found[0] in majors:  # that there is no device at all, the capabilities say
        return None
    needed = " or ".join(f"{major}.x" for major in sorted(majors))
    return f"needs compute capability {needed}, found {found[0]}.{found[1]}"


def _flash(params: SDPAParams) -> Any:
    kernel = start().get(FLASH).load()
    assert kernel is not None
    return kernel.forward(params)


def _flash_backward(params: SDPAParams, grad_out: Tensor, out: Tensor, lse: Tensor) -> Any:
    kernel = start().get(FLASH).load()
    assert kernel is not None
    assert kernel.partial_backward is not None
    return kernel.partial_backward(params, grad_out, out, lse)


FA3 = provider_kernel(ActivatedByTorch("FA3"), _supports_fa3)
FA4 = provider_kernel(ActivatedByTorch("FA4"), _supports_fa4)
