"""Which tiles are the fastest on this GPU: measured on request, so that no user's first call does it.

`python -m attnplug_flash_triton.tune` climbs from the table in use to better neighbours, one entry after the other,
and writes the table that is read from then on: `tables/<architecture>-triton<release>.json` of this package. What
does not fit into shared memory is not timed; what spills is, and the table says so if it won. All entries take an
hour; `--only "forward, half, 128"` takes minutes.

With `TRITON_INTERPRET=1` it does the same on the CPU with tiny shapes, to see that it works: such times say nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from triton import knobs, testing

from attnplug import CausalVariant, SDPAParams
from attnplug_flash_triton import config
from attnplug_flash_triton.config import ACCEPTED, Cell, Table, Tiles
from attnplug_flash_triton.cost import Cost, cost, does_not_fit, example, prepared
from attnplug_flash_triton.problem import Machine, machine_of

GAIN = 0.98
"""A neighbour must take at most this share of the time; less is noise."""

Clock = Callable[[Callable[[], None]], float]


def clock_of(machine: Machine) -> Clock:
    """Return what measures milliseconds: medians on a GPU; in the interpreter, one run."""
    if machine.architecture != config.INTERPRETER:
        return lambda run: testing.do_bench(run, return_mode="median")

    def once(run: Callable[[], None]) -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3

    return once


def typical(cell: Cell, device: torch.device) -> SDPAParams:
    """Return a call as large as those that matter: 8k tokens against each other; for few rows, 16k keys."""
    tiny, few = device.type == "cpu", cell.kernel == config.FEW_ROWS
    lengths = (1, 64) if few and tiny else (1, 16384) if few else (32, 32) if tiny else (4096, 4096)
    batch, heads, kv_heads = (
        (1, 2, 1) if tiny else (8, 32, 8) if few else (2, 2048 // cell.head_size, 2048 // cell.head_size)
    )
    half = torch.float16 if tiny else torch.bfloat16
    options: dict[str, Any] = dict(dtype=half if cell.precision == config.HALF else torch.float32, device=device)
    sizes = ((heads, lengths[0]), (kv_heads, lengths[1]), (kv_heads, lengths[1]))
    query, key, value = (torch.randn(batch, *size, cell.head_size, **options) for size in sizes)
    mask = None
    if cell.logits == config.EXTRA:
        mask = torch.randn(1, heads, *lengths, **options).requires_grad_(cell.kernel == config.MASK)
    return SDPAParams(
        *(query, key, value, mask),
        is_causal=True,
        enable_gqa=heads != kv_heads,
        scale=cell.head_size**-0.5,
        causal_variant=CausalVariant.LOWER_RIGHT,
    )


def neighbours(tiles: Tiles) -> Iterator[Tiles]:
    """Yield the tiles one step away: half or twice a block or the warps, one stage more or less."""
    for field, accepted in ACCEPTED.items():
        value = getattr(tiles, field)
        steps = (value - 1, value + 1) if field == "num_stages" else (value // 2, value * 2)
        for step in steps:
            if step in accepted:
                yield tiles._replace(**{field: step})


def climb(start: Tiles, milliseconds: Callable[[Tiles], float]) -> Tiles:
    """Return tiles none of whose neighbours is faster, from `start` on; infinity stands for what must not be used."""
    best = start
    while True:
        candidate = min(neighbours(best), key=milliseconds)
        if not milliseconds(candidate) < GAIN * milliseconds(best):
            return best
        best = candidate


def tune(table: Table, cell: Cell, device: torch.device, machine: Machine, clock: Clock) -> tuple[Tiles, float, float]:
    """Return the best tiles of one entry, their time and the time of those in `table`, in milliseconds."""
    params = typical(cell, device)

    @cache
    def milliseconds(tiles: Tiles) -> float:
        before = config.use(table.but(cell, tiles))
        try:
            if any(does_not_fit(each, machine.architecture) for each in _costs(cell, machine)):
                return float("inf")
            first, timed = prepared(cell, params, machine)
            first.run()
            return clock(timed.run)
        finally:
            config.use(before)

    best = climb(table.tiles[cell], milliseconds)
    return best, milliseconds(best), milliseconds(table.tiles[cell])


def _costs(cell: Cell, machine: Machine) -> list[Cost]:
    """Return what the tiles in use cost in the entry's most demanding call; nothing in the interpreter."""
    if machine.architecture == config.INTERPRETER:
        return []
    wanted = prepared(cell, example(cell), machine)[1]
    return [cost(launch, wanted.tensors, machine.architecture) for launch in wanted.launches]


def _spilling(table: Table, cell: Cell, machine: Machine, gpu: str, after: float, before: float) -> str:
    """Return why an entry is in the table although its registers spill; empty if they do not."""
    replaced = config.use(table)
    try:
        spilled = max((each.spilled for each in _costs(cell, machine)), default=0)
    finally:
        config.use(replaced)
    return f"{after:.3f} ms, {before:.3f} before: {gpu}, Triton {config.release()}" if spilled else ""


def main(arguments: list[str] | None = None) -> int:
    """Tune for the GPU of this machine, and write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m attnplug_flash_triton.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="tune the entries whose name contains TEXT")
    parser.add_argument("--write", metavar="FILE", type=Path, help="write there; FLASH_TRITON_TABLE=FILE then uses it")
    options = parser.parse_args(arguments)
    wanted = [cell for cell in config.cells() if options.only in str(cell)]
    if not wanted:
        parser.error(f"--only: no entry's name contains {options.only!r}; one is {next(config.cells())!s}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    interpreted = bool(knobs.runtime.interpret)
    if (device.type == "cpu") != interpreted:
        parser.error("needs a GPU; or, to see that it works, TRITON_INTERPRET=1 on a machine without one")
    machine = machine_of(device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    table = config.table_of(machine.architecture)
    for cell in wanted:
        tiles, after, before = tune(table, cell, device, machine, clock_of(machine))
        sys.stdout.write(
            f"{cell!s:42} {before:9.3f} ms {_shown(table.tiles[cell])}  ->  {after:9.3f} ms {_shown(tiles)}\n"
        )
        sys.stdout.flush()
        if tiles != table.tiles[cell]:
            table = table.but(cell, tiles)
            table = table.but(cell, tiles, _spilling(table, cell, machine, gpu, after, before))
    measured = f"{gpu}, Triton {config.release()}" + (f", {options.only!r} alone" if options.only else "")
    path = options.write or config.FOLDER / f"{machine.architecture}-triton{config.release()}.json"
    replace(table, measured=measured).write(path)
    sys.stdout.write(f"written: {path}\n")
    return 0


def _shown(tiles: Tiles) -> str:
    return f"{tiles.block_m} x {tiles.block_n}, {tiles.num_warps} warps, {tiles.num_stages} stages"


if __name__ == "__main__":
    sys.exit(main())
