"""Autocast: calls cast as PyTorch's function casts them, and kernels kept out of it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from attnplug._types import SDPAParams

any_autocast = torch._C._is_any_autocast_enabled
"""Whether autocast is on for any type of device. PyTorch's own short way to ask; 0.1 us."""


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on where `tensor` lives; asking PyTorch about meta tensors is an error."""
    device_type = tensor.device.type
    return any_autocast() and device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocasted(params: SDPAParams) -> SDPAParams:
    """Return a call cast as autocast casts it for PyTorch's function: every floating argument but float64."""
    query = params.query
    if not isinstance(query, Tensor) or not autocasts(query):
        return params
    dtype = torch.get_autocast_dtype(query.device.type)

    def cast(tensor: Any) -> Any:
        eligible = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    names = ("query", "key", "value", "attn_mask")
    return replace(params, **{name: cast(getattr(params, name)) for name in names})


def no_autocast(tensor: Tensor) -> Any:
    """Return a context without autocast: kernels get their inputs already cast, and accumulate in float32."""
    if not any_autocast() or not autocasts(tensor):
        return _NOTHING
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if is_compiling() else _Off(device_type)


_NOTHING = nullcontext()


class _Off:
    """`torch.autocast(device_type, enabled=False)` around one call, at a tenth of its cost."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self._device_type, False)

    def __exit__(self, *exception: object) -> None:
        torch.set_autocast_enabled(self._device_type, True)
