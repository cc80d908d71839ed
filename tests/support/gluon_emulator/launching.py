"""Runs kernels and plans: Python functions in which Triton's names are replaced."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl

from gluon_emulator import copies, memory
from gluon_emulator.language import Language, Pointer
from gluon_emulator.program import Program
from gluon_emulator.values import HALF, NAN

TWINS: dict[str, Any] = {
    "gl": Language,
    "tl": Language,
    "mbarrier": memory.mbarrier,
    "fence_async_shared": memory.fence_async_shared,
    "warpgroup_mma": copies.warpgroup_mma,
    "warpgroup_mma_wait": copies.warpgroup_mma_wait,
    # Of `hopper/device.py`: what is written in the assembler's language, and what moves tiles.
    "load_tile": copies.load_tile,
    "store_tile": copies.store_tile,
    "store_wait": copies.store_wait,
    "reduce_add": copies.reduce_add,
    "exp2": torch.exp2,
    "reciprocal": torch.reciprocal,
    "softcapped": lambda x: -1 / (1 + torch.exp2(x)),
    "hidden_above": lambda x, place, last: torch.where(place <= last, x, -torch.inf),
    "hidden_behind": lambda x, past: torch.where(past <= 0, x, -torch.inf),
    "hidden_below": lambda x, place, first: torch.where(place >= first, x, -torch.inf),
    "after_wait": lambda words, waited, in_order: words,
    "multiplied_where_needed": lambda x, factors: x * factors[:, None],
    "above_wait": lambda x, above: x,
    "packed": lambda x, dtype: x,
    "as_operand": lambda words, dtype, layout: words,
    "unpacked": lambda words, dtype, layout: words,
}
"""What takes the place of a name in a kernel's module."""


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


def mutant(module: types.ModuleType, folder: Path, *changes: tuple[str, str]) -> types.ModuleType:
    """Return a module or package like `module`, in whose source each first text is replaced by the second.

    Args:
        folder: where the source is written, since Triton reads it from a file. It must have no mutant yet.
        changes: of texts that are there, in whatever module of a package.
    """
    name = f"mutant_of_{module.__name__.rpartition('.')[2]}"
    origin = Path(inspect.getfile(module))
    files = sorted(origin.parent.glob("*.py")) if origin.name == "__init__.py" else [origin]
    sources = {path: path.read_text() for path in files}
    for old, new in changes:
        if not any(old in source for source in sources.values()):
            raise ValueError(f"{module.__name__} has no {old!r}")
        sources = {path: source.replace(old, new) for path, source in sources.items()}
    if files == [origin]:
        made = folder / f"{name}.py"
        made.write_text(sources[origin])
    else:
        made = folder / name / "__init__.py"
        made.parent.mkdir()
        for path, source in sources.items():
            (made.parent / path.name).write_text(source.replace(f"from {module.__name__}.", f"from {name}."))
    return _imported(name, made)


def _imported(name: str, path: Path) -> types.ModuleType:
    """Import a module or package from its file, with none of its name kept from before."""
    for old in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
        del sys.modules[old]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def launch(kernel: Any, programs: int, arguments: Iterable[Any], compiled_in: Mapping[str, Any], seed: int = 0) -> None:
    """Run a kernel, Gluon's or Triton's, one program after another; raises `Fault`."""
    function = Emulated().function(kernel)
    names = set(kernel.arg_names)
    constants = {name: value for name, value in compiled_in.items() if name in names}
    for number in range(programs):
        program = Program(number, seed + number)
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
            return copies.Descriptor(tensors[name], *argument[1:], dtype)
        return argument

    for step in plan.launches:
        launch(step.kernel, step.programs, [bound(x) for x in step.arguments], step.compiled_in, seed)
    return tuple(tensors[name] for name in plan.results)
