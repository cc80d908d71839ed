"""Which tile of queries a program computes next, and where it is."""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from attnplug_flash_triton.hopper.device import schedule
from attnplug_flash_triton.hopper.forward.records import Tile

DYNAMIC = gl.constexpr(2)
"""For PERSISTENT: the next tile is the next that no program has taken, by a counter in global memory. The loading warp
finds out where that is while it loads the one before, and hands it on through shared memory."""
AHEAD = gl.constexpr(2)
"""Tiles that a program has taken from the counter and not finished."""
PLACE = gl.constexpr(7)
"""Numbers that say where a tile is: those of a `Tile`."""


@gluon.jit
def turns(call, config: gl.constexpr):
    """Return how many tiles this program computes, where that does not depend on how fast others are."""
    if config.PERSISTENT:
        return (call.tiles * call.columns - gl.program_id(0) + call.programs - 1) // call.programs
    else:
        return _is_there(gl.program_id(0), call, config)


@gluon.jit
def where(at, call, config: gl.constexpr):
    """Return the `Tile` of number `at`."""
    row, batch, head = _place(at, call, config)
    first_q, len_q, first_k, len_k = _sequence(batch, call)
    return Tile(row, batch, head, first_q, len_q, first_k, len_k)


@gluon.jit
def hand_on(at, turn, work, WARPS: gl.constexpr, config: gl.constexpr):
    """Tell all warps where the `turn`-th tile is, of which there is none before number `at`; row -1 if none is left."""
    call, queue = work.call, work.queue
    last = call.tiles * call.columns - 1
    if call.cu_q is not None:
        while (at < last) & (_is_there(gl.minimum(at, last), call, config) == 0):
            at = call.programs + gl.atomic_add(queue.counter, 1, sem="relaxed")
    tile = where(gl.minimum(at, last), call, config)
    row = gl.where((at > last) | (tile.row >= tile.len_q), -1, tile.row)
    slot = turn % AHEAD
    mbarrier.wait(queue.empty.index(slot), ((turn // AHEAD) & 1) ^ 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    tile = Tile(row, tile.batch, tile.head, tile.first_q, tile.len_q, tile.first_k, tile.len_k)
    for i in gl.static_range(PLACE):
        queue.places.index(slot * PLACE + i).store(gl.full([1], tile[i], gl.int32, layout))
    mbarrier.arrive(queue.full.index(slot), count=1)


@gluon.jit
def is_handed(turn, work, WARPS: gl.constexpr):
    """Wait for what `hand_on` tells of the `turn`-th tile, and return whether there is one."""
    slot = turn % AHEAD
    mbarrier.wait(work.queue.full.index(slot), (turn // AHEAD) & 1)
    return _number(work.queue.places, slot * PLACE, WARPS) >= 0


@gluon.jit
def handed(turn, work, WARPS: gl.constexpr):
    """Return the `turn`-th `Tile`; only after `is_handed`."""
    call, places = work.call, work.queue.places
    first = turn % AHEAD * PLACE
    row = _number(places, first, WARPS)
    batch = _number(places, first + 1, WARPS)
    head = _number(places, first + 2, WARPS)
    first_q = 0
    len_q = call.num_q
    first_k = batch * call.k_rows
    len_k = call.num_k
    if call.cu_q is not None:
        first_q = _number(places, first + 3, WARPS)
        len_q = _number(places, first + 4, WARPS)
        first_k = _number(places, first + 5, WARPS)
    if call.cu_k is not None or call.used is not None:
        len_k = _number(places, first + 6, WARPS)
    return Tile(row, batch, head, first_q, len_q, first_k, len_k)


@gluon.jit
def _number(numbers, i, WARPS: gl.constexpr):
    """Return a number of shared memory."""
    return gl.max(numbers.index(i).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def _is_there(at, call, config: gl.constexpr):
    """Return 0 for a tile behind the end of its sequence, which is shorter than the longest one; else 1."""
    if call.cu_q is not None:
        row, batch, head = _place(at, call, config)
        return gl.where(row < gl.load(call.cu_q + batch + 1) - gl.load(call.cu_q + batch), 1, 0)
    else:
        return 1


@gluon.jit
def _place(at, call, config: gl.constexpr):
    """Return (first row, batch, head) of tile number `at`."""
    tile, column = schedule(at, call.tiles, call.columns, call.section, config.HAS_HIGH)  # the longest ones first
    return tile * config.M, column // call.heads, column % call.heads


@gluon.jit
def _sequence(batch, call):
    """Return (first query, queries, first key, keys)."""
    first_q = 0
    len_q = call.num_q
    first_k = batch * call.k_rows
    len_k = call.num_k
    if call.cu_q is not None:
        first_q = gl.load(call.cu_q + batch)
        len_q = gl.load(call.cu_q + batch + 1) - first_q
        first_k = gl.load(call.cu_k + batch)
        len_k = gl.load(call.cu_k + batch + 1) - first_k
    if call.used is not None:
        len_k = gl.load(call.used + batch)
    return first_q, len_q, first_k, len_k
