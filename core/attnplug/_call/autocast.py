"""Autocast, asked about in the quick way, and kept out of kernels."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def any_autocast() -> bool:
    """Whether autocast is on for any type of device. PyTorch's own short way to ask; 0.1 us."""
    return torch._C._is_any_autocast_enabled()


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on where `tensor` lives; asking PyTorch about meta tensors is an error."""
    device_type = tensor.device.type
    return any_autocast() and device_type != "meta" and torch.is_autocast_enabled(device_type)


def no_autocast(tensor: Tensor) -> Any:
    """Return a context without autocast: kernels get their inputs already cast, and accumulate in float32."""
    return torch.autocast(tensor.device.type, enabled=False) if autocasts(tensor) else nullcontext()
