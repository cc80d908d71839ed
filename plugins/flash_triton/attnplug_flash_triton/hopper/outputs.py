"""Forward on Hopper: which calls its kernel takes, and the plan of what it launches."""

from __future__ import annotations

from math import e, log2
from typing import Any, NamedTuple

import torch

from attnplug import SDPAParams
from attnplug_flash_triton import config
from attnplug_flash_triton.hopper.descriptors import of_rows, rows_between_sequences, why_not
from attnplug_flash_triton.hopper.forward import forward_kernel
from attnplug_flash_triton.launches import FUSED, tail_of_out
from attnplug_flash_triton.plans import Launch, New, Plan
from attnplug_flash_triton.problem import LONGEST, Machine, Problem, cdiv, read

ROWS = 64
"""Of queries, for one warpgroup."""


class Tiles(NamedTuple):
    """How the kernel runs for one class of head sizes.

    Attributes:
        consumers: warpgroups that multiply, 64 rows of queries each.
        block_n: keys of one tile.
        stages: tiles of keys, and of values, held at once.
        q_stages: tiles of queries held at once.
        persistent: one program for each multiprocessor takes one tile of queries after another: `STATIC`, every
            so-manieth, or `DYNAMIC`, the next that nobody has.
        own_out: the output has its own shared memory, so that the next queries are loaded while it is written.
        words: probabilities go from one round to the next in words of two, which ptxas, where there are two loops of
            rounds, otherwise takes apart and puts together in each.
        softcap: `EACH` element has a reciprocal of its own, or it is `SHARED` by four, which takes fewer clocks of the
            special function unit, and more instructions.
    """

    consumers: int
    block_n: int
    stages: int
    persistent: int = 0
    own_out: bool = False
    q_stages: int = 1
    words: bool = False
    softcap: int = 1


STATIC, DYNAMIC = 1, 2
EACH, SHARED = 1, 2

FULL, BOUNDED, NARROW = "full", "bounded", "narrow"
"""Whether every query sees every key, or there is a side to what it sees (causal), or two not far from each other."""
MOST_NARROW = 1024
"""Keys between the two sides of what is narrow."""

TILES = {
    (64, FULL): Tiles(3, 128, 3, STATIC, own_out=True, q_stages=2),
    (64, BOUNDED): Tiles(3, 128, 3, DYNAMIC, own_out=True, q_stages=2, softcap=SHARED),
    (64, NARROW): Tiles(3, 64, 6, DYNAMIC, own_out=True, q_stages=2),
    (128, FULL): Tiles(2, 128, 2, STATIC, own_out=True, q_stages=2, softcap=SHARED),
    (128, BOUNDED): Tiles(2, 128, 2, DYNAMIC, own_out=True, q_stages=2, words=True, softcap=SHARED),
    (256, FULL): Tiles(2, 64, 2, STATIC),
    (256, BOUNDED): Tiles(2, 64, 2),
}
"""The fastest of those that were measured on an H100 and an H200 (Triton 3.6, ptxas 13.1)."""
SPARE_ROWS = 1.1
"""Two warpgroups take the place of three where these would compute so many times the rows: 12 % more at length 1024,
where two took 7 to 10 % less time, and at 8192 17 % more."""

BYTES_IN_ORDER = 0x3210

REGISTERS = {2: (240, 24, 168), 3: (160, 32, 128)}
"""By warpgroups: those of a thread that multiplies, of one that loads, and of all when the kernel starts."""


def reasons(params: SDPAParams) -> list[str]:
    """Return why this kernel does not run forward of a call; none if it does."""
    query, key, value = params.query, params.key, params.value
    queries = params.max_q if params.is_varlen else query.shape[2]
    rows = int(queries or 0) * (query.shape[1] // max(1, key.shape[1]))
    if rows <= config.FEW and params.block_table is None:
        return [f"{rows} rows for each head of keys are few: the plain kernel packs them, and splits the keys"]
    found = []
    if query.dtype not in (torch.float16, torch.bfloat16):
        found.append(f"dtype {query.dtype} is neither float16 nor bfloat16")
    for name in ("attn_mask", "alibi_slopes", "block_table"):
        if getattr(params, name) is not None:
            found.append(f"has no {name}")
    if params.dropout > 0:
        found.append("has no dropout")
    if params.scale == 0:
        found.append("has no scale of 0, by which hidden logits would be NaN")
    found += filter(None, (why_not(name, getattr(params, name)) for name in ("query", "key", "value")))
    if params.seqused_k is not None and not params.is_varlen and not found:
        between = {rows_between_sequences(tensor) for tensor in (key, value)}
        if len(between) > 1 or None in between:
            found.append("seqused_k: key and value must have the same whole number of rows between their sequences")
    return found


def forward(params: SDPAParams, machine: Machine, join: bool = False) -> Plan:
    """Return the plan of forward, which gives out and lse; with `join`, of joined tiles where `can_join`."""
    problem, size = read(params, machine), size_of(params)
    return plan(problem, size, tiles_of(problem, size), join and can_join(params, machine))


def can_join(params: SDPAParams, machine: Machine) -> bool:
    """Whether the kernel can begin a tile of queries where it ends the one before: see `JOINED` there.

    While a warpgroup waits for the first keys of its next tile, it holds the last values of this one, those of tiles
    behind them that only warpgroups of earlier rows see, and those of all but one of the tiles before the next keys.
    Three warpgroups have too few registers for that and both ends of a window in long tiles of keys.
    """
    problem = read(params, machine)
    tiles, flags = tiles_of(problem, size_of(params)), problem.flags
    others = cdiv((tiles.consumers - 1) * ROWS, tiles.block_n)  # tiles that not all warpgroups see, on each side
    held = 1 + others * flags["HAS_LOW"] + max(others - 1, 0) * flags["HAS_HIGH"]
    fits = not (flags["HAS_LOW"] and tiles.consumers == 3 and tiles.block_n == 128)
    return tiles.own_out and tiles.q_stages > 1 and held <= tiles.stages and fits


def size_of(params: SDPAParams) -> int:
    """Return the class of a call's head sizes."""
    return next(limit for limit in config.SIZES if max(params.query.shape[-1], params.value.shape[-1]) <= limit)


def tiles_of(problem: Problem, size: int) -> Tiles:
    """Return the tiles that run a call; `size` is the class of head sizes."""
    has_low, has_high = problem.flags["HAS_LOW"], problem.flags["HAS_HIGH"]
    tiles = TILES[size, BOUNDED if has_low or has_high else FULL]
    if has_low and has_high and sum(_window(problem.params)) <= MOST_NARROW:
        tiles = TILES.get((size, NARROW), tiles)
    rows = [cdiv(problem.longest_q, count * ROWS) * count for count in (tiles.consumers, 2)]
    return tiles._replace(consumers=2) if rows[0] > SPARE_ROWS * rows[1] else tiles


def plan(problem: Problem, size: int, tiles: Tiles, join: bool = False) -> Plan:
    """Return the plan of forward on given tiles; `size` is the class of head sizes."""
    params, flags, packed = problem.params, problem.flags, problem.packed
    ragged = packed or params.seqused_k is not None
    shape = (*params.query.shape[:-1], params.value.shape[-1])
    new = {
        "out": New.contiguous(shape, params.query.dtype),
        "lse": New.contiguous(problem.rows, torch.float32),
    }
    if packed and tiles.persistent == STATIC:  # sequences differ in length
        tiles = tiles._replace(persistent=DYNAMIC)
    counts = tiles.persistent == DYNAMIC
    if counts:
        new["counter"] = New.contiguous((1,), torch.int32, 0)
    lengths = (name if getattr(params, name) is not None else None for name in ("cu_seq_q", "cu_seq_k", "seqused_k"))
    rows = tiles.consumers * ROWS
    count, columns = cdiv(problem.longest_q, rows), problem.batch * problem.heads
    programs = count * columns
    if tiles.persistent:
        programs = min(programs, problem.machine.processors)
    dense_used = ragged and not packed
    left, right = _window(params)
    arguments = (
        of_rows("query", params.query, ROWS, size, packed=packed),
        of_rows("key", params.key, tiles.block_n, size, packed=packed, ragged=ragged),
        of_rows("value", params.value, tiles.block_n, size, packed=packed, ragged=ragged),
        of_rows("out", new["out"], ROWS, size, packed=packed, ragged=packed),
        *("lse", *lengths, "sinks" if params.sinks is not None else None),
        "counter" if counts else None,
        *(problem.heads, problem.group, problem.rows[-1], problem.longest_k),
        rows_between_sequences(params.key) if dense_used else 0,
        *(left, right, count, columns, problem.section(columns) * problem.group, programs),
        *_scales(params, tiles.softcap),
        BYTES_IN_ORDER,
    )
    compiled_in = _compiled_in(params, flags, size, tiles) | {"JOINED": join}
    launches = [Launch(forward_kernel, programs, arguments, compiled_in)]
    if packed:
        launches.append(tail_of_out(params, problem.machine, new))
    return Plan(tuple(launches), new, ("out", "lse"))


def _compiled_in(params: SDPAParams, flags: dict[str, Any], size: int, tiles: Tiles) -> dict[str, Any]:
    registers, loader_registers, at_start = REGISTERS[tiles.consumers]
    return dict(
        SIZE=size,
        BLOCK_N=tiles.block_n,
        CONSUMERS=tiles.consumers,
        STAGES=tiles.stages,
        Q_STAGES=tiles.q_stages,
        PERSISTENT=tiles.persistent,
        OWN_OUT=tiles.own_out,
        LOWER_RIGHT=flags["LOWER_RIGHT"] and (flags["HAS_LOW"] or flags["HAS_HIGH"]),
        HAS_LOW=flags["HAS_LOW"],
        HAS_HIGH=flags["HAS_HIGH"],
        NEGATE=params.scale < 0 and not params.softcap,
        SOFTCAP=tiles.softcap if params.softcap > 0 else 0,
        WORDS=tiles.words,
        REGISTERS=registers,
        LOADER_REGISTERS=loader_registers,
        num_warps=4,
        maxnreg=at_start,
        **FUSED,
    )


def _window(params: SDPAParams) -> tuple[int, int]:
    """Return how many keys before and after its own a query sees at most, where these sides are sides."""
    left, right = params.window_size
    left, right = (min(max(side, 0), 2 * LONGEST) for side in (left, 0 if params.is_causal else right))
    return left, right


def _scales(params: SDPAParams, way: int) -> tuple[float, float]:
    """Return what logits (with softcap: its tanh, `SHARED`: half of it), and products within it are multiplied by."""
    scale, softcap = float(params.scale), float(params.softcap)
    if softcap > 0:
        return softcap * log2(e) * (2 if way == SHARED else 1), 2 * log2(e) * scale / softcap
    return abs(scale) * log2(e), 0.0
