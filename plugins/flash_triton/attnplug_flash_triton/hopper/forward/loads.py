"""The warp that loads: it brings tiles to shared memory in the order in which they are multiplied."""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from attnplug_flash_triton.hopper.device import WARPGROUP, coordinates, load_tile
from attnplug_flash_triton.hopper.forward.spans import sides, span
from attnplug_flash_triton.hopper.forward.tiles import DYNAMIC, hand_on, handed, is_handed, turns, where


@gluon.jit
def load(work, WARPS: gl.constexpr, config: gl.constexpr):
    """Bring the tiles of every tile of queries of this program."""
    done = 0
    if config.PERSISTENT == DYNAMIC:
        turn = 0
        hand_on(gl.program_id(0), turn, work, WARPS, config)
        while is_handed(turn, work, WARPS):
            done = _load_tile(handed(turn, work, WARPS), turn, done, work, WARPS, config)
            turn += 1
    else:
        for turn in range(turns(work.call, config)):
            at = gl.program_id(0) + turn * work.call.programs
            done = _load_tile(where(at, work.call, config), turn, done, work, WARPS, config)


@gluon.jit
def _load_tile(tile, turn, done, work, WARPS: gl.constexpr, config: gl.constexpr):
    """Bring one tile of queries, the `turn`-th of this program, and its keys, before which there were `done` tiles."""
    CONSUMERS: gl.constexpr = config.CONSUMERS
    call = work.call
    low, high = sides(tile, call, config)
    begin, end = span(tile.row, gl.minimum(tile.row + config.M, tile.len_q), 0, tile.len_k, low, high, config)
    q_batch = tile.batch * (1 - config.RAGGED_Q)
    kv_head = tile.head // call.group
    for c in gl.static_range(CONSUMERS):
        at_q = turn % config.Q_STAGES * CONSUMERS + c
        mbarrier.wait(work.q.empty.index(at_q), ((turn // config.Q_STAGES) & 1) ^ 1)
        mbarrier.expect(work.q.full.index(at_q), work.q_desc.block_type.nbytes)
        place = [q_batch, tile.head, tile.first_q + tile.row + c * WARPGROUP, 0]
        load_tile(work.q_desc, place, work.q.full.index(at_q), work.q.buffers.index(at_q))
        if c == 0:
            _bring(work.k_desc, work.k, done, (end - 1) * config.BLOCK_N, tile, kv_head, config)
    if config.PERSISTENT == DYNAMIC:  # while these are on their way
        hand_on(call.programs + gl.atomic_add(work.queue.counter, 1, sem="relaxed"), turn + 1, work, WARPS, config)
    for i in range(1, end - begin + 1):
        if i < end - begin:
            _bring(work.k_desc, work.k, done + i, (end - 1 - i) * config.BLOCK_N, tile, kv_head, config)
        _bring(work.v_desc, work.v, done + i - 1, (end - i) * config.BLOCK_N, tile, kv_head, config)
    return done + end - begin


@gluon.jit
def _bring(desc, ring, place, row, tile, kv_head, config: gl.constexpr):
    """Load the rows from `row` on of a sequence into the buffer of tile number `place`, once it is free."""
    at = place % config.STAGES
    mbarrier.wait(ring.empty.index(at), ((place // config.STAGES) & 1) ^ 1)
    mbarrier.expect(ring.full.index(at), desc.block_type.nbytes)
    rows = coordinates(tile.batch, kv_head, row, tile.first_k, tile.len_k, config.RAGGED_K)
    load_tile(desc, rows, ring.full.index(at), ring.buffers.index(at))
