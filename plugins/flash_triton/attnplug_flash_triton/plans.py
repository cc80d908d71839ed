"""What a call runs, as a value: kernels with their arguments, in which tensors have names.

So the same plan is run by a call, compiled ahead of time to learn what it costs, and timed by the tuning; and a call
like one before it finds its plan kept, and only fills in pointers. A family of kernels for one architecture is a
module with two functions that make plans, `forward` and `backward`, as in `launches.py`.

Triton's own way from arguments to a launch specialises each of them at every call, which takes longer than all else.
A kernel goes that way once for all that is compiled apart; from then on what its launcher calls in the end is called as
that would call it, for other sizes, too.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from attnplug import bind_cuda_context

DESCRIPTORS_KEPT = 64
COMPILED_KEPT = 1024
ALIGNED = 16
"""Bytes. Triton compiles a kernel apart for pointers that are not multiples of it."""
INT32 = 2**31
"""From here on Triton passes an integer in 64 bits, to another kernel."""
FAR = 2**31
"""Bytes: Triton compiles a kernel for AMD's GPUs apart for tensors in less memory, in which it counts in 32 bits."""
APART = 256
"""Bytes: what parts of a workspace start at multiples of, as tensors of their own do at least."""


class New(NamedTuple):
    """A tensor that a plan makes at every call; `fill` is what it holds before the first launch, None for anything."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    fill: float | None = None

    @classmethod
    def contiguous(cls, shape: Sequence[int], dtype: torch.dtype, fill: float | None = None) -> New:
        """Return one whose elements lie in the order of their indices."""
        return cls(tuple(shape), dtype, contiguous_strides(shape), fill)

    @property
    def bytes(self) -> int:
        """How much memory it takes."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    def make(self, device: torch.device) -> Tensor:
        """Return the tensor."""
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        return tensor if self.fill is None else tensor.fill_(self.fill)


class Descriptor(NamedTuple):
    """A tensor that a kernel takes as a descriptor of the tensor memory accelerator: shape and strides in elements."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]
    layout: Any

    def of(self, tensor: Tensor) -> Any:
        """Return the descriptor as Gluon has it, in a thread that can make a tensor map of it."""
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        bind_cuda_context()
        return TensorDescriptor(tensor, list(self.shape), list(self.strides), list(self.block_shape), self.layout)


class Launch(NamedTuple):
    """A kernel, how many programs of it, and its arguments: in order, and those that are compiled in by name.

    An argument is a number, None, the name of a tensor, or a `Descriptor`.
    """

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    compiled_in: dict[str, Any]

    def bound(self, tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """Return the arguments with tensors in the places of their names."""
        return tuple(_bound(argument, tensors) for argument in self.arguments)

    def run(self, tensors: Mapping[str, Tensor]) -> Any:
        """Run it as Triton does; return the compiled kernel, None from the interpreter."""
        return self.kernel[(self.programs,)](*self.bound(tensors), **self.compiled_in)

    def compiled_apart(self, forms: Mapping[str, Hashable], device: torch.device) -> Hashable:
        """Return all that Triton compiles the kernel apart for, given what it looks at of tensors. About 5 us.

        Of a number that it is told not to specialise it looks at the type alone.
        """
        seen: list[Any] = [device, self.kernel, *self.compiled_in.items()]
        for argument, any_number in zip(self.arguments, _of_any_number(self.kernel), strict=False):
            if isinstance(argument, str):
                seen.append(forms[argument])
            elif isinstance(argument, Descriptor):
                seen.append((forms[argument.name], argument.block_shape, argument.layout))
            elif any_number and type(argument) is int:
                seen.append("i32" if -INT32 <= argument < INT32 else "i64")
            elif type(argument) is float:
                seen.append(float)
            else:
                seen.append((type(argument), argument))  # True is equal to 1
        return tuple(seen)


@cache
def _of_any_number(kernel: Any) -> list[bool]:
    """Return for each argument of a kernel whether Triton is told not to specialise it."""
    return [name in kernel.do_not_specialize for name in kernel.arg_names]


def _bound(argument: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(argument, str):
        return tensors[argument]
    return argument.of(tensors[argument.name]) if isinstance(argument, Descriptor) else argument


@dataclass
class Plan:
    """What calls of one kind run; see the module.

    Attributes:
        launches: in the order in which they must run.
        new: the tensors that it makes, by name.
        results: the names of what it returns.
        compact: the names of given tensors that must be made contiguous first.
    """

    launches: tuple[Launch, ...]
    new: dict[str, New]
    results: tuple[str, ...]
    compact: tuple[str, ...] = ()
    _kept: _Kept | None = field(default=None, repr=False, compare=False)

    @property
    def is_kept(self) -> bool:
        """Whether a call has ended, after which others need not go Triton's way."""
        return self._kept is not None

    def tensors(self, given: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Return all tensors that the launches name: those given, compact where they must be, and new ones."""
        tensors = {**given, **{name: given[name].contiguous() for name in self.compact}}
        return {**tensors, **{name: new.make(device) for name, new in self.new.items()}}

    def with_arguments(self, places: Sequence[int], numbers: Sequence[int]) -> Plan:
        """Return this plan with other integers, which Triton gives the same types, in places of its first launch."""
        first, *rest = self.launches
        arguments = list(first.arguments)
        for place, number in zip(places, numbers, strict=True):
            arguments[place] = number
        launches = (Launch(first.kernel, first.programs, tuple(arguments), first.compiled_in), *rest)
        kept = None if self._kept is None else self._kept.with_arguments(places, numbers)
        return Plan(launches, self.new, self.results, self.compact, kept)

    def run(self, given: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, ...]:
        """Run the plan with the tensors of one call, on the device that is current, and return its results.

        The kept form is made by the first call, or where a kernel is not compiled yet, by the first that ends, and
        holds for later ones: what the compiler has looked at, whether pointers are multiples of 16 and types, is part
        of what plans are kept under. While a profiler listens nothing is kept: it may have had Triton compile kernels
        that write into its memory.
        """
        watched = _is_watched()
        if not watched:
            if self._kept is None and _compiled:
                self._kept = self._found(given, device)
            if self._kept is not None:
                tensors = tuple(given.values())
                return self._kept.run(tensors, [tensor.data_ptr() for tensor in tensors])
        named = self.tensors(given, device)
        compiled = [launch.run(named) for launch in self.launches]
        if not watched and None not in compiled:  # the interpreter compiles nothing
            forms = self._forms(given)
            kernels = [
                _keep(launch.compiled_apart(forms, device), _Compiled(launch, kernel, named))
                for launch, kernel in zip(self.launches, compiled, strict=True)
            ]
            self._kept = _Kept(self, tuple(given), kernels, device)
        return tuple(named[name] for name in self.results)

    def repeat(self, tensors: tuple[Tensor, ...], pointers: list[int]) -> tuple[Tensor, ...] | None:
        """Do what `run` does, given tensors in the order of an earlier call's, and where they start, which is added to.

        None where nothing is kept, or a profiler listens.
        """
        return None if self._kept is None or _is_watched() else self._kept.run(tensors, pointers)

    def _found(self, given: Mapping[str, Tensor], device: torch.device) -> _Kept | None:
        """Return the kept form, if all kernels are compiled."""
        forms, kernels = self._forms(given), []
        for launch in self.launches:
            kernel = _compiled.get(launch.compiled_apart(forms, device))
            if kernel is None:
                return None
            kernels.append(kernel)
        return _Kept(self, tuple(given), kernels, device)

    def _forms(self, given: Mapping[str, Tensor]) -> dict[str, Hashable]:
        """Return what the compiler looks at of each tensor that the launches name."""
        amd = torch.version.hip is not None
        forms: dict[str, Hashable] = {name: (new.dtype, 0, amd and new.bytes >= FAR) for name, new in self.new.items()}
        for name, tensor in given.items():
            if name in self.compact and not tensor.is_contiguous():
                forms[name] = tensor.dtype, 0, amd and tensor.numel() * tensor.element_size() >= FAR
            else:
                forms[name] = tensor.dtype, tensor.data_ptr() % ALIGNED, is_far(tensor)
        return forms


def is_far(tensor: Tensor) -> bool:
    """Whether Triton compiles a kernel apart for a tensor because it lies in so much memory."""
    return torch.version.hip is not None and tensor.untyped_storage().nbytes() >= FAR


def _is_watched() -> bool:
    """Whether a profiler wants to hear of launches from Triton."""
    settings = knobs.runtime
    return bool(settings.launch_enter_hook.calls or settings.launch_exit_hook.calls)


class _Kept:
    """A plan after its first run. Tensors are numbered: those given, new ones, then those that only kernels see.

    The last are parts of one workspace, because to allocate costs about as much as to launch.
    """

    def __init__(self, plan: Plan, given: tuple[str, ...], kernels: list[_Compiled], device: torch.device) -> None:
        hidden = _hidden(plan)
        made = {name: new for name, new in plan.new.items() if name not in hidden}
        numbers = {name: number for number, name in enumerate((*given, *made, *hidden))}
        self.index, self.empty = device.index or 0, _allocator(device)
        self.compact = [numbers[name] for name in plan.compact]
        self.new = [(new.shape, new.stride, new.dtype, new.fill) for new in made.values()]
        self.results = [numbers[name] for name in plan.results]
        sizes = [-(-new.bytes // APART) * APART for new in hidden.values()]
        self.offsets = [sum(sizes[:number]) for number in range(len(sizes))]
        self.workspace = (sum(sizes),)
        self.launches = [_KeptLaunch(*pair, numbers) for pair in zip(plan.launches, kernels, strict=True)]

    def with_arguments(self, places: Sequence[int], numbers: Sequence[int]) -> _Kept:
        """See `Plan.with_arguments`."""
        kept = _clone(self)
        kept.launches = [self.launches[0].with_arguments(places, numbers), *self.launches[1:]]
        return kept

    def run(self, given: tuple[Tensor, ...], pointers: list[int]) -> tuple[Tensor, ...]:
        """Make what is new, and launch. About 3 us and 2 for each launch. What is new is added to the pointers."""
        tensors = [*given]
        for number in self.compact:
            tensors[number] = tensors[number].contiguous()
            pointers[number] = tensors[number].data_ptr()
        empty = self.empty
        for shape, stride, dtype, fill in self.new:
            tensor = empty(shape, stride, dtype)
            if fill is not None:
                tensor.fill_(fill) if fill else tensor.zero_()  # which takes a third of the time
            tensors.append(tensor)
            pointers.append(tensor.data_ptr())
        if self.offsets:
            workspace = empty(self.workspace, _ONE, torch.uint8)  # which is held until all is launched
            start = workspace.data_ptr()
            pointers += [start + offset for offset in self.offsets]
        stream = driver.active.get_current_stream(self.index)
        for launch in self.launches:
            launch.run(pointers, stream)
        return tuple([tensors[number] for number in self.results])


_empty_on_current: Any = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
"""What code that PyTorch has compiled allocates with: half the time of `torch.empty_strided`, None in some release.

It fills no memory in PyTorch's deterministic mode. Nor need it: kernels write all elements of results.
"""


def _allocator(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """Return what makes empty tensors of shape, strides and dtype on a device, which is current if it is a GPU."""
    if device.type == "cuda" and _empty_on_current is not None:
        return _empty_on_current
    return lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _hidden(plan: Plan) -> dict[str, New]:
    """Return the tensors of a plan that are no result, and hold nothing before the first launch."""
    return {name: new for name, new in plan.new.items() if name not in plan.results and new.fill is None}


class _Compiled:
    """A compiled kernel: what all launches of it have in common.

    Its descriptors were looked at by Triton once. Those of other launches differ from them in numbers that plans have
    looked at, and to look again at each takes longer than to make a tensor map.
    """

    def __init__(self, launch: Launch, compiled: Any, tensors: Mapping[str, Tensor]) -> None:
        self.compiled = compiled  # with which Triton 3.8 and later unload it
        launcher = compiled.run
        self.compiled_in = [launch.compiled_in[name] for name in launch.kernel.arg_names[len(launch.arguments) :]]
        descriptors = [argument for argument in launch.arguments if isinstance(argument, Descriptor)]
        if descriptors:
            self.descriptors = [_with(one.of(tensors[one.name]), base=None) for one in descriptors]
            self.described = compiled.metadata.tensordesc_meta
            self.encode = _encoder(launcher)
            launcher = _taking_maps(launcher)
        self.call, self.leading, self.apart = _called_by(launcher, compiled.function, compiled.packed_metadata)

    def maps(self, number: int, descriptor: Descriptor) -> _Maps:
        """Return what makes tensor maps for one of the descriptors."""
        like = _with(self.descriptors[number], shape=list(descriptor.shape), strides=list(descriptor.strides))
        return _Maps(like, self.described[number], self.encode)


_ONE = (1,)
STREAM = 3
"""Its place among what launches a kernel."""
_compiled: dict[Hashable, _Compiled] = {}


def _keep(apart: Hashable, kernel: _Compiled) -> _Compiled:
    if len(_compiled) >= COMPILED_KEPT:
        _compiled.clear()
    _compiled[apart] = kernel
    return kernel


class _KeptLaunch:
    """A compiled kernel with all that is given to launch it, in order, but for stream, pointers and descriptors."""

    def __init__(self, launch: Launch, kernel: _Compiled, numbers: Mapping[str, int]) -> None:
        self.kernel = kernel  # which is loaded for as long as this is there
        self.call, self.apart, self.first = kernel.call, kernel.apart, len(kernel.leading)
        self.arguments: list[Any] = [launch.programs, *kernel.leading[1:]]
        self.pointers: list[tuple[int, int]] = []
        self.descriptors: list[tuple[int, int, _Maps]] = []
        for argument in launch.arguments:
            place = len(self.arguments)
            if isinstance(argument, Descriptor):
                maps = kernel.maps(len(self.descriptors), argument)
                self.descriptors.append((place, numbers[argument.name], maps))
                self.arguments += (None, *argument.shape, *argument.strides)
                continue
            if isinstance(argument, str):
                self.pointers.append((place, numbers[argument]))
            self.arguments.append(argument)
        self.arguments += kernel.compiled_in

    def with_arguments(self, places: Sequence[int], numbers: Sequence[int]) -> _KeptLaunch:
        """See `Plan.with_arguments`: before a descriptor each of the kernel's arguments is in its own place."""
        launch = _clone(self)
        launch.arguments = arguments = self.arguments.copy()
        for place, number in zip(places, numbers, strict=True):
            arguments[self.first + place] = number
        return launch

    def run(self, pointers: list[int], stream: int) -> None:
        arguments = self.arguments.copy()
        arguments[STREAM] = stream
        for place, number in self.pointers:
            arguments[place] = pointers[number]
        for place, number, maps in self.descriptors:
            arguments[place] = maps.of(pointers[number])
        if self.apart:
            self.call(*arguments[: self.first], tuple(arguments[self.first :]))
        else:
            self.call(*arguments)


def _clone(one: Any) -> Any:
    """Return a shallow copy of an object, in a fifth of `copy.copy`'s time."""
    other = object.__new__(type(one))
    other.__dict__.update(one.__dict__)
    return other


def _with(one: Any, **fields: Any) -> Any:
    """Return a shallow copy of an object with other fields."""
    other = _clone(one)
    other.__dict__.update(fields)
    return other


class _Maps:
    """The tensor maps of one descriptor, by pointer; an allocator gives the same few out again and again.

    `like` is the descriptor as Gluon has it, of no tensor.
    """

    def __init__(self, like: Any, metadata: Any, encode: Any) -> None:
        self.like, self.metadata, self.encode = like, metadata, encode
        self.kept: dict[int, Any] = {}

    def of(self, pointer: int) -> Any:
        found = self.kept.get(pointer)
        if found is None:
            bind_cuda_context()
            found = self.encode(_with(self.like, base=_Start(pointer)), self.metadata)[0]
            if len(self.kept) >= DESCRIPTORS_KEPT:
                self.kept.clear()
            self.kept[pointer] = found
        return found


class _Start(NamedTuple):
    """What a descriptor is of, as far as a tensor map is concerned."""

    pointer: int

    def data_ptr(self) -> int:
        return self.pointer


def _encoder(launcher: Any) -> Any:
    """Return what makes a tensor map of a descriptor, given what was compiled with it."""
    make = importlib.import_module(type(launcher).__module__).make_tensordesc_arg
    extra = (None,) * (len(inspect.signature(make).parameters) - 2)  # of Triton 3.9
    return lambda descriptor, metadata: make(descriptor, metadata, *extra)


def _taking_maps(launcher: Any) -> Any:
    """Return a launcher that takes tensor maps, where Triton's would make them from descriptors at every launch."""
    taking = copy.copy(launcher)
    taking.launch = inspect.getclosurevars(launcher.launch).nonlocals["launcher"]
    return taking


def _called_by(launcher: Any, function: int, metadata: Any) -> tuple[Any, list[Any], bool]:
    """Return what a launcher calls in the end, what it gives that first, and whether it gives arguments in one tuple.

    What it gives first is the same at every launch, but for the grid, which begins it, and the stream. Where it has
    memory to allocate for the kernel each time, or begins with something else, as that for AMD's GPUs does, it is
    itself what is called.
    """
    grid, stream, argument = (2, 1, 1), object(), object()  # with the grid a launcher may count
    given = [*grid, stream, function, metadata, None, None, None]
    more = "global_scratch_size", "profile_scratch_size", "gsan_enabled"
    if not hasattr(launcher, "launch") or any(getattr(launcher, name, False) for name in more):
        return launcher, given, False
    asked, passed = copy.copy(launcher), []
    asked.launch = lambda *all_of_it: passed.append(all_of_it)
    asked(*given, argument)
    if len(passed) != 1:
        return launcher, given, False
    *leading, last = passed[0]
    apart = last == (argument,)
    if leading[: STREAM + 1] != given[: STREAM + 1] or not (apart or last is argument):
        return launcher, given, False
    return launcher.launch, leading, apart


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
