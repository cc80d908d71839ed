"""Autocast: calls cast as PyTorch's function casts them, and kernels kept out of it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from attnplug._params import params_of
from attnplug._types import SDPAParams

any_autocast = torch._C._is_any_autocast_enabled
"""Whether autocast is on for any type of device. PyTorch's own short way to ask; 0.1 us."""


def autocast_dtype(query: Any) -> torch.dtype | None:
    """Return the dtype that autocast casts this call to; None if it does not.

    Asking PyTorch about meta tensors is an error.
    """
    if not isinstance(query, Tensor):
        return None
    device_type = "cpu" if query.is_cpu else query.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocasted(params: SDPAParams) -> SDPAParams:
    """Return a call cast as autocast casts it for PyTorch's function: every floating argument but float64."""
    dtype = autocast_dtype(params.query) if any_autocast() else None
    if dtype is None:
        return params
    tensors = {name: getattr(params, name) for name in ("query", "key", "value", "attn_mask")}
    casted = {name: cast(tensor, dtype) for name, tensor in tensors.items()}
    if all(casted[name] is tensors[name] for name in tensors):
        return params
    return replace(params, **casted) if is_compiling() else params_of(params.__dict__ | casted)


def cast(tensor: Any, dtype: torch.dtype) -> Any:
    """Return a tensor in autocast's dtype, if it is one that autocast casts."""
    if tensor is None or not isinstance(tensor, Tensor) or tensor.dtype is dtype:
        return tensor
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def no_autocast(tensor: Tensor) -> Any:
    """Return a context without autocast: kernels get their inputs already cast, and accumulate in float32."""
    if not any_autocast() or autocast_dtype(tensor) is None:
        return _NOTHING
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if is_compiling() else Off(device_type)


_NOTHING = nullcontext()


class Off:
    """`torch.autocast(device_type, enabled=False)` around one eager call where it is on, at a tenth of its cost."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self._device_type, False)

    def __exit__(self, *exception: object) -> None:
        torch.set_autocast_enabled(self._device_type, True)
