"""Calls that PyTorch's CUDA kernels get wrong, or refuse, and tensors of a GPU that is not there."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from attnplug import SDPAParams
from attnplug.testing import Call

PLAIN = Call(batch=2, heads=2, queries=16, keys=24, head_size=16)
BAD = {
    "misaligned": PLAIN.but(layout="misaligned"),
    "rows between": PLAIN.but(layout="framed"),
    "strided": PLAIN.but(layout="strided"),
    "a misaligned mask": PLAIN.but(mask="additive", mask_layout="misaligned"),
    "misaligned with a mask": PLAIN.but(layout="misaligned", mask="additive"),
    "a mask with one column": PLAIN.but(mask="additive", mask_dims="bhq1"),
    "a boolean mask with one column": PLAIN.but(mask="boolean", mask_dims="bhq1"),
    "a strided mask": PLAIN.but(mask="additive", mask_layout="strided"),
    "a column-major mask": PLAIN.but(mask="additive", mask_layout="column-major"),
    "a mask of one dimension": PLAIN.but(mask="additive", mask_dims="k"),
    "a negative scale under a causal mask": PLAIN.but(is_causal=True, scale=-0.3),
    "a scale of zero under a causal mask": PLAIN.but(is_causal=True, scale=0.0),
    "a negative scale": PLAIN.but(scale=-0.3),
    "a scale of zero": PLAIN.but(scale=0.0),
}


def params_of(call: Call, **changes: Any) -> SDPAParams:
    params = call.params(call.make())
    fields = {name: getattr(params, name) for name in ("query", "key", "value", "attn_mask")}
    scale = 0.25 if params.scale is None else params.scale
    fields |= {"dropout": params.dropout, "is_causal": params.is_causal, "scale": scale} | changes
    return SDPAParams(**fields)


def faked(params: SDPAParams, mode: FakeTensorMode) -> SDPAParams:
    """Return the call with fake CUDA tensors that lie in memory as the real ones do."""

    def fake(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        memory = torch.empty(elements, dtype=tensor.dtype, device="cuda")
        return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    with mode, torch.no_grad():
        tensors = {name: fake(getattr(params, name)) for name in ("query", "key", "value", "attn_mask")}
    return SDPAParams(**tensors, dropout=params.dropout, is_causal=params.is_causal, scale=params.scale)


def assert_fits(given: tuple[Any, ...]) -> None:
    """Assert that PyTorch's CUDA kernels take this, by what they are known to need."""
    query, key, value, mask, dropout, _, scale = given
    for tensor in (query, key, value):
        size = tensor.element_size()
        assert tensor.storage_offset() * size % 16 == 0 and tensor.stride(-1) == 1
        assert all(stride * size % 16 == 0 for stride in tensor.stride()[:-1])
    if mask is not None:
        assert mask.dim() > 1 and mask.shape[-1] == key.shape[-2] and mask.stride(-1) == 1
        assert mask.storage_offset() * mask.element_size() % 16 == 0
    assert dropout < 1
    assert scale > 0  # for keys are hidden before logits are scaled: those that the last tile lacks, too


class OperatorCalls(TorchDispatchMode):
    """Collects with what PyTorch's operator of FlashAttention-2 is called."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._scaled_dot_product_flash_attention.default:
            options = kwargs or {}
            dropout, is_causal, *_ = (*args[3:], *(0.0, False)[len(args) - 3 :])
            scale = options.get("scale")
            scale = 1 / math.sqrt(args[0].shape[-1]) if scale is None else scale
            self.given.append((*args[:3], None, dropout, is_causal, scale))
        return func(*args, **(kwargs or {}))
