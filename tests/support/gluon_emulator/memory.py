"""Shared memory and barriers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gluon_emulator.events import Cell, Clock, Fault
from gluon_emulator.program import current
from gluon_emulator.values import NAN, tensor


class Buffer:
    """Shared memory, or a view of it."""

    def __init__(self, data: Tensor, cells: list[Cell]) -> None:
        self.data, self.cells = data, cells

    @classmethod
    def allocate(cls, shape: list[int]) -> Buffer:
        program = current()
        program.allocations += 1
        cells = [Cell(f"buffer {i} of allocation {program.allocations} {shape}") for i in range(shape[0])]
        program.cells += cells
        return cls(torch.full(shape, NAN), cells)

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def index(self, i: int) -> Buffer:
        if not 0 <= i < self.data.shape[0]:
            raise Fault(f"index {i} of shared memory {self.shape}")
        return Buffer(self.data[i], self.cells[i : i + 1] if len(self.cells) > 1 else self.cells)

    def reshape(self, shape: list[int]) -> Buffer:
        return Buffer(self.data.view(shape), self.cells)

    def permute(self, order: tuple[int, ...]) -> Buffer:
        return Buffer(self.data.permute(order), self.cells)

    def slice(self, start: int, length: int, dim: int = 0) -> Buffer:
        return Buffer(self.data.narrow(dim, start, length), self.cells)

    def load(self, layout: Any = None) -> Any:
        program = current()
        program.yield_()
        for cell in self.cells:
            cell.read(program.thread.clock, program.thread.now, asynchronous=False)
        return tensor(self.data.clone())

    def store(self, value: Tensor) -> None:
        program = current()
        program.yield_()
        thread = program.thread
        if list(value.shape) != self.shape:
            raise Fault(f"{list(value.shape)} is stored to shared memory {self.shape}")
        for cell in self.cells:
            cell.write(thread.clock, thread.now)
            cell.unfenced.add(thread.name)
        self.data.copy_(value.as_subclass(Tensor))


class Barrier:
    """An mbarrier: a phase ends when as many have arrived as it counts, and all bytes that it expects."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phases = 0
        self.arrived = Clock()
        self.passed = Clock()

    def check(self) -> None:
        if self.pending < 0:
            raise Fault("more arrivals at a barrier than it counts")
        if self.pending == 0 and self.bytes == 0 and self.count:
            self.phases += 1
            self.pending = self.count
            self.passed, self.arrived = self.arrived, Clock()

    def arrive(self, clock: Clock, count: int) -> None:
        self.arrived.join(clock)
        self.pending -= count
        self.check()


class Barriers:
    """Several barriers."""

    def __init__(self, number: int) -> None:
        self.barriers = [Barrier() for _ in range(number)]
        current().barriers += self.barriers

    def index(self, i: int) -> Barrier:
        if not 0 <= i < len(self.barriers):
            raise Fault(f"barrier {i} of {len(self.barriers)}")
        return self.barriers[i]


class mbarrier:
    """Gluon's module."""

    MBarrierLayout = staticmethod(lambda *_: None)

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    @staticmethod
    def expect(barrier: Barrier, bytes: int, pred: bool = True) -> None:
        if not pred:
            return
        program = current()
        program.yield_()
        barrier.bytes += bytes
        barrier.arrive(program.thread.clock, 1)
        program.thread.step()

    @staticmethod
    def arrive(barrier: Barrier, count: int = 1, pred: bool = True) -> None:
        program = current()
        if pred:
            program.yield_()
            barrier.arrive(program.thread.clock, count)
            program.thread.step()
        program.yield_()

    @staticmethod
    def wait(barrier: Barrier, phase: int, pred: bool = True, deps: Any = ()) -> None:
        if not pred:
            return
        program = current()
        program.yield_(lambda: barrier.phases & 1 != phase & 1)
        program.thread.clock.join(barrier.passed)


def fence_async_shared() -> None:
    """What this thread has written, products and copies may read."""
    program = current()
    for cell in program.cells:
        cell.unfenced.discard(program.thread.name)
