"""A warpgroup that multiplies, of which one tile of queries begins while the one before ends."""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from attnplug_flash_triton.hopper.device import WARPGROUP, above_wait, store_wait
from attnplug_flash_triton.hopper.forward.rounds import (
    keys_of,
    pass_over,
    pass_over_keys,
    pass_over_values,
    rounds,
    values_of,
    write,
)
from attnplug_flash_triton.hopper.forward.softmax import AT_END, finished, operand_of, softmax, weights
from attnplug_flash_triton.hopper.forward.spans import rows_of, whole
from attnplug_flash_triton.hopper.forward.tiles import AHEAD, DYNAMIC, handed, is_handed, turns, where


@gluon.jit
def attend_joined(work, outputs, CONSUMER: gl.constexpr, config: gl.constexpr):
    """Compute 64 rows of each tile, those of warpgroup number `CONSUMER`; where one tile ends, the next begins.

    The last values of a tile are multiplied together with the first keys of the next, as in a round, so that the tensor
    cores wait neither for a tile's first softmax nor for its output. Behind the last tile its queries are multiplied
    with some keys once more, and nothing is done with the result.

    Between the last keys of a tile and the first of the next there may be tiles of keys that only others see:
    behind, those of earlier rows, and before, those of later ones. Their values must have buffers while the last of
    the tile are still in theirs, or the next keys would never come: see `outputs.can_join`.
    """
    k, v = work.k, work.v
    dtype: gl.constexpr = work.q_desc.dtype
    SIZE: gl.constexpr = config.SIZE
    BLOCK_N: gl.constexpr = config.BLOCK_N
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    zero = gl.zeros([WARPGROUP, BLOCK_N], gl.float32, s_layout)
    BOUNDED: gl.constexpr = config.HAS_LOW or config.HAS_HIGH
    MASKED: gl.constexpr = True if BOUNDED else AT_END
    count = 0
    if config.PERSISTENT != DYNAMIC:
        count = turns(work.call, config)

    is_there = _is_there_next(0, count, work, config)
    if is_there:
        tile, rows, before, behind = _next_rows(0, is_there, work, CONSUMER, config)
        pass_over(work, 0, before, config)
        mbarrier.wait(work.q.full.index(CONSUMER), 0)
        mbarrier.wait(k.full.index(before), 0)
        q = work.q.buffers.index(CONSUMER).reshape([WARPGROUP, SIZE])
        s_acc = warpgroup_mma(q, keys_of(work, before, config), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s_acc,))
        mbarrier.arrive(k.empty.index(before), count=1)
        column = (rows.end - 1) * BLOCK_N
        p, top, total, fade = softmax(s, None, None, rows, column, outputs, True, MASKED, config)
        o = gl.zeros([WARPGROUP, SIZE], gl.float32, o_layout)
        p = weights(p, o, outputs.in_order, dtype, config)
        done = before
        turn = 0
        while is_there:
            at_q = turn % config.Q_STAGES * config.CONSUMERS + CONSUMER
            q = work.q.buffers.index(at_q).reshape([WARPGROUP, SIZE])
            o = gl.zeros([WARPGROUP, SIZE], gl.float32, o_layout)
            whole_begin, whole_end = whole(rows, config)
            p, top, total, o = rounds(
                q, p, top, total, o, rows, whole_begin, whole_end, done, work, outputs, zero, config
            )
            done += rows.end - rows.begin

            last = done - 1
            is_there = _is_there_next(turn + 1, count, work, config)
            if is_there:
                mbarrier.arrive(work.q.empty.index(at_q), count=1)
            this_tile, these_rows = tile, rows
            between = 0
            if BOUNDED:
                between = behind
                tile, rows, before, behind = _next_rows(turn + 1, is_there, work, CONSUMER, config)
                between += before
                pass_over_keys(work, done, done + between, config)
            following = gl.where(is_there, turn + 1, turn)
            first = gl.where(is_there, done + between, last)
            at_q = following % config.Q_STAGES * config.CONSUMERS + CONSUMER
            at_k = first % config.STAGES
            at_v = last % config.STAGES
            mbarrier.wait(work.q.full.index(at_q), (following // config.Q_STAGES) & 1)
            mbarrier.wait(k.full.index(at_k), (first // config.STAGES) & 1)
            q = work.q.buffers.index(at_q).reshape([WARPGROUP, SIZE])
            s_acc = warpgroup_mma(q, keys_of(work, at_k, config), zero, use_acc=False, is_async=True)
            mbarrier.wait(v.full.index(at_v), (last // config.STAGES) & 1)
            operand = operand_of(p, o, dtype)
            o_acc = warpgroup_mma(operand, values_of(work, at_v, config), o, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s_acc,))
            if is_there:
                mbarrier.arrive(k.empty.index(at_k), count=1)
            if not BOUNDED:  # nothing before asks where it is, and to find out takes divisions
                tile, rows, before, behind = _next_rows(turn + 1, is_there, work, CONSUMER, config)
            share, row_lse = finished(top, total, this_tile.head, outputs, config)
            column = (rows.end - 1) * BLOCK_N
            p32, top, total, fade = softmax(s, None, None, rows, column, outputs, True, MASKED, config)
            total = above_wait(total, -outputs.scale)
            o, operand = warpgroup_mma_wait(0, deps=(o_acc, operand))
            mbarrier.arrive(v.empty.index(at_v), count=1)
            if BOUNDED:
                pass_over_values(work, done, done + between, config)
                done += between
            p = weights(p32, o, outputs.in_order, dtype, config)
            o = o * gl.convert_layout(share, gl.SliceLayout(1, o_layout), assert_trivial=True)[:, None]
            store_wait(0)
            written = work.o_buffers.index(CONSUMER).reshape(work.o_desc.block_type.shape)
            write(o, row_lse, written, these_rows, this_tile, work, outputs, s_layout, config)
            turn += 1


@gluon.jit
def _is_there_next(turn, count, work, config: gl.constexpr):
    """Whether this program has a `turn`-th tile; it must have the one before."""
    if config.PERSISTENT == DYNAMIC:
        return is_handed(turn, work, 4)
    else:
        return turn < count


@gluon.jit
def _next_rows(turn, is_there, work, CONSUMER: gl.constexpr, config: gl.constexpr):
    """Return the `turn`-th tile, this warpgroup's rows, and how many tiles of keys others see before and behind them.

    If the tile is not there, what is returned is of another, with none before.
    """
    if config.PERSISTENT == DYNAMIC:
        tile = handed(turn, work, 4)
        mbarrier.arrive(work.queue.empty.index(turn % AHEAD), count=1)
    else:
        at = gl.program_id(0) + gl.where(is_there, turn, turn - 1) * work.call.programs
        tile = where(at, work.call, config)
    rows, begin_all, end_all = rows_of(tile, work.call, CONSUMER, config)
    return tile, rows, gl.where(is_there, end_all - rows.end, 0), rows.begin - begin_all
