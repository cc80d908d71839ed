"""Tensors as the tensor memory accelerator takes them: as descriptors, which know the shape of a tile.

A tile of rows is described in four dimensions, `(batch, head, row, column)`. Where a sequence ends at a row that the
host does not know (variable length, `seqused_k`), the descriptor is *ragged*: five dimensions, of which the first two
move the tensor so that row 2**30 is the first one behind the sequence. Beyond it the accelerator reads zeros and writes
nothing. The trick is that of `triton.tools.ragged_tma`: pointers wrap around at 64 bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from attnplug_flash_triton.plans import Descriptor, contiguous_strides

ALIGNED = 16
"""Bytes: what pointers and strides are multiples of."""
FURTHEST = 2**40
"""Bytes: what strides are below."""
MOST = 0x7FFF0000
RAGGED_ROWS = 2**30


def why_not(name: str, tensor: Tensor) -> str:
    """Return what keeps a tensor from being read through a descriptor; empty if nothing does."""
    size = tensor.element_size()
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        return f"{name}: its last dimension is not contiguous"
    if tensor.shape[-1] * size % ALIGNED:
        return f"{name}: head size {tensor.shape[-1]} is not a multiple of {ALIGNED // size}"
    steps = [step * size for step, length in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if length > 1]
    if any(step <= 0 or step % ALIGNED or step >= FURTHEST for step in steps):
        return f"{name}: strides {tuple(tensor.stride())} are not all positive multiples of {ALIGNED // size}"
    has_memory = not isinstance(tensor, FakeTensor)  # without, the offset decides: allocators align storages
    if (tensor.data_ptr() if has_memory else tensor.storage_offset() * size) % ALIGNED:
        return f"{name}: its data does not start at a multiple of {ALIGNED} bytes"
    return ""


def of_rows(
    name: str, tensor: Any, rows: int, columns: int, *, packed: bool = False, ragged: bool = False
) -> Descriptor:
    """Return the descriptor of tiles of `rows` rows and `columns` columns.

    Args:
        name: of the tensor in the plan.
        tensor: anything with its `shape`, `stride` and `dtype`: `(B, H, S, size)`, or `(T, H, size)` if packed.
        packed: variable length.
        ragged: see the module; of a tensor with a batch dimension, `rows_between_sequences` must not be None.
    """
    shape, stride = tuple(tensor.shape), _strides(tensor)
    if packed:
        shape, stride = (1, shape[1], shape[0], shape[2]), (stride[0] * shape[0], stride[1], stride[0], 1)
    _, heads, _, size = shape
    _, head, row, _ = stride
    block: tuple[int, ...] = (1, 1, rows, columns)
    if ragged:
        block = (1, 1, rows, 1, columns)
        shape, stride = (MOST, MOST, RAGGED_ROWS, heads, size), (2**34 - row, row, row, head, 1)
    return Descriptor(name, shape, stride, block, _layout(block, tensor.dtype))


def rows_between_sequences(tensor: Tensor) -> int | None:
    """Return how many rows of `(B, H, S, size)` there are from one sequence to the next; None if they are no number."""
    batch, _, row, _ = _strides(tensor)
    return batch // row if batch % row == 0 else None


def of_numbers(name: str, shape: tuple[int, ...], block: tuple[int, ...]) -> Descriptor:
    """Return the descriptor of a contiguous float32 tensor in two dimensions."""
    from triton.experimental.gluon import language as gl

    return Descriptor(name, shape, contiguous_strides(shape), block, gl.NVMMASharedLayout(0, 32, len(block)))


def _strides(tensor: Any) -> tuple[int, ...]:
    """Return the strides of a tensor, those of a contiguous one where there is one element to step over."""
    stride = tensor.stride() if isinstance(tensor, Tensor) else tensor.stride
    if tensor.shape[-1] == 1 or 1 not in tensor.shape:
        return tuple(stride)
    usual = contiguous_strides(tensor.shape)
    return tuple(u if n == 1 else s for s, u, n in zip(stride, usual, tensor.shape, strict=True))


@cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for(
        list(block), {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    )
