"""Runs Gluon kernels' own source on a CPU, and finds their races, wrong waits and missing fences.

Triton's interpreter does not know Gluon. Here a kernel is the Python function that it is written as, with Triton's
names replaced: tensors are torch tensors in float32, partitions of `warp_specialize` are threads of which one runs at
a time, barriers have phases. What the hardware does by itself is made as bad as it may be:

- shared memory is NaN until something is written;
- a copy of TMA makes its target NaN at once and lands when the seed says so, at the latest when nobody else can run;
- products and stores of TMA read their operands at once or at the wait for them, as the seed says;
- which thread goes on is drawn at every step; with some seeds, one always goes first.

Whether a result was right by luck is not left to the seed: every access to a buffer must be ordered with those before
it by barriers (a vector clock for each thread and copy, as in FastTrack: Flanagan and Freund, 2009), and what threads
write must be fenced before products and copies read it. A buffer is what the first dimension of an allocation counts.

Numbers are float32, whatever a descriptor says: rounding would hide small errors.
"""

from __future__ import annotations

import random
import threading
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon  # noqa: F401  (kernels are defined with it)
from triton.experimental.gluon import language as gl

NAN = float("nan")
HALF = "half"
"""The type of a descriptor's tensor: two bytes to barriers, float32 to everything else."""


class Fault(AssertionError):
    """What a kernel does is wrong, whether or not its result is."""


# ------------------------------------------------------------------------------------------- order of events


class Clock(dict[Any, int]):
    """What has happened before: for each agent (a thread or a copy), its last step that is known of."""

    def join(self, other: Mapping[Any, int]) -> None:
        for agent, step in other.items():
            if self.get(agent, 0) < step:
                self[agent] = step

    def knows(self, event: tuple[Any, int]) -> bool:
        return self.get(event[0], 0) >= event[1]


class Cell:
    """The accesses to one buffer: who wrote it, who has read it since, and which reads are still under way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.written: tuple[Any, int] | None = None
        self.reads: dict[Any, int] = {}
        self.reading = 0
        self.unfenced: set[Any] = set()

    def write(self, clock: Clock, event: tuple[Any, int]) -> None:
        if self.reading:
            raise Fault(f"{self.name} is written while a product or a store still reads it")
        if self.written is not None and not clock.knows(self.written):
            raise Fault(f"{self.name} is written twice, in no order")
        for read in self.reads.items():
            if not clock.knows(read):
                raise Fault(f"{self.name} is written although {read[0]} may still read it")
        self.written, self.reads = event, {}

    def read(self, clock: Clock, event: tuple[Any, int], asynchronous: bool) -> None:
        if self.written is None:
            raise Fault(f"{self.name} is read before anything was written")
        if not clock.knows(self.written):
            raise Fault(f"{self.name} is read although what {self.written[0]} writes may not be there")
        if asynchronous and self.unfenced:
            raise Fault(f"{self.name} is read by a product or a store, and what threads wrote there is not fenced")
        self.reads[event[0]] = event[1]


# ----------------------------------------------------------------------------------------------- one program


class Thread:
    """One partition: its clock, and the products and stores that it has begun."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock = Clock({name: 1})
        self.products: list[Product] = []
        self.stores: list[Callable[[], None]] = []
        self.turn = threading.Semaphore(0)
        self.waits_for: Callable[[], bool] | None = None
        self.ended = False

    @property
    def now(self) -> tuple[str, int]:
        return self.name, self.clock[self.name]

    def step(self) -> None:
        self.clock[self.name] += 1


class Program:
    """One program at work: its threads, its copies under way, and who is next."""

    current: Program | None = None

    def __init__(self, number: int, seed: int) -> None:
        self.number = number
        self.random = random.Random(seed)
        self.late = seed % 3
        self.threads: list[Thread] = []
        self.copies: list[Callable[[], None]] = []
        self.copied = 0
        self.allocations = 0
        self.cells: list[Cell] = []
        self.barriers: list[Barrier] = []
        self.fault: BaseException | None = None
        self.local = threading.local()
        self.local.thread = Thread("program")
        self.favourite = self.random.choice((None, 0, 1, 2, 3))
        self.over = threading.Semaphore(0)

    @property
    def thread(self) -> Thread:
        thread: Thread = self.local.thread
        return thread

    def is_late(self) -> bool:
        """Whether an asynchronous read happens at the wait for it; else at once."""
        return (False, True, self.random.random() < 0.5)[self.late]

    def run(self, partitions: Iterable[tuple[Callable[..., Any], tuple[Any, ...]]]) -> None:
        before = self.thread
        workers = []
        for i, (function, arguments) in enumerate(partitions):
            thread = Thread(f"partition {i} ({function.__name__})")
            thread.clock.join(before.clock)
            self.threads.append(thread)
            workers.append(threading.Thread(target=self._partition, args=(thread, function, arguments), daemon=True))
        for worker in workers:
            worker.start()
        self._next()
        self.over.acquire()
        for worker in workers:
            worker.join()
        if self.fault is not None:
            raise self.fault
        if self.copies:
            raise Fault("the program ends before what it loads has arrived")

    def _partition(self, thread: Thread, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        thread.turn.acquire()
        self.local.thread = thread
        try:
            if self.fault is None:
                function(*arguments)
                if thread.stores:
                    raise Fault(f"{thread.name} ends before its stores have read what they write")
        except BaseException as fault:
            self.fault = self.fault or fault
        thread.ended = True
        self._next()

    def yield_(self, waits_for: Callable[[], bool] | None = None) -> None:
        """Let others go on, at least until `waits_for` holds."""
        if not self.threads:
            if waits_for is not None and not waits_for():
                raise Fault("a program waits before it has partitions")
            return
        thread = self.thread
        thread.waits_for = waits_for
        self._next()
        thread.turn.acquire()
        thread.waits_for = None
        if self.fault is not None:
            raise Fault("stopped, because of a fault elsewhere") from self.fault

    def _next(self) -> None:
        left = [thread for thread in self.threads if not thread.ended]
        if not left:
            while self.copies and self.fault is None:
                self.copies.pop(0)()
            self.over.release()
            return
        while True:
            if self.fault is not None:
                left[0].turn.release()
                return
            ready = [thread for thread in left if thread.waits_for is None or thread.waits_for()]
            if self.copies and (not ready or self.random.random() < 0.2):
                self.copies.pop(self.random.randrange(len(self.copies)))()
                continue
            if not ready:
                waiting = "; ".join(f"{thread.name} waits" for thread in left)
                self.fault = Fault(f"deadlock: {waiting}")
                continue
            favourite = self.favourite
            if favourite is not None and favourite < len(self.threads) and self.threads[favourite] in ready:
                ready = [self.threads[favourite]]
            self.random.choice(ready).turn.release()
            return


def _program() -> Program:
    assert Program.current is not None
    return Program.current


# ----------------------------------------------------------------------------------- shared memory, barriers


class Buffer:
    """Shared memory, or a view of it."""

    def __init__(self, data: Tensor, cells: list[Cell]) -> None:
        self.data, self.cells = data, cells

    @classmethod
    def allocate(cls, shape: list[int]) -> Buffer:
        program = _program()
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
        program = _program()
        program.yield_()
        for cell in self.cells:
            cell.read(program.thread.clock, program.thread.now, asynchronous=False)
        return tensor(self.data.clone())

    def store(self, value: Tensor) -> None:
        program = _program()
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
        _program().barriers += self.barriers

    def index(self, i: int) -> Barrier:
        if not 0 <= i < len(self.barriers):
            raise Fault(f"barrier {i} of {len(self.barriers)}")
        return self.barriers[i]


class mbarrier:  # noqa: N801  (Gluon's name)
    """Gluon's module."""

    MBarrierLayout = staticmethod(lambda *_: None)

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    @staticmethod
    def expect(barrier: Barrier, bytes: int, pred: bool = True) -> None:
        if not pred:
            return
        program = _program()
        program.yield_()
        barrier.bytes += bytes
        barrier.arrive(program.thread.clock, 1)
        program.thread.step()

    @staticmethod
    def arrive(barrier: Barrier, count: int = 1, pred: bool = True) -> None:
        program = _program()
        if pred:
            program.yield_()
            barrier.arrive(program.thread.clock, count)
            program.thread.step()
        program.yield_()

    @staticmethod
    def wait(barrier: Barrier, phase: int, pred: bool = True, deps: Any = ()) -> None:
        if not pred:
            return
        program = _program()
        program.yield_(lambda: barrier.phases & 1 != phase & 1)
        program.thread.clock.join(barrier.passed)

    @staticmethod
    def invalidate(barrier: Barrier) -> None:
        pass


def fence_async_shared(cluster: bool = False) -> None:
    """What this thread has written, products and copies may read."""
    program = _program()
    for cell in program.cells:
        cell.unfenced.discard(program.thread.name)


class Meeting:
    """A barrier of `threads` partitions, such as `bar.sync` with a number of its own."""

    def __init__(self, threads: int) -> None:
        self.threads, self.here, self.met, self.clock = threads, 0, 0, Clock()

    def __call__(self) -> None:
        program = _program()
        turn = self.met
        self.clock.join(program.thread.clock)
        program.thread.step()
        self.here += 1
        if self.here == self.threads:
            self.here, self.met = 0, self.met + 1
        program.yield_(lambda: self.met > turn)
        program.thread.clock.join(self.clock)


# ------------------------------------------------------------------------------------- copies and products


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

    def place(self, coordinates: Any) -> tuple[Tensor, Tensor]:
        """Return (where elements lie, which of them exist)."""
        if len(coordinates) != len(self.block_shape):
            raise Fault(f"{len(coordinates)} coordinates for a descriptor of {len(self.block_shape)} dimensions")
        offset, exists = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.bool)
        for at, size, length, step in zip(coordinates, self.shape, self.block_shape, self.strides, strict=True):
            index = int(at) + torch.arange(length)
            offset = offset[..., None] + index * step
            exists = exists[..., None] & (index >= 0) & (index < size)
        return offset + self.start, exists

    def read(self, coordinates: Any) -> Tensor:
        offset, exists = self.place(coordinates)
        values = torch.zeros(self.block_shape)
        values[exists] = self.flat[offset[exists]]
        return values

    def write(self, coordinates: Any, values: Tensor, add: bool) -> None:
        offset, exists = self.place(coordinates)
        if add:
            self.flat.index_add_(0, offset[exists], values[exists])
        else:
            self.flat[offset[exists]] = values[exists]


def load_tile(desc: Descriptor, coordinates: Any, barrier: Barrier, buffer: Buffer, pred: bool = True) -> None:
    """Begin to copy a tile to shared memory."""
    if not pred:
        return
    program = _program()
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
    program = _program()
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
    program = _program()
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
        program = _program()
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
    program = _program()
    program.yield_()
    if (left.shape[0], left.shape[1], right.shape[1]) != (total.shape[0], right.shape[0], total.shape[1]):
        raise Fault(f"a product of {list(left.shape)} and {right.shape} for {list(total.shape)}")
    product = Product(left, right, total, use_acc)
    product.shape = list(total.shape)  # type: ignore[attr-defined]
    program.thread.products.append(product)
    program.yield_()
    return product if is_async else warpgroup_mma_wait(0, deps=(product,))


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Any = ()) -> Any:
    """Wait until all but so many products are over, and return `deps`, of which all products must be."""
    program = _program()
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


# --------------------------------------------------------------------------------------- Triton's language


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


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, Tensor) else value


def _both(function: Callable[..., Tensor], scalar: Callable[..., Any]) -> Callable[..., Any]:
    def either(left: Any, right: Any) -> Any:
        if not isinstance(left, Tensor) and not isinstance(right, Tensor):
            return scalar(left, right)
        like = left if isinstance(left, Tensor) else right
        left, right = (x if isinstance(x, Tensor) else torch.tensor(x, dtype=like.dtype) for x in (left, right))
        return tensor(function(_plain(left), _plain(right)))

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
        return torch.as_tensor(_plain(self.offset)).long() + self.base.storage_offset()


def _load(pointer: Pointer, mask: Any = None, other: Any = 0.0, **_: Any) -> Any:
    flat, at = pointer.flat(), pointer.indices()
    if mask is None:
        values = flat[at]
    else:
        at, mask = torch.broadcast_tensors(at, torch.as_tensor(_plain(mask)))
        values = torch.full(at.shape, other, dtype=flat.dtype)
        values[mask] = flat[at[mask]]
    return tensor(values) if values.dim() else values.item()


def _store(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    flat, at = pointer.flat(), pointer.indices()
    mask = torch.ones((), dtype=torch.bool) if mask is None else torch.as_tensor(_plain(mask))
    at, mask, value = torch.broadcast_tensors(at, mask, torch.as_tensor(_plain(value), dtype=flat.dtype))
    flat[at[mask]] = value[mask]


def _reduction(name: str) -> Callable[..., Any]:
    def reduce(x: Tensor, axis: int | None = None) -> Any:
        return tensor(getattr(torch, f"a{name}" if name in ("max", "min") else name)(_plain(x), dim=axis))

    return reduce


class Language:
    """`triton.language` and Gluon's, of which kernels use the same part."""

    constexpr = staticmethod(lambda value: value)
    float32, int32, int64, int1, bfloat16, float16 = "float32", "int32", "int64", "int1", HALF, HALF
    NVMMADistributedLayout = NVMMASharedLayout = SwizzledSharedLayout = SliceLayout = staticmethod(lambda *_: None)
    DotOperandLayout = BlockedLayout = NVMMADistributedLayout
    static_range = range
    range = range
    program_id = staticmethod(lambda axis: _program().number)
    num_programs = staticmethod(lambda axis: _program().programs)  # type: ignore[attr-defined]
    zeros = staticmethod(lambda shape, *_, **__: tensor(torch.zeros(shape)))
    full = staticmethod(lambda shape, value, *_, **__: tensor(torch.full(shape, value)))
    arange = staticmethod(lambda start, end, layout=None: tensor(torch.arange(start, end)))
    minimum = staticmethod(_both(torch.minimum, min))
    maximum = staticmethod(_both(torch.maximum, max))
    where = staticmethod(
        lambda c, a, b: tensor(torch.where(_plain(c), _plain(a), _plain(b))) if isinstance(c, Tensor) else a if c else b
    )
    reshape = staticmethod(lambda x, shape: x.reshape(shape))
    permute = staticmethod(lambda x, order: x.permute(order))
    trans = staticmethod(lambda x: x.T)
    convert_layout = staticmethod(lambda x, layout, assert_trivial=False: x)
    cast = staticmethod(lambda x, dtype, bitcast=False: x)
    load, store = staticmethod(_load), staticmethod(_store)
    sum, max, min = (staticmethod(_reduction(name)) for name in ("sum", "max", "min"))
    exp2 = staticmethod(lambda x: torch.exp2(x))
    log2 = staticmethod(lambda x: torch.log2(x))
    exp = staticmethod(lambda x: torch.exp(x))
    log = staticmethod(lambda x: torch.log(x))
    abs = staticmethod(lambda x: torch.abs(x))
    join = staticmethod(lambda a, b: tensor(torch.stack((_plain(a), _plain(b)), -1)))
    split = staticmethod(lambda x: (x[..., 0], x[..., 1]))
    expand_dims = staticmethod(lambda x, axis: x.unsqueeze(axis))
    atomic_add = staticmethod(lambda p, value, mask=None, sem=None: _store(p, _load(p) + value, mask))

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
        _program().run(partitions)


# ----------------------------------------------------------------------------------------------- launching


def _twin_of_meeting(number: Any) -> None:
    """Both warpgroups that multiply meet."""
    program = _program()
    if not hasattr(program, "meeting"):
        program.meeting = Meeting(2)  # type: ignore[attr-defined]
    program.meeting()  # type: ignore[attr-defined]


TWINS: dict[str, Any] = {
    # What is written in the assembler's language, by name, and what moves tiles.
    "exp2": lambda x: torch.exp2(x),
    "exp2_shared": lambda x, ONE_IN=0: torch.exp2(x),
    "above_wait": lambda x: x,
    "packed": lambda x, dtype: x,
    "as_operand": lambda x, dtype, layout: x,
    "unpacked": lambda x, dtype, layout: x,
    "both_are_done": _twin_of_meeting,
    "_both_are_done": _twin_of_meeting,
    "load_tile": load_tile,
    "store_tile": store_tile,
    "store_wait": store_wait,
    "reduce_add": reduce_add,
    "fence_async_shared": fence_async_shared,
    "mbarrier": mbarrier,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
    "gl": Language,
    "tl": Language,
}


class Emulated:
    """The functions of kernels' modules with Triton's names replaced, made when they are first called."""

    def __init__(self, twins: Mapping[str, Any] = TWINS) -> None:
        self.twins = twins
        self.globals: dict[int, dict[str, Any]] = {}

    def function(self, jitted: Any) -> Callable[..., Any]:
        original = jitted.fn
        names = self.globals.get(id(original.__globals__))
        if names is None:
            names = self.globals[id(original.__globals__)] = {"__builtins__": __builtins__}
            for name, value in original.__globals__.items():
                names[name] = self.replaced(name, value)
        return types.FunctionType(original.__code__, names, original.__name__, original.__defaults__)

    def replaced(self, name: str, value: Any) -> Any:
        if name in self.twins:
            return self.twins[name]
        if isinstance(value, triton.runtime.jit.JITFunction):
            return _Later(self, value)
        return value.value if isinstance(value, gl.constexpr | triton.language.constexpr) else value


class _Later:
    """A function of a kernel's module that is looked up when it is called."""

    def __init__(self, emulated: Emulated, jitted: Any) -> None:
        self.emulated, self.jitted, self.__name__ = emulated, jitted, jitted.fn.__name__

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.emulated.function(self.jitted)(*arguments, **named)


def launch(
    kernel: Any, programs: int, arguments: Iterable[Any], compiled_in: Mapping[str, Any], seed: int = 0
) -> None:
    """Run a kernel, Gluon's or Triton's, one program after another; raises `Fault`."""
    function = Emulated().function(kernel)
    names = set(kernel.arg_names)
    constants = {name: value for name, value in compiled_in.items() if name in names}
    for number in range(programs):
        program = Program(number, seed + number)
        program.programs = programs  # type: ignore[attr-defined]
        Program.current = program
        try:
            function(*arguments, **constants)
        finally:
            Program.current = None


def run_plan(plan: Any, given: Mapping[str, Tensor], seed: int = 0, halves: Iterable[str] = ()) -> tuple[Tensor, ...]:
    """Run a plan of flash_triton's with tensors in float32, and return its results.

    What the plan makes is NaN where it does not fill it. `halves` names the tensors that it was made for in 16 bits.
    """
    tensors = dict(given)
    for name in plan.compact:
        tensors[name] = tensors[name].contiguous()
    halves = set(halves)
    for name, new in plan.new.items():
        made = torch.empty_strided(new.shape, new.stride, dtype=torch.float32)
        tensors[name] = made.fill_(NAN if new.fill is None else new.fill)
        if new.dtype != torch.float32:
            halves.add(name)

    def bound(argument: Any) -> Any:
        if isinstance(argument, str):
            return Pointer(tensors[argument])
        if hasattr(argument, "block_shape"):
            name = argument.name
            dtype = HALF if name in halves else "float32"
            return Descriptor(tensors[name], *argument[1:], dtype)
        return argument

    for step in plan.launches:
        launch(step.kernel, step.programs, [bound(x) for x in step.arguments], step.compiled_in, seed)
    return tuple(tensors[name] for name in plan.results)
