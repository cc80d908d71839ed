"""One tile of keys after another, for 64 rows of queries; and what is written when there are no more."""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attnplug_flash_triton.hopper.device import WARPGROUP, above_wait, coordinates, store_tile
from attnplug_flash_triton.hopper.forward.softmax import faded, operand_of, softmax, weights


@gluon.jit
def rounds(q, p, top, total, o, rows, whole_begin, whole_end, done, work, outputs, zero, config: gl.constexpr):
    """Take all tiles of keys but the first, whose probabilities are `p`: all but the last values are added then."""
    begin, end = rows.begin, rows.end
    if config.HAS_HIGH:
        for i in range(done + 1, done + end - whole_end):
            column = (end - 1 - (i - done)) * config.BLOCK_N
            p, top, total, o = _round(q, i, p, top, total, o, rows, column, work, outputs, zero, True, config)
    for i in range(done + end - whole_end, done + end - whole_begin):
        p, top, total, o = _round(q, i, p, top, total, o, rows, 0, work, outputs, zero, False, config)
    if config.HAS_LOW:
        for i in range(done + end - whole_begin, done + end - begin):
            column = (end - 1 - (i - done)) * config.BLOCK_N
            p, top, total, o = _round(q, i, p, top, total, o, rows, column, work, outputs, zero, True, config)
    return p, top, total, o


@gluon.jit
def _round(q, i, p, top, total, o, rows, column, work, outputs, zero, MASKED: gl.constexpr, config: gl.constexpr):
    """Add the values of tile `i - 1`, whose probabilities are `p`; return those of tile `i`, and what else changes."""
    dtype: gl.constexpr = work.q_desc.dtype
    k, v = work.k, work.v
    at_k = i % config.STAGES
    at_v = (i - 1) % config.STAGES
    mbarrier.wait(k.full.index(at_k), (i // config.STAGES) & 1)
    s_acc = warpgroup_mma(q, keys_of(work, at_k, config), zero, use_acc=False, is_async=True)
    mbarrier.wait(v.full.index(at_v), ((i - 1) // config.STAGES) & 1)
    operand = operand_of(p, o, dtype)
    o_acc = warpgroup_mma(operand, values_of(work, at_v, config), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s_acc,))
    mbarrier.arrive(k.empty.index(at_k), count=1)
    p32, top, total, fade = softmax(s, top, total, rows, column, outputs, False, MASKED, config)
    total = above_wait(total, 0.0)
    o, operand = warpgroup_mma_wait(0, deps=(o_acc, operand))
    mbarrier.arrive(v.empty.index(at_v), count=1)
    p = weights(p32, o, outputs.in_order, dtype, config)
    return p, top, total, faded(o, fade)


@gluon.jit
def keys_of(work, at, config: gl.constexpr):
    """Return a buffer's keys, as a product with queries takes them."""
    SHAPE: gl.constexpr = [config.BLOCK_N, config.SIZE]
    return work.k.buffers.index(at).reshape(SHAPE).permute((1, 0))


@gluon.jit
def values_of(work, at, config: gl.constexpr):
    """Return a buffer's values, as a product with probabilities takes them."""
    SHAPE: gl.constexpr = [config.BLOCK_N, config.SIZE]
    return work.v.buffers.index(at).reshape(SHAPE)


@gluon.jit
def write(o, row_lse, written, rows, tile, work, outputs, s_layout: gl.constexpr, config: gl.constexpr):
    """Write 64 rows of out, through the shared memory `written`, and of lse."""
    call = work.call
    written.reshape([WARPGROUP, o.shape[1]]).store(o.to(work.o_desc.dtype))
    fence_async_shared()
    place = coordinates(tile.batch, tile.head, rows.row, tile.first_q, tile.len_q, config.RAGGED_Q)
    store_tile(work.o_desc, place, written)
    if config.RAGGED_Q:
        lse = outputs.lse + gl.cast(tile.head, gl.int64) * call.num_q + tile.first_q
    else:
        lse = outputs.lse + (gl.cast(tile.batch, gl.int64) * call.heads + tile.head) * call.num_q
    i = rows.row + gl.arange(0, WARPGROUP, layout=gl.SliceLayout(1, s_layout))
    gl.store(lse + i, row_lse, mask=i < tile.len_q)


@gluon.jit
def pass_over(work, begin, end, config: gl.constexpr):
    """Release tiles that this warpgroup does not need."""
    for i in range(begin, end):
        _pass(work.k, i, config)
        _pass(work.v, i, config)


@gluon.jit
def pass_over_keys(work, begin, end, config: gl.constexpr):
    """Release the keys of tiles that this warpgroup does not need."""
    for i in range(begin, end):
        _pass(work.k, i, config)


@gluon.jit
def pass_over_values(work, begin, end, config: gl.constexpr):
    """Release their values."""
    for i in range(begin, end):
        _pass(work.v, i, config)


@gluon.jit
def _pass(ring, i, config: gl.constexpr):
    at = i % config.STAGES
    mbarrier.wait(ring.full.index(at), (i // config.STAGES) & 1)
    mbarrier.arrive(ring.empty.index(at), count=1)
