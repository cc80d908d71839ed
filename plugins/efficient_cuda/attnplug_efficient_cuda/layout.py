"""Tensors in the form that the kernels read: aligned, padded, with as many key as query heads.

The CUTLASS kernel reads 16 bytes at a time: pointers, strides and head sizes must be multiples of that,
and a bias is read up to the next multiple beyond its last key. Everything here is a view where strides
allow, and a copy where they do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

READ_BYTES = 16
INT32, UINT32 = 2**31, 2**32
SHORT_OFFSETS = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
"""Whether forward counts with 32 bits where a row of a mask starts (pytorch#187227)."""


def step(dtype: torch.dtype) -> int:
    """Return how many elements the kernels read at a time."""
    return READ_BYTES // dtype.itemsize


def part(tensor: Tensor, dim: int, bounds: tuple[int, int]) -> Tensor:
    """Return `tensor[..., start:stop, ...]` along `dim`, and `tensor` itself if that is all of it.

    Not by indexing: that asks the device, which a fake tensor may not have.
    """
    start, stop = bounds
    return tensor if (start, stop) == (0, tensor.shape[dim]) else tensor.narrow(dim, start, stop - start)


def first(tensor: Tensor, size: int) -> Tensor:
    """Return `tensor[..., :size]`."""
    return part(tensor, -1, (0, size))


def compact(tensor: Tensor) -> Tensor:
    """Return `tensor.contiguous()`, by a way that a fake tensor of an absent device can go too."""
    return tensor if tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def padded(tensor: Tensor) -> Tensor:
    """Return `tensor` with zeros appended to its last dimension, up to a multiple of what is read at a time."""
    missing = -tensor.shape[-1] % step(tensor.dtype)
    return pad(tensor, (0, missing)) if missing else tensor


def starts_aligned(tensor: Tensor) -> bool:
    """Whether the first element of `tensor` lies where the kernels can read.

    Of a tensor without memory, as under a trace, the offset in the storage decides: the allocator aligns storages to
    more than is needed here. Memory that came from elsewhere may start anywhere.
    """
    if type(tensor) is Tensor:
        return tensor.data_ptr() % READ_BYTES == 0
    return tensor.storage_offset() % step(tensor.dtype) == 0


def is_aligned(tensor: Tensor) -> bool:
    """Whether the kernels can read `tensor` as it is."""
    every = step(tensor.dtype)
    *strides, last = tensor.stride()
    fits = last == 1 and tensor.shape[-1] % every == 0 and starts_aligned(tensor)
    return fits and all(stride % every == 0 and stride < INT32 for stride in strides)


def aligned(tensor: Tensor) -> Tensor:
    """Return `tensor`, its last dimension padded, or a copy if its strides or its start are out of step."""
    tensor = padded(tensor)
    return tensor if is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def packed(tensor: Tensor) -> Tensor:
    """Return `tensor`, padded, contiguous as it is indexed, and aligned."""
    tensor = padded(tensor)
    if tensor.is_contiguous() and starts_aligned(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def laid_out(like: Tensor, order: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Return what makes of a tensor that lies in memory as this one does one whose dimensions do so in this order.

    One that does already is returned as it is. Any other is copied, to where the kernels can read.
    """
    if like.permute(*order).is_contiguous():
        return lambda tensor: tensor
    shape = [like.shape[dim] for dim in order]
    steps = dict(zip(order, contiguous_strides(shape), strict=True))
    strides = [steps[dim] for dim in range(4)]
    return lambda tensor: tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


def contiguous_strides(shape: Sequence[int]) -> list[int]:
    """Return the strides of a contiguous tensor."""
    return [prod(shape[dim + 1 :]) for dim in range(len(shape))]


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements share memory."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def unshared(tensor: Tensor) -> Tensor:
    """Return `tensor` aligned, and with memory of its own for every element."""
    return aligned(compact(tensor) if is_expanded(tensor) else tensor)


def reachable(tensor: Tensor, length: int) -> Tensor:
    """Return `(b, s, h, e)` such that `length` rows lie within what the forward kernel can index.

    It multiplies the position of a key by the stride with 32 bits. Heads first, rows lie as close as they can.
    """
    if length * tensor.stride(1) < INT32:
        return tensor
    return compact(tensor.transpose(1, 2)).transpose(1, 2)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `mask` in `dtype`, to be added to the logits: False becomes minus infinity.

    A finite number that `dtype` cannot hold becomes its largest, not infinite: a row of large negative
    numbers is not a row that sees nothing.
    """
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return zeros.masked_fill_(mask.logical_not(), float("-inf"))
    if mask.dtype == dtype:
        return mask
    largest = torch.finfo(dtype).max
    return mask.clamp(-largest, largest).to(dtype).masked_fill(mask == float("-inf"), float("-inf"))


def bias(mask: Tensor | None, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> Tensor | None:
    """Return `mask` as the kernel's bias, expanded to `shape = (b, h, Sq, Sk)` without copying where that can be.

    Raises:
        ValueError: rows start further behind the first one than this release of PyTorch counts.
    """
    if mask is None:
        return None
    tensor = additive(mask.detach(), dtype)
    keys, every = shape[-1], step(dtype)
    if tensor.shape[-1] != keys:
        tensor = tensor.expand(*tensor.shape[:-1], keys)
    strides = [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1][:-1]
    fits = keys % every == 0 and tensor.stride(-1) == 1 and starts_aligned(tensor)
    if not fits or any(stride % every for stride in strides):
        missing = -keys % READ_BYTES
        rows = pad(tensor, (0, missing)) if missing else tensor.clone(memory_format=torch.contiguous_format)
        tensor = first(rows, keys)
    expanded = tensor.expand(shape)
    if SHORT_OFFSETS and (shape[2] - 1) * expanded.stride(2) >= UINT32:
        raise ValueError(
            f"efficient_cuda: PyTorch {torch.__version__} reads the rows of an attn_mask of {shape[2]} x {keys} "
            f"numbers wrongly behind the first 2^32 (pytorch#187227, until 2.13); use another implementation"
        )
    return expanded


@dataclass(frozen=True)
class Heads:
    """How query heads find their key/value head, in a kernel that wants as many of one as of the other.

    `folded`: the groups become heads and the key/value heads become part of the batch, so that a group
    shares its keys by a stride of 0. Otherwise keys and values are repeated; then the mask keeps the
    batch and head dimensions that it has.
    """

    batch: int
    heads: int
    kv_heads: int
    folded: bool

    @classmethod
    def of(cls, query: Tensor, key: Tensor, mask: Tensor | None) -> Heads:
        """Choose for dense `(B, H, S, E)` tensors: a mask that would have to be copied is not folded."""
        batch, heads, kv_heads = query.shape[0], query.shape[1], key.shape[1]
        light = mask is None or mask.shape[2] == 1 or tuple(mask.shape[:2]) == (1, 1)
        return cls(batch, heads, kv_heads, folded=heads != kv_heads and light)

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def kernel_shape(self) -> tuple[int, int]:
        """The batch size and the number of heads that the kernel sees."""
        return (self.batch * self.kv_heads, self.group) if self.folded else (self.batch, self.heads)

    def rows(self, tensor: Tensor) -> Tensor:
        """Return `(B, Hq, ...)` as the kernel's `(b, h, ...)`."""
        return tensor.reshape(*self.kernel_shape, *tensor.shape[2:]) if self.folded else tensor

    def keys(self, tensor: Tensor) -> Tensor:
        """Return `(B, Hkv, Sk, E)` as the kernel's `(b, h, Sk, E)`."""
        if self.folded:
            return tensor.reshape(-1, 1, *tensor.shape[2:]).expand(-1, self.group, -1, -1)
        return tensor if self.group == 1 else tensor.repeat_interleave(self.group, 1)

    def mask(self, tensor: Tensor | None) -> Tensor | None:
        """Return the mask with batch and head dimensions that expand to the kernel's."""
        if tensor is None or not self.folded or tuple(tensor.shape[:2]) == (1, 1):
            return tensor
        return self.rows(tensor.expand(self.batch, self.heads, *tensor.shape[2:]))

    def out_back(self, out: Tensor) -> Tensor:
        """Return the kernel's `(b, S, h, E)` as `(B, Hq, S, E)`, in memory `(B, S, Hq, E)`."""
        if self.folded:
            out = out.reshape(self.batch, self.kv_heads, *out.shape[1:]).transpose(1, 2)
            out = out.reshape(self.batch, out.shape[1], self.heads, -1)
        return compact(out).transpose(1, 2)

    def rows_back(self, tensor: Tensor) -> Tensor:
        """Return the kernel's `(b, h, ...)` as `(B, Hq, ...)`."""
        return tensor.reshape(self.batch, self.heads, *tensor.shape[2:]) if self.folded else tensor

    def keys_back(self, grad: Tensor) -> Tensor:
        """Sum the kernel's gradient `(b, h, Sk, E)` over each group, to `(B, Hkv, Sk, E)`."""
        if self.group == 1:
            return grad
        return grad.reshape(self.batch, self.kv_heads, self.group, *grad.shape[2:]).sum(2)
