"""What a configuration costs: registers, spills and shared memory, learnt without a GPU.

`python -m attnplug_flash_triton.cost` compiles every entry of the tables in use for its architecture, and prints
what the assembler says. What is compiled is what a call would launch, its arguments specialised as Triton
specialises them. Exit status 1: something spills that was not measured to be faster so, or
needs more shared memory than there is.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from attnplug import CausalVariant, SDPAParams
from attnplug_flash_triton import config, impl, launches, toolchain
from attnplug_flash_triton.config import Cell, Table
from attnplug_flash_triton.plans import Launch
from attnplug_flash_triton.problem import Machine

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PROCESSORS = 132
LENGTH, LONG = 64, 4096


class Cost(NamedTuple):
    """What one compiled kernel takes.

    Attributes:
        registers: of one thread.
        spilled: what does not fit them: bytes of one thread, on AMD registers.
        shared: bytes of shared memory of one program.
    """

    registers: int
    spilled: int
    shared: int


def example(cell: Cell) -> SDPAParams:
    """Return a call that launches the kernel of `cell` with the most features that it can have."""
    dtype = torch.bfloat16 if cell.precision == config.HALF else torch.float32
    queries, keys = (1, LONG) if cell.kernel == config.FEW_ROWS else (LENGTH, LENGTH)
    query, key = (
        torch.empty(1, heads, length, cell.head_size, dtype=dtype) for heads, length in ((4, queries), (2, keys))
    )
    extra: dict[str, Any] = {}
    if cell.logits == config.EXTRA:
        mask = torch.empty(1, 4, queries, keys, dtype=dtype, requires_grad=cell.kernel == config.MASK)
        extra = dict(attn_mask=mask, dropout=0.1, softcap=2.0, alibi_slopes=torch.empty(4))
    return SDPAParams(
        *(query, key, key),
        is_causal=True,
        enable_gqa=True,
        scale=0.1,
        causal_variant=CausalVariant.LOWER_RIGHT,
        window_size=(5, 5),
        sinks=torch.empty(4),
        **extra,
    )


class Prepared(NamedTuple):
    """Launches with the tensors that they name."""

    launches: tuple[Launch, ...]
    tensors: dict[str, Tensor]

    def run(self) -> None:
        """Run the launches."""
        for launch in self.launches:
            launch.run(self.tensors)


def prepared(cell: Cell, params: SDPAParams, machine: Machine) -> tuple[Prepared, Prepared]:
    """Return what must run before the launches of `params` that read the tiles of `cell`, and those."""
    device = params.query.device
    given = impl.tensors_of(params)
    if params.dropout:
        given["seed"] = torch.zeros(1, dtype=torch.int64, device=device)
    with _float32_products("tf32" if cell.precision == config.TF32 else "ieee"):
        forward = launches.forward(params, machine)
        tensors = forward.tensors(given, device)
        if cell.kernel in (config.FORWARD, config.FEW_ROWS):
            return Prepared((), tensors), Prepared(forward.launches, tensors)
        out, lse, *statistics = (tensors[name] for name in forward.results)
        backward = launches.backward(params, machine, out, None, out, lse, *statistics)
        tensors = backward.tensors({**tensors, "grad_out": torch.empty_like(out)}, device)
    place = (config.QUERY, config.KEYS, config.MASK).index(cell.kernel)
    before, wanted = backward.launches[:place], backward.launches[place : place + 1]
    return Prepared(forward.launches + before, tensors), Prepared(wanted, tensors)


@contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, precision
    try:
        yield
    finally:
        settings.fp32_precision = before


def specialised(launch: Launch, tensors: dict[str, Tensor], architecture: str) -> tuple[Any, ...]:
    """Return (arguments, specialization, options) as Triton has them; the last two are what it compiles for."""
    kernel, backend = launch.kernel, make_backend(TARGETS[architecture])
    given = {**launch.compiled_in, "debug": False, "instrumentation_mode": ""}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    return bind(*launch.bound(tensors), **given)


def compiled(launch: Launch, tensors: dict[str, Tensor], architecture: str) -> Any:
    """Return a launch's kernel as Triton compiles it for an architecture; what was compiled before is on disk."""
    kernel, target = launch.kernel, TARGETS[architecture]
    given = {**launch.compiled_in, "debug": False, "instrumentation_mode": ""}
    bound, specialization, options = specialised(launch, tensors, architecture)
    options, signature, constants, attributes = kernel._pack_args(
        make_backend(target), given, bound, specialization, options
    )
    source_of = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_of(kernel, signature, constants, attributes)
    with toolchain.assembler_for(architecture):
        return triton.compile(source, target=target, options=options.__dict__)


def cost(launch: Launch, tensors: dict[str, Tensor], architecture: str) -> Cost:
    """Compile a launch and return what it takes."""
    kernel = compiled(launch, tensors, architecture)
    shared = kernel.metadata.shared
    if TARGETS[architecture].backend == "hip":
        text = kernel.asm["amdgcn"]
        registers, spilled = (int(_found(rf"\.vgpr_{what}:\s+(\d+)", text)) for what in ("count", "spill_count"))
        return Cost(registers, spilled, shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return Cost(int(_found(r"REG:(\d+)", text)), int(_found(r"STACK:(\d+)", text)), shared)


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the assembler's report has no {pattern}: {text[:200]}")
    return match[1]


def does_not_fit(costs: Cost, architecture: str) -> str:
    """Return what of a cost keeps a configuration from running; empty if nothing does."""
    most = config.SHARED_MEMORY[architecture]
    return f"needs {costs.shared} bytes of shared memory, of {most}" if costs.shared > most else ""


def too_much(costs: Cost, cell: Cell, table: Table) -> str:
    """Return what of a cost keeps an entry from being shipped; empty if nothing does.

    An entry may spill if it was measured to be faster than those that do not.
    """
    if costs.spilled and cell not in table.spilling:
        return f"spills {costs.spilled}"
    return does_not_fit(costs, table.architecture)


def rows(architecture: str, cells: Iterable[Cell] | None = None) -> Iterator[tuple[str, str]]:
    """Yield, for each kernel that the table's entries launch, a line of text, and what is too much about it."""
    for cell in cells or config.cells():
        _, wanted = prepared(cell, example(cell), Machine(architecture, PROCESSORS))
        for launch in wanted.launches:
            found = cost(launch, wanted.tensors, architecture)
            table = config.table_of(architecture)
            tiles = table.tiles[cell]
            line = (
                f"{architecture:7} {cell!s:42} {launch.kernel.__name__:26} {tiles.block_m:4} x{tiles.block_n:4} "
                f"{tiles.num_warps:3} warps {tiles.num_stages:2} stages {found.registers:4} registers "
                f"{found.spilled:4} spilled {found.shared:7} bytes shared"
            )
            reason = f"  {table.spilling[cell]}" if found.spilled and cell in table.spilling else ""
            yield line + reason, too_much(found, cell, table)


def main(arguments: list[str] | None = None) -> int:
    """Print the cost of the tables in use."""
    parser = argparse.ArgumentParser(prog="python -m attnplug_flash_triton.cost", description=__doc__)
    parser.add_argument("--arch", choices=config.ARCHITECTURES, nargs="+", default=config.ARCHITECTURES)
    good = True
    for architecture in parser.parse_args(arguments).arch:
        for line, wrong in rows(architecture):
            good &= not wrong
            sys.stdout.write(f"{line}  {wrong}\n".rstrip() + "\n")
            sys.stdout.flush()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
