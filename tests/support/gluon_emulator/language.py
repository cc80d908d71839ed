"""`triton.language` and Gluon's, of which kernels use the same part."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gluon_emulator.memory import Barriers, Buffer
from gluon_emulator.program import current
from gluon_emulator.values import HALF, plain, tensor


def _both(function: Callable[..., Tensor], scalar: Callable[..., Any]) -> Callable[..., Any]:
    def either(left: Any, right: Any) -> Any:
        if not isinstance(left, Tensor) and not isinstance(right, Tensor):
            return scalar(left, right)
        like = left if isinstance(left, Tensor) else right
        left, right = (x if isinstance(x, Tensor) else torch.tensor(x, dtype=like.dtype) for x in (left, right))
        return tensor(function(plain(left), plain(right)))

    return either


class Pointer:
    """A pointer, or a tensor of pointers, to elements of a tensor."""

    def __init__(self, base: Tensor, offset: Any = 0) -> None:
        self.base, self.offset = base, offset
        self.dtype = types.SimpleNamespace(element_ty=HALF if base.is_floating_point() else base.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.base, self.offset + offset)

    def flat(self) -> Tensor:
        size = self.base.untyped_storage().nbytes() // self.base.element_size()
        return self.base.as_strided((size,), (1,), 0)

    def indices(self) -> Tensor:
        return torch.as_tensor(plain(self.offset)).long() + self.base.storage_offset()


def _load(pointer: Pointer, mask: Any = None, other: Any = 0.0, **_: Any) -> Any:
    flat, at = pointer.flat(), pointer.indices()
    if mask is None:
        values = flat[at]
    else:
        at, mask = torch.broadcast_tensors(at, torch.as_tensor(plain(mask)))
        values = torch.full(at.shape, other, dtype=flat.dtype)
        values[mask] = flat[at[mask]]
    return tensor(values) if values.dim() else values.item()


def _store(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    flat, at = pointer.flat(), pointer.indices()
    mask = torch.ones((), dtype=torch.bool) if mask is None else torch.as_tensor(plain(mask))
    at, mask, value = torch.broadcast_tensors(at, mask, torch.as_tensor(plain(value), dtype=flat.dtype))
    flat[at[mask]] = value[mask]


def _atomic_add(pointer: Pointer, value: Any, mask: Any = None, sem: Any = None) -> Any:
    before = _load(pointer)
    _store(pointer, before + value, mask)
    return before if isinstance(before, Tensor) else int(before)


def _reduction(name: str) -> Callable[..., Any]:
    def reduce(x: Tensor, axis: int | None = None) -> Any:
        result = getattr(torch, f"a{name}" if name in ("max", "min") else name)(plain(x), dim=axis)
        if result.dim():
            return tensor(result)
        number = result.item()  # shared memory holds whole numbers as float32, too
        return int(number) if number == number // 1 else number

    return reduce


class Language:
    """`triton.language` and Gluon's, of which kernels use the same part."""

    constexpr = staticmethod(lambda value: value)
    float32, int32, int64, bfloat16, float16 = "float32", "int32", "int64", HALF, HALF
    NVMMADistributedLayout = NVMMASharedLayout = SwizzledSharedLayout = SliceLayout = staticmethod(lambda *_: None)
    DotOperandLayout = BlockedLayout = NVMMADistributedLayout
    static_range = range
    range = range
    program_id = staticmethod(lambda axis: current().number)
    zeros = staticmethod(lambda shape, *_, **__: tensor(torch.zeros(shape)))
    full = staticmethod(lambda shape, value, *_, **__: tensor(torch.full(shape, value)))
    arange = staticmethod(lambda start, end, layout=None: tensor(torch.arange(start, end)))
    minimum = staticmethod(_both(torch.minimum, min))
    maximum = staticmethod(_both(torch.maximum, max))
    where = staticmethod(
        lambda c, a, b: tensor(torch.where(plain(c), plain(a), plain(b))) if isinstance(c, Tensor) else a if c else b
    )
    reshape = staticmethod(lambda x, shape: x.reshape(shape))
    permute = staticmethod(lambda x, order: x.permute(order))
    convert_layout = staticmethod(lambda x, layout, assert_trivial=False: x)
    cast = staticmethod(lambda x, dtype, bitcast=False: x)
    load, store = staticmethod(_load), staticmethod(_store)
    sum, max, min = (staticmethod(_reduction(name)) for name in ("sum", "max", "min"))
    exp2 = staticmethod(lambda x: torch.exp2(x))
    log2 = staticmethod(lambda x: torch.log2(x))
    exp = staticmethod(lambda x: torch.exp(x))
    log = staticmethod(lambda x: torch.log(x))
    abs = staticmethod(lambda x: torch.abs(x))
    join = staticmethod(lambda a, b: tensor(torch.stack((plain(a), plain(b)), -1)))
    split = staticmethod(lambda x: (x[..., 0], x[..., 1]))
    atomic_add = staticmethod(_atomic_add)

    @staticmethod
    def static_assert(condition: bool, *_: Any) -> None:
        assert condition

    @staticmethod
    def allocate_shared_memory(dtype: Any, shape: list[int], layout: Any) -> Any:
        shape = [int(n) for n in shape]
        if dtype != Language.int64:
            return Buffer.allocate(shape)
        barriers = Barriers(shape[0])
        return barriers if len(shape) > 1 else barriers.index(0)

    @staticmethod
    def warp_specialize(partitions: Any, warps: Any, registers: Any) -> None:
        current().run(partitions)
