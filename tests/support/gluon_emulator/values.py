"""Tensors as kernels see them: torch's in float32, with the names that Triton has besides."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from gluon_emulator.events import Fault

NAN = float("nan")
HALF = "half"
"""The type of a tensor in 16 bits: two bytes to barriers, float32 to everything else."""


class Values(Tensor):
    """A tensor of a kernel: torch's, with the names that Triton has besides."""

    type = types.SimpleNamespace(layout=None)
    fault: Fault | None = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in args:
            if isinstance(value, Values) and "fault" in value.__dict__ and value.fault is not None:
                raise value.fault
        return super().__torch_function__(function, types, args, kwargs)

    def to(self, dtype: Any, bitcast: bool = False) -> Any:
        return self if dtype == HALF or not isinstance(dtype, torch.dtype) else super().to(dtype)


def tensor(value: Any) -> Values:
    """Return a tensor as kernels see it."""
    return value.as_subclass(Values)


def plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, Tensor) else value
