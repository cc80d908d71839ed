"""A warpgroup that multiplies: 64 rows of each tile of queries, one tile after another."""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from attnplug_flash_triton.hopper.device import WARPGROUP, store_wait
from attnplug_flash_triton.hopper.forward.joined import attend_joined
from attnplug_flash_triton.hopper.forward.rounds import keys_of, pass_over, rounds, values_of, write
from attnplug_flash_triton.hopper.forward.softmax import finished, operand_of, softmax, weights
from attnplug_flash_triton.hopper.forward.spans import rows_of, whole
from attnplug_flash_triton.hopper.forward.tiles import AHEAD, DYNAMIC, handed, is_handed, turns, where


@gluon.jit
def attend(work, outputs, CONSUMER: gl.constexpr, config: gl.constexpr):
    """Compute 64 rows of each tile: those of warpgroup number `CONSUMER`."""
    done = 0
    if config.JOINED:
        attend_joined(work, outputs, CONSUMER, config)
    elif config.PERSISTENT == DYNAMIC:
        turn = 0
        while is_handed(turn, work, 4):
            done = _attend_tile(None, turn, done, work, outputs, CONSUMER, config)
            turn += 1
    else:
        for turn in range(turns(work.call, config)):
            at = gl.program_id(0) + turn * work.call.programs
            done = _attend_tile(at, turn, done, work, outputs, CONSUMER, config)
    store_wait(0)


@gluon.jit
def _attend_tile(at, turn, done, work, outputs, CONSUMER: gl.constexpr, config: gl.constexpr):
    """Compute 64 rows of tile number `at`, this program's `turn`-th, before which there were `done` tiles of keys.

    Where the tile is, is worked out here and not before: ptxas makes other machine code of another order.
    """
    k, v = work.k, work.v
    dtype: gl.constexpr = work.q_desc.dtype
    SIZE: gl.constexpr = config.SIZE
    BLOCK_N: gl.constexpr = config.BLOCK_N
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    zero = gl.zeros([WARPGROUP, BLOCK_N], gl.float32, s_layout)
    at_q = turn % config.Q_STAGES * config.CONSUMERS + CONSUMER
    q = work.q.buffers.index(at_q).reshape([WARPGROUP, SIZE])

    if config.PERSISTENT == DYNAMIC:
        tile = handed(turn, work, 4)
        mbarrier.arrive(work.queue.empty.index(turn % AHEAD), count=1)
    else:
        tile = where(at, work.call, config)
    rows, begin_all, end_all = rows_of(tile, work.call, CONSUMER, config)
    whole_begin, whole_end = whole(rows, config)
    pass_over(work, done, done + end_all - rows.end, config)  # what only warpgroups of later rows see
    done += end_all - rows.end

    mbarrier.wait(work.q.full.index(at_q), (turn // config.Q_STAGES) & 1)
    at = done % config.STAGES
    mbarrier.wait(k.full.index(at), (done // config.STAGES) & 1)
    s_acc = warpgroup_mma(q, keys_of(work, at, config), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s_acc,))
    mbarrier.arrive(k.empty.index(at), count=1)
    p, top, total, fade = softmax(s, None, None, rows, (rows.end - 1) * BLOCK_N, outputs, True, True, config)
    o = gl.zeros([WARPGROUP, SIZE], gl.float32, o_layout)
    p = weights(p, o, outputs.in_order, dtype, config)
    p, top, total, o = rounds(q, p, top, total, o, rows, whole_begin, whole_end, done, work, outputs, zero, config)

    if config.OWN_OUT:
        mbarrier.arrive(work.q.empty.index(at_q), count=1)
    last = done + rows.end - rows.begin - 1
    at = last % config.STAGES
    mbarrier.wait(v.full.index(at), (last // config.STAGES) & 1)
    operand = operand_of(p, o, dtype)
    o_acc = warpgroup_mma(operand, values_of(work, at, config), o, is_async=True)
    share, row_lse = finished(top, total, tile.head, outputs, config)
    o, operand = warpgroup_mma_wait(0, deps=(o_acc, operand))
    mbarrier.arrive(v.empty.index(at), count=1)
    done += rows.end - rows.begin
    pass_over(work, done, done + rows.begin - begin_all, config)  # what only warpgroups of earlier rows see
    done += rows.begin - begin_all

    o = o * gl.convert_layout(share, gl.SliceLayout(1, o_layout), assert_trivial=True)[:, None]
    if config.OWN_OUT:
        store_wait(0)
        written = work.o_buffers.index(CONSUMER).reshape(work.o_desc.block_type.shape)
    else:
        written = work.o_buffers.index(at_q).reshape(work.o_desc.block_type.shape)
    write(o, row_lse, written, rows, tile, work, outputs, s_layout, config)
    if not config.OWN_OUT:
        store_wait(0)
        mbarrier.arrive(work.q.empty.index(at_q), count=1)
    return done
