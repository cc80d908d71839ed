"""What the hardware does by itself: copies of tiles, and products."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from gluon_emulator.events import Clock, Fault
from gluon_emulator.memory import Barrier, Buffer
from gluon_emulator.program import Thread, current
from gluon_emulator.values import HALF, NAN, tensor


class Descriptor:
    """A tensor as TMA takes it: any strides, bounds in every dimension, pointers that wrap around at 64 bits."""

    def __init__(self, base: Tensor, shape: Any, strides: Any, block_shape: Any, layout: Any, dtype: Any) -> None:
        size = base.untyped_storage().nbytes() // base.element_size()
        self.flat, self.start = base.as_strided((size,), (1,), 0), base.storage_offset()
        self.shape, self.strides, self.layout, self.dtype = shape, strides, layout, dtype
        bytes_of_one = 2 if dtype == HALF else 4
        numel = torch.Size(block_shape).numel()
        self.block_type = types.SimpleNamespace(shape=list(block_shape), nbytes=numel * bytes_of_one)
        self.block_shape = list(block_shape)

    def _box(self, coordinates: Any) -> tuple[tuple[slice, ...], Tensor]:
        """Return (which elements of a tile exist, a view of them)."""
        if len(coordinates) != len(self.block_shape):
            raise Fault(f"{len(coordinates)} coordinates for a descriptor of {len(self.block_shape)} dimensions")
        box, sizes, steps, offset = [], [], [], self.start
        for at, size, length, step in zip(coordinates, self.shape, self.block_shape, self.strides, strict=True):
            begin, end = max(0, -int(at)), min(length, int(size) - int(at))
            box.append(slice(begin, max(begin, end)))
            sizes.append(max(0, end - begin))
            steps.append(int(step) if sizes[-1] > 1 else 0)
            offset += (int(at) + begin) * int(step)
        if 0 in sizes:
            return tuple(box), self.flat[:0].view(sizes)
        return tuple(box), self.flat.as_strided(sizes, steps, _wrapped(offset))

    def read(self, coordinates: Any) -> Tensor:
        box, there = self._box(coordinates)
        values = torch.zeros(self.block_shape)
        values[box] = there
        return values

    def write(self, coordinates: Any, values: Tensor, add: bool) -> None:
        box, there = self._box(coordinates)
        if add:
            there.add_(values[box])
        else:
            there.copy_(values[box])


def _wrapped(offset: int) -> int:
    return (offset + 2**63) % 2**64 - 2**63


def load_tile(desc: Descriptor, coordinates: Any, barrier: Barrier, buffer: Buffer, pred: bool = True) -> None:
    """Begin to copy a tile to shared memory."""
    if not pred:
        return
    program = current()
    program.yield_()
    if buffer.shape != desc.block_shape:
        raise Fault(f"a tile {desc.block_shape} is loaded to shared memory {buffer.shape}")
    program.copied += 1
    agent = f"load {program.copied}"
    clock = Clock(program.thread.clock)
    clock[agent] = 1
    for cell in buffer.cells:
        cell.write(clock, (agent, 1))
    buffer.data.fill_(NAN)
    coordinates = tuple(int(x) for x in coordinates)

    def land() -> None:
        buffer.data.copy_(desc.read(coordinates))
        barrier.bytes -= desc.block_type.nbytes
        barrier.arrived.join(clock)
        barrier.check()

    program.copies.append(land)
    program.yield_()


def _begin_store(desc: Descriptor, coordinates: Any, buffer: Buffer, add: bool) -> None:
    program = current()
    program.yield_()
    thread = program.thread
    if buffer.shape != desc.block_shape:
        raise Fault(f"shared memory {buffer.shape} is stored as a tile {desc.block_shape}")
    coordinates = tuple(int(x) for x in coordinates)
    _begin_read(buffer, thread)
    late = program.is_late()
    if not late:
        desc.write(coordinates, buffer.data, add)

    def finish() -> None:
        if late:
            desc.write(coordinates, buffer.data, add)
        _end_read(buffer, thread)

    thread.stores.append(finish)
    program.yield_()


def store_tile(desc: Descriptor, coordinates: Any, buffer: Buffer) -> None:
    """Begin to copy a tile from shared memory."""
    _begin_store(desc, coordinates, buffer, False)


def reduce_add(desc: Descriptor, coordinates: Any, buffer: Buffer) -> None:
    """Begin to add a tile of shared memory to global memory."""
    _begin_store(desc, coordinates, buffer, True)


def store_wait(pendings: int) -> None:
    """Wait until all but `pendings` stores have read shared memory."""
    program = current()
    stores = program.thread.stores
    while len(stores) > pendings:
        stores.pop(0)()
    program.yield_()


def _begin_read(buffer: Buffer, thread: Thread) -> None:
    for cell in buffer.cells:
        cell.read(thread.clock, thread.now, asynchronous=True)
        cell.reading += 1


def _end_read(buffer: Buffer, thread: Thread) -> None:
    for cell in buffer.cells:
        cell.reading -= 1
        cell.reads[thread.name] = thread.clock[thread.name]


class Product:
    """What `warpgroup_mma` returns: nothing may look at it before it was waited for.

    One of operands that are not there, or not for sure, is a fault when its result is used.
    """

    def __init__(self, left: Any, right: Buffer, total: Any, use_acc: bool) -> None:
        program = current()
        self.left, self.right, self.total, self.use_acc = left, right, total, use_acc
        self.value: Tensor | None = None
        self.thread = program.thread
        self.buffers = [operand for operand in (left, right) if isinstance(operand, Buffer)]
        self.fault = total.fault if isinstance(total, Product) else None
        try:
            for buffer in self.buffers:
                for cell in buffer.cells:
                    cell.read(self.thread.clock, self.thread.now, asynchronous=True)
        except Fault as fault:  # a kernel may multiply ahead what it then has no use for
            self.fault, self.buffers = fault, []
        for buffer in self.buffers:
            for cell in buffer.cells:
                cell.reading += 1
        self.shape = list(total.shape)
        self.late = program.is_late()
        self.is_over = False
        if not self.late and not (isinstance(total, Product) and total.value is None):
            self.value = self.multiplied()

    def multiplied(self) -> Tensor:
        left = self.left.data if isinstance(self.left, Buffer) else self.left
        result = left.as_subclass(Tensor) @ self.right.data
        if not self.use_acc:
            return result
        before = self.total.value if isinstance(self.total, Product) else self.total
        return result + before.as_subclass(Tensor)

    def finish(self) -> None:
        if self.value is None:
            self.value = self.multiplied()
        for buffer in self.buffers:
            _end_read(buffer, self.thread)
        self.is_over = True


def warpgroup_mma(
    left: Any, right: Buffer, total: Any, *, use_acc: bool = True, precision: Any = None, is_async: bool = False
) -> Any:
    """Begin a product; without `is_async`, finish it too."""
    program = current()
    program.yield_()
    if (left.shape[0], left.shape[1], right.shape[1]) != (total.shape[0], right.shape[0], total.shape[1]):
        raise Fault(f"a product of {list(left.shape)} and {right.shape} for {list(total.shape)}")
    product = Product(left, right, total, use_acc)
    program.thread.products.append(product)
    program.yield_()
    return product if is_async else warpgroup_mma_wait(0, deps=(product,))


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Any = ()) -> Any:
    """Wait until all but so many products are over, and return `deps`, of which all products must be."""
    program = current()
    program.yield_()
    products = program.thread.products
    while len(products) > num_outstanding:
        products.pop(0).finish()
    results = []
    for value in deps:
        if isinstance(value, Product):
            if not value.is_over:
                raise Fault("the result of a product is used that was not waited for")
            result = tensor(value.value)
            result.fault = value.fault
            results.append(result)
        else:
            results.append(value)
    return results[0] if len(results) == 1 else tuple(results)
