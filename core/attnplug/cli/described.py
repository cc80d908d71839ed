"""Tensors that are described and nowhere: shape, strides, dtype and a device that need not be here.

PyTorch's fake tensors are more, and importing what they need takes seconds. What is asked of these is what an
explanation asks: views, and their sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Described(Tensor):
    """A tensor of the meta device that says it is on another."""

    described: Tensor

    @staticmethod
    def __new__(cls, described: Tensor, device: torch.device) -> Described:
        made: Described = Tensor._make_wrapper_subclass(
            cls,
            described.shape,
            strides=described.stride(),
            storage_offset=described.storage_offset(),
            dtype=described.dtype,
            device=device,
            requires_grad=described.requires_grad,
        )
        made.described = described
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # PyTorch's is of a subclass that takes no part
        cls, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        """Do to the described tensors what is done to these."""
        options = options or {}
        device = next(each.device for each in _tensors((arguments, options)))
        arguments, options = tree_map_only(cls, lambda each: each.described, (arguments, options))
        if "device" in options:
            options = {**options, "device": torch.device("meta")}
        result = function(*arguments, **options)
        return tree_map_only(Tensor, lambda each: cls(each, device), result)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]  # PyTorch's has a name for its option
        return f"{self.dtype}{list(self.shape)} on {self.device}"


def _tensors(tree: Any) -> list[Described]:
    found: list[Described] = []
    tree_map_only(Described, found.append, tree)
    return found


def empty(shape: Any, dtype: torch.dtype, device: torch.device, requires_grad: bool = False) -> Tensor:
    """Return a described tensor of this shape."""
    return Described(torch.empty(shape, dtype=dtype, device="meta", requires_grad=requires_grad), device)
