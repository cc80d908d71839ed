"""Tensors compared with those of an earlier call in one step, in C.

`TensorGuards`, with which Dynamo compares the inputs of a compiled function, compares the type of each tensor, its
dispatch keys together with those of the thread (so that autocast, transforms, modes and layouts count), dtype, device,
whether autograd records it, and the sizes and strides that are given. Of modes it does not see those that PyTorch makes
fake tensors and graphs with, nor does it see levels of forward-mode derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_TensorGuards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)
"""Private to PyTorch: where a release has none, or another, nothing is compared, and facts decide as ever."""
Lengths = Sequence[Sequence[int | None]]


def compared(
    tensors: Sequence[Tensor], sizes: Lengths | None = None, strides: Lengths | None = None
) -> Callable[..., bool] | None:
    """Return what compares as many tensors with these, in the sizes and strides that are not None; in all by default.

    None where this release cannot. What is compared must be strided and not nested: the process ends at others.
    """
    try:
        return None if _TensorGuards is None else _guards(tensors, sizes, strides)
    except TypeError:  # a release whose guards take other arguments
        return None


def _guards(tensors: Sequence[Tensor], sizes: Lengths | None, strides: Lengths | None) -> Callable[..., bool]:
    """Return what compares tensors with these; PyTorch's guards refuse one that is given twice.

    Given None they compare all of them, and read them for themselves.
    """
    distinct = len({*map(id, tensors)})
    if distinct == len(tensors):
        check: Callable[..., bool] = _TensorGuards(
            *tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
        ).check
        return check
    each = [
        _guards((tensor,), sizes and sizes[number : number + 1], strides and strides[number : number + 1])
        for number, tensor in enumerate(tensors)
    ]
    if distinct == 1 and len(tensors) == 3:  # self-attention of one tensor
        fits = each[0]
        return lambda query, key, value: query is key is value and fits(query)
    return lambda *given: all(fits(tensor) for fits, tensor in zip(each, given, strict=True))
