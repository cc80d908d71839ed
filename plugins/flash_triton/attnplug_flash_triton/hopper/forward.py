"""The forward kernel for Hopper: one warp that loads, two or three warpgroups that multiply 64 rows of queries each.

    loads       K(n-1)  Q  K(n-2)  V(n-1)  K(n-3)  V(n-2) ...             (TMA, as far ahead as there are buffers)
    products    | Q K(i+1)'  P(i) V(i) ............. | Q K(i+2)'  P(i+1) V(i+1) ...
    softmax     |           | exponentials of i+1 .. |           | exponentials of i+2 ...

That is the pipeline within a warpgroup of FlashAttention-3 (Shah et al., 2024, section 3.2): in every round the
product of the queries with the next keys and the one of the last probabilities with their values are issued together;
softmax waits for the first, the rescaling of the output for the second. Meanwhile the other warpgroups multiply.

Tiles of keys are taken from the last one to the first: masked ones at the end, whole ones, masked ones at the beginning
of a window. Only the first and the masked ones pay for masking.

A program computes one tile of queries, or one after another (PERSISTENT), and then loads the next while it finishes the
last. Where tiles differ in length, the loading warp takes their numbers from a counter in global memory, and hands
them on through shared memory.

Where a sequence's length is not known on the host (variable length, `seqused_k`), keys, values and outputs go through
ragged descriptors, with which TMA itself ends a tile at the end of its sequence: see `descriptors.py`.
"""

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

from attnplug_flash_triton.hopper.device import (
    LN2,
    LOG2E,
    WARPGROUP,
    above_wait,
    after_wait,
    as_operand,
    exp2,
    hidden_above,
    hidden_behind,
    hidden_below,
    load_tile,
    multiplied_where_needed,
    packed,
    reciprocal,
    schedule,
    softcapped,
    store_tile,
    store_wait,
)

RAGGED_ROWS = gl.constexpr(2**30)
AHEAD = gl.constexpr(2)
"""Tiles that a program has taken from the counter and not finished."""
GROWTH = gl.constexpr(8.0)
"""By how much, in powers of two, a logit may exceed what is subtracted from it before that is raised (the idea is
FlashAttention-4's). Exponentials are then larger than they need be, up to 2**8, and no less exact, and most rounds need
not rescale the output."""
DYNAMIC = gl.constexpr(2)
"""For PERSISTENT: the next tile is the next that no program has taken, by a counter in global memory. The loading warp
finds out where that is while it loads the one before, and hands it on through shared memory."""
PARTS = gl.constexpr(4)
"""Of a row's columns, of which a thread has pairs: see `_maxima`."""
PLACE = gl.constexpr(7)
"""Numbers that say where a tile is: see `_where`."""
AT_END = gl.constexpr(2)
"""For MASKED: all that hides keys is the end of the sequence."""
SHARED = gl.constexpr(2)
"""For SOFTCAP: four elements share a reciprocal."""

# Arguments that are not compiled in, so that a kernel is compiled once for all lengths.
RUNTIME = [
    *("heads", "group", "num_q", "num_k", "k_rows", "left", "right", "tiles", "columns", "section", "programs"),
    *("scale", "inner_scale", "in_order"),
]


@gluon.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    q_desc, k_desc, v_desc, o_desc, lse, cu_q, cu_k, used, sinks, counter,
    heads, group, num_q, num_k, k_rows, left, right, tiles, columns, section, programs, scale, inner_scale,
    in_order, SIZE: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
    PERSISTENT: gl.constexpr, OWN_OUT: gl.constexpr,
    LOWER_RIGHT: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
    NEGATE: gl.constexpr, SOFTCAP: gl.constexpr, WORDS: gl.constexpr, JOINED: gl.constexpr,
    REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Write out and lse for tiles of `CONSUMERS * 64` queries of one head.

    Args:
        q_desc, o_desc: `(B, heads, num_q, size)`, tiles of 64 rows, or `(1, heads, tokens, size)` with `cu_q`, where
            `o_desc` is ragged.
        k_desc, v_desc: `(B, heads / group, num_k, size)`, tiles of BLOCK_N rows; ragged with `cu_k` or `used`.
        lse: `(B, heads, num_q)`, or `(heads, tokens)` with `cu_q`, contiguous.
        k_rows: with `used`, how many rows of keys there are from one sequence to the next.
        left, right: of the window; `HAS_LOW` and `HAS_HIGH` say which of them are sides.
        tiles, columns, section: see `schedule`; a column is a head of a sequence.
        counter: with PERSISTENT = DYNAMIC, how many tiles were taken besides the first one of each program; 0.
        programs: how many there are.
        scale: of the logits in powers of two, positive; with NEGATE, of the negated products.
        inner_scale: with SOFTCAP, what products are multiplied by within the tanh, times 2 log2(e).
        SOFTCAP: 0, 1, or SHARED, where `scale` is twice as large; see `softcapped`.
        WORDS: probabilities go from one round to the next in words of two.
        in_order: 0x3210; see `after_wait`.
        PERSISTENT: 0, 1 for every `programs`-th tile, or DYNAMIC.
        JOINED: where one tile of queries ends, the next begins; see `_attend_joined`. It takes OWN_OUT, two Q_STAGES,
            and as many STAGES as `outputs.can_join` says.
        OWN_OUT: the output has its own shared memory; else it takes that of the queries.
        SIZE: of a head, rounded up to 64, 128 or 256.
    """
    dtype: gl.constexpr = q_desc.dtype
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_bufs = gl.allocate_shared_memory(dtype, [Q_STAGES * CONSUMERS] + q_desc.block_type.shape, q_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    if OWN_OUT:
        o_bufs = gl.allocate_shared_memory(dtype, [CONSUMERS] + o_desc.block_type.shape, o_desc.layout)
    else:
        o_bufs = q_bufs
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES * CONSUMERS, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES * CONSUMERS, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    next_tiles = gl.allocate_shared_memory(gl.int32, [AHEAD * PLACE, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    next_full = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], bar)
    next_empty = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], bar)
    for i in gl.static_range(AHEAD):
        mbarrier.init(next_full.index(i), count=1)
        mbarrier.init(next_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(Q_STAGES * CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)

    descs = (q_desc, k_desc, v_desc, o_desc)
    buffers = (q_bufs, k_bufs, v_bufs, o_bufs)
    full = (q_full, k_full, v_full)
    empty = (q_empty, k_empty, v_empty)
    lengths = (cu_q, cu_k, used)
    numbers = (heads, group, num_q, num_k, k_rows, left, right, tiles, columns, section, programs)
    M: gl.constexpr = CONSUMERS * WARPGROUP
    RAGGED_Q: gl.constexpr = cu_q is not None
    RAGGED_K: gl.constexpr = cu_k is not None or used is not None
    next = (next_tiles, next_full, next_empty, counter)
    shared = (descs, buffers, full, empty, next, lengths, numbers)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_attend, (
                    shared, lse, sinks, scale, inner_scale, in_order, 0, SIZE, M, BLOCK_N, CONSUMERS,
                    STAGES, Q_STAGES, PERSISTENT, OWN_OUT, RAGGED_Q,
                    LOWER_RIGHT, HAS_LOW, HAS_HIGH, NEGATE, SOFTCAP, WORDS, JOINED,
                )),
                (_attend, (
                    shared, lse, sinks, scale, inner_scale, in_order, 1, SIZE, M, BLOCK_N, CONSUMERS,
                    STAGES, Q_STAGES, PERSISTENT, OWN_OUT, RAGGED_Q,
                    LOWER_RIGHT, HAS_LOW, HAS_HIGH, NEGATE, SOFTCAP, WORDS, JOINED,
                )),
                (_load, (
                    shared, 1, M, BLOCK_N, CONSUMERS, STAGES, Q_STAGES, PERSISTENT, RAGGED_Q, RAGGED_K,
                    LOWER_RIGHT, HAS_LOW, HAS_HIGH,
                )),
            ],
            [4, 1],
            [REGISTERS, LOADER_REGISTERS],
        )  # fmt: skip
    else:  # the warps that load are the first ones, which get the registers that are left over
        gl.warp_specialize(
            [
                (_load, (
                    shared, 4, M, BLOCK_N, CONSUMERS, STAGES, Q_STAGES, PERSISTENT, RAGGED_Q, RAGGED_K,
                    LOWER_RIGHT, HAS_LOW, HAS_HIGH,
                )),
                (_attend, (
                    shared, lse, sinks, scale, inner_scale, in_order, 0, SIZE, M, BLOCK_N, CONSUMERS,
                    STAGES, Q_STAGES, PERSISTENT, OWN_OUT, RAGGED_Q,
                    LOWER_RIGHT, HAS_LOW, HAS_HIGH, NEGATE, SOFTCAP, WORDS, JOINED,
                )),
                (_attend, (
                    shared, lse, sinks, scale, inner_scale, in_order, 1, SIZE, M, BLOCK_N, CONSUMERS,
                    STAGES, Q_STAGES, PERSISTENT, OWN_OUT, RAGGED_Q,
                    LOWER_RIGHT, HAS_LOW, HAS_HIGH, NEGATE, SOFTCAP, WORDS, JOINED,
                )),
                (_attend, (
                    shared, lse, sinks, scale, inner_scale, in_order, 2, SIZE, M, BLOCK_N, CONSUMERS,
                    STAGES, Q_STAGES, PERSISTENT, OWN_OUT, RAGGED_Q,
                    LOWER_RIGHT, HAS_LOW, HAS_HIGH, NEGATE, SOFTCAP, WORDS, JOINED,
                )),
            ],
            [4, 4, 4],
            [REGISTERS, REGISTERS, REGISTERS],
        )  # fmt: skip


@gluon.jit
def _load(
    shared,
    WARPS: gl.constexpr, M: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr, PERSISTENT: gl.constexpr, RAGGED_Q: gl.constexpr, RAGGED_K: gl.constexpr,
    LOWER_RIGHT: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
):  # fmt: skip
    """Bring tiles to shared memory in the order in which they are multiplied."""
    descs, buffers, full, empty, next, lengths, numbers = shared
    next_tiles, next_full, next_empty, counter = next
    heads, group, num_q, num_k, k_rows, left, right, tiles, columns, section, programs = numbers
    done = 0
    if PERSISTENT == DYNAMIC:
        turn = 0
        _hand_on(gl.program_id(0), turn, shared, WARPS, M, HAS_HIGH)
        while _is_handed(turn, next, WARPS):
            done = _load_tile(
                _handed(turn, next, lengths, numbers, WARPS), turn, done, shared,
                WARPS, M, BLOCK_N, CONSUMERS, STAGES, Q_STAGES, PERSISTENT,
                RAGGED_Q, RAGGED_K, LOWER_RIGHT, HAS_LOW, HAS_HIGH,
            )  # fmt: skip
            turn += 1
    else:
        for turn in range(_turns(lengths, numbers, M, PERSISTENT, HAS_HIGH)):
            done = _load_tile(
                _where(gl.program_id(0) + turn * programs, lengths, numbers, M, HAS_HIGH), turn, done, shared,
                WARPS, M, BLOCK_N, CONSUMERS, STAGES, Q_STAGES, PERSISTENT,
                RAGGED_Q, RAGGED_K, LOWER_RIGHT, HAS_LOW, HAS_HIGH,
            )  # fmt: skip


@gluon.jit
def _load_tile(
    where, turn, done, shared,
    WARPS: gl.constexpr, M: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr, PERSISTENT: gl.constexpr, RAGGED_Q: gl.constexpr, RAGGED_K: gl.constexpr,
    LOWER_RIGHT: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
):  # fmt: skip
    """Bring one tile of queries, the `turn`-th of this program, and its keys, before which there were `done` tiles."""
    descs, buffers, full, empty, next, lengths, numbers = shared
    q_desc, k_desc, v_desc, o_desc = descs
    q_bufs, k_bufs, v_bufs, o_bufs = buffers
    q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    row, batch, head, first_q, len_q, first_k, len_k = where
    low, high = _sides(len_q, len_k, numbers, LOWER_RIGHT)
    begin, end = _span(row, gl.minimum(row + M, len_q), 0, len_k, low, high, BLOCK_N, HAS_LOW, HAS_HIGH)
    q_batch = batch * (1 - RAGGED_Q)
    kv_head = head // numbers[1]
    for c in gl.static_range(CONSUMERS):
        at_q = turn % Q_STAGES * CONSUMERS + c
        mbarrier.wait(q_empty.index(at_q), ((turn // Q_STAGES) & 1) ^ 1)
        mbarrier.expect(q_full.index(at_q), q_desc.block_type.nbytes)
        load_tile(q_desc, [q_batch, head, first_q + row + c * WARPGROUP, 0], q_full.index(at_q), q_bufs.index(at_q))
        if c == 0:
            _bring(k_desc, k_bufs, k_full, k_empty, done, (end - 1) * BLOCK_N, batch, kv_head, first_k, len_k,
                   STAGES, RAGGED_K)  # fmt: skip
    if PERSISTENT == DYNAMIC:  # while these are on their way
        _hand_on(numbers[10] + gl.atomic_add(next[3], 1, sem="relaxed"), turn + 1, shared, WARPS, M, HAS_HIGH)
    for i in range(1, end - begin + 1):
        if i < end - begin:
            _bring(k_desc, k_bufs, k_full, k_empty, done + i, (end - 1 - i) * BLOCK_N, batch, kv_head, first_k, len_k,
                   STAGES, RAGGED_K)  # fmt: skip
        _bring(v_desc, v_bufs, v_full, v_empty, done + i - 1, (end - i) * BLOCK_N, batch, kv_head, first_k, len_k,
               STAGES, RAGGED_K)  # fmt: skip
    return done + end - begin


@gluon.jit
def _bring(
    desc, bufs, full, empty, place, row, batch, head, first, length, STAGES: gl.constexpr, RAGGED: gl.constexpr
):  # fmt: skip
    """Load the rows from `row` on of a sequence into the buffer of tile number `place`, once it is free."""
    at = place % STAGES
    mbarrier.wait(empty.index(at), ((place // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(at), desc.block_type.nbytes)
    if RAGGED:
        where = [RAGGED_ROWS, first + length, RAGGED_ROWS - length + row, head, 0]
        load_tile(desc, where, full.index(at), bufs.index(at))
    else:
        load_tile(desc, [batch, head, row, 0], full.index(at), bufs.index(at))


@gluon.jit
def _attend(
    shared, lse, sinks, scale, inner_scale, in_order,
    CONSUMER: gl.constexpr, SIZE: gl.constexpr, M: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    PERSISTENT: gl.constexpr, OWN_OUT: gl.constexpr,
    RAGGED_Q: gl.constexpr,
    LOWER_RIGHT: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
    NEGATE: gl.constexpr, SOFTCAP: gl.constexpr, WORDS: gl.constexpr, JOINED: gl.constexpr,
):  # fmt: skip
    """Compute 64 rows of each tile: those of warpgroup number `CONSUMER`."""
    descs, buffers, full, empty, next, lengths, numbers = shared
    next_tiles, next_full, next_empty, counter = next
    heads, group, num_q, num_k, k_rows, left, right, tiles, columns, section, programs = numbers
    done = 0
    if JOINED:
        _attend_joined(
            shared, lse, sinks, scale, inner_scale, in_order,
            CONSUMER, SIZE, M, BLOCK_N, CONSUMERS, STAGES, Q_STAGES, PERSISTENT, RAGGED_Q,
            LOWER_RIGHT, HAS_LOW, HAS_HIGH, NEGATE, SOFTCAP, WORDS,
        )  # fmt: skip
    elif PERSISTENT == DYNAMIC:
        turn = 0
        while _is_handed(turn, next, 4):
            done = _attend_tile(
                None, turn, done, shared, lse, sinks, scale, inner_scale, in_order,
                CONSUMER, SIZE, M, BLOCK_N, CONSUMERS, STAGES, Q_STAGES, PERSISTENT,
                OWN_OUT, RAGGED_Q, LOWER_RIGHT, HAS_LOW, HAS_HIGH, NEGATE, SOFTCAP, WORDS,
            )  # fmt: skip
            turn += 1
    else:
        for turn in range(_turns(lengths, numbers, M, PERSISTENT, HAS_HIGH)):
            done = _attend_tile(
                gl.program_id(0) + turn * programs, turn, done, shared, lse, sinks, scale, inner_scale, in_order,
                CONSUMER, SIZE, M, BLOCK_N, CONSUMERS, STAGES, Q_STAGES, PERSISTENT,
                OWN_OUT, RAGGED_Q, LOWER_RIGHT, HAS_LOW, HAS_HIGH, NEGATE, SOFTCAP, WORDS,
            )  # fmt: skip
    store_wait(0)


@gluon.jit
def _attend_tile(
    at, turn, done, shared, lse, sinks, scale, inner_scale, in_order,
    CONSUMER: gl.constexpr, SIZE: gl.constexpr, M: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr, PERSISTENT: gl.constexpr,
    OWN_OUT: gl.constexpr, RAGGED_Q: gl.constexpr,
    LOWER_RIGHT: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
    NEGATE: gl.constexpr, SOFTCAP: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """Compute 64 rows of tile number `at`, this program's `turn`-th, before which there were `done` tiles of keys.

    Where the tile is, is worked out here and not before: ptxas makes other machine code of another order.
    """
    descs, buffers, full, empty, next, lengths, numbers = shared
    q_desc, k_desc, v_desc, o_desc = descs
    q_bufs, k_bufs, v_bufs, o_bufs = buffers
    q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    heads, group, num_q, num_k, k_rows, left, right, tiles, columns, section, programs = numbers
    dtype: gl.constexpr = q_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    zero = gl.zeros([WARPGROUP, BLOCK_N], gl.float32, s_layout)
    at_q = turn % Q_STAGES * CONSUMERS + CONSUMER
    q = q_bufs.index(at_q).reshape([WARPGROUP, SIZE])
    rings = (k_bufs, v_bufs, k_full, v_full, k_empty, v_empty)

    if PERSISTENT == DYNAMIC:
        tile_row, batch, head, first_q, len_q, first_k, len_k = _handed(turn, next, lengths, numbers, 4)
        mbarrier.arrive(next[2].index(turn % AHEAD), count=1)
    else:
        tile_row, batch, head, first_q, len_q, first_k, len_k = _where(at, lengths, numbers, M, HAS_HIGH)
    low, high = _sides(len_q, len_k, numbers, LOWER_RIGHT)
    begin_all, end_all = _span(
        tile_row, gl.minimum(tile_row + M, len_q), 0, len_k, low, high, BLOCK_N, HAS_LOW, HAS_HIGH
    )
    row = tile_row + CONSUMER * WARPGROUP
    begin, end = _span(row, row + WARPGROUP, begin_all, len_k, low, high, BLOCK_N, HAS_LOW, HAS_HIGH)
    end = gl.minimum(end, end_all)
    begin = gl.minimum(begin, end - 1)
    whole_begin, whole_end = _whole(row, begin, end, len_k, low, high, BLOCK_N, HAS_LOW, HAS_HIGH)
    bounds = (row, len_k, low, high)
    _pass_over(rings, done, done + end_all - end, STAGES)  # what only warpgroups of later rows see
    done += end_all - end

    mbarrier.wait(q_full.index(at_q), (turn // Q_STAGES) & 1)
    at = done % STAGES
    mbarrier.wait(k_full.index(at), (done // STAGES) & 1)
    keys = k_bufs.index(at).reshape([BLOCK_N, SIZE]).permute((1, 0))
    s_acc = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s_acc,))
    mbarrier.arrive(k_empty.index(at), count=1)
    p, top, total, fade = _softmax(
        s, None, None, bounds, (end - 1) * BLOCK_N, scale, inner_scale,
        True, True, HAS_LOW, HAS_HIGH, NEGATE, SOFTCAP,
    )  # fmt: skip
    o = gl.zeros([WARPGROUP, SIZE], gl.float32, o_layout)
    p = _weights(p, o, in_order, dtype, WORDS)

    if HAS_HIGH:
        for i in range(done + 1, done + end - whole_end):
            p, top, total, o = _round(
                q, rings, i, zero, p, top, total, o, bounds, (end - 1 - (i - done)) * BLOCK_N, scale,
                inner_scale, in_order, dtype, SIZE, BLOCK_N, STAGES,
                True, HAS_LOW, HAS_HIGH, NEGATE, SOFTCAP, WORDS,
            )  # fmt: skip
    for i in range(done + end - whole_end, done + end - whole_begin):
        p, top, total, o = _round(
            q, rings, i, zero, p, top, total, o, bounds, 0, scale, inner_scale,
            in_order, dtype, SIZE, BLOCK_N, STAGES,
            False, HAS_LOW, HAS_HIGH, NEGATE, SOFTCAP, WORDS,
        )  # fmt: skip
    if HAS_LOW:
        for i in range(done + end - whole_begin, done + end - begin):
            p, top, total, o = _round(
                q, rings, i, zero, p, top, total, o, bounds, (end - 1 - (i - done)) * BLOCK_N, scale,
                inner_scale, in_order, dtype, SIZE, BLOCK_N, STAGES,
                True, HAS_LOW, HAS_HIGH, NEGATE, SOFTCAP, WORDS,
            )  # fmt: skip

    if OWN_OUT:
        mbarrier.arrive(q_empty.index(at_q), count=1)
    last = done + end - begin - 1
    at = last % STAGES
    mbarrier.wait(v_full.index(at), (last // STAGES) & 1)
    operand = _operand(p, o, dtype)
    o_acc = warpgroup_mma(operand, v_bufs.index(at).reshape([BLOCK_N, SIZE]), o, is_async=True)
    total = gl.convert_layout(gl.sum(total, 1), top.type.layout)
    if SOFTCAP == SHARED:
        top += 0.5
    share, row_lse = _finished(top * scale, total, sinks, head)
    o, operand = warpgroup_mma_wait(0, deps=(o_acc, operand))
    mbarrier.arrive(v_empty.index(at), count=1)
    done += end - begin
    _pass_over(rings, done, done + begin - begin_all, STAGES)  # what only warpgroups of earlier rows see
    done += begin - begin_all

    o = o * gl.convert_layout(share, o_rows, assert_trivial=True)[:, None]
    if OWN_OUT:
        store_wait(0)
    if OWN_OUT:
        written = o_bufs.index(CONSUMER).reshape(o_desc.block_type.shape)
    else:
        written = o_bufs.index(at_q).reshape(o_desc.block_type.shape)
    _write(o, row_lse, written, o_desc, lse, (row, batch, head, first_q, len_q), num_q, heads, s_layout, RAGGED_Q)
    if not OWN_OUT:
        store_wait(0)
        mbarrier.arrive(q_empty.index(at_q), count=1)
    return done


@gluon.jit
def _attend_joined(
    shared, lse, sinks, scale, inner_scale, in_order,
    CONSUMER: gl.constexpr, SIZE: gl.constexpr, M: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr, PERSISTENT: gl.constexpr, RAGGED_Q: gl.constexpr,
    LOWER_RIGHT: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
    NEGATE: gl.constexpr, SOFTCAP: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """Compute 64 rows of each tile, those of warpgroup number `CONSUMER`; where one tile ends, the next begins.

    The last values of a tile are multiplied together with the first keys of the next, as in a round, so that the tensor
    cores wait neither for a tile's first softmax nor for its output. Behind the last tile its queries are multiplied
    with some keys once more, and nothing is done with the result.

    Between the last keys of a tile and the first of the next there may be tiles of keys that only others see:
    behind, those of earlier rows, and before, those of later ones. Their values must have buffers while the last of
    the tile are still in theirs, or the next keys would never come: see `outputs.can_join`.
    """
    descs, buffers, full, empty, next, lengths, numbers = shared
    q_desc, k_desc, v_desc, o_desc = descs
    q_bufs, k_bufs, v_bufs, o_bufs = buffers
    q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    heads, group, num_q, num_k, k_rows, left, right, tiles, columns, section, programs = numbers
    dtype: gl.constexpr = q_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    zero = gl.zeros([WARPGROUP, BLOCK_N], gl.float32, s_layout)
    rings = (k_bufs, v_bufs, k_full, v_full, k_empty, v_empty)
    BOUNDED: gl.constexpr = HAS_LOW or HAS_HIGH
    MASKED: gl.constexpr = True if BOUNDED else AT_END
    turns = 0
    if PERSISTENT != DYNAMIC:
        turns = _turns(lengths, numbers, M, PERSISTENT, HAS_HIGH)

    is_there = _is_there_next(0, turns, next, PERSISTENT)
    if is_there:
        where, bounds, passed, begin, end, behind = _rows_of(
            0, is_there, next, lengths, numbers,
            CONSUMER, M, BLOCK_N, PERSISTENT, LOWER_RIGHT, HAS_LOW, HAS_HIGH,
        )  # fmt: skip
        _pass_over(rings, 0, passed, STAGES)
        mbarrier.wait(q_full.index(CONSUMER), 0)
        mbarrier.wait(k_full.index(passed), 0)
        q = q_bufs.index(CONSUMER).reshape([WARPGROUP, SIZE])
        keys = k_bufs.index(passed).reshape([BLOCK_N, SIZE]).permute((1, 0))
        s_acc = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s_acc,))
        mbarrier.arrive(k_empty.index(passed), count=1)
        p, top, total, fade = _softmax(
            s, None, None, bounds, (end - 1) * BLOCK_N, scale, inner_scale,
            True, MASKED, HAS_LOW, HAS_HIGH, NEGATE, SOFTCAP,
        )  # fmt: skip
        o = gl.zeros([WARPGROUP, SIZE], gl.float32, o_layout)
        p = _weights(p, o, in_order, dtype, WORDS)
        done = passed
        turn = 0
        while is_there:
            at_q = turn % Q_STAGES * CONSUMERS + CONSUMER
            q = q_bufs.index(at_q).reshape([WARPGROUP, SIZE])
            o = gl.zeros([WARPGROUP, SIZE], gl.float32, o_layout)
            row, len_k, low, high = bounds
            whole_begin, whole_end = _whole(row, begin, end, len_k, low, high, BLOCK_N, HAS_LOW, HAS_HIGH)
            if HAS_HIGH:
                for i in range(done + 1, done + end - whole_end):
                    p, top, total, o = _round(
                        q, rings, i, zero, p, top, total, o, bounds, (end - 1 - (i - done)) * BLOCK_N, scale,
                        inner_scale, in_order, dtype, SIZE, BLOCK_N, STAGES,
                        True, HAS_LOW, HAS_HIGH, NEGATE, SOFTCAP, WORDS,
                    )  # fmt: skip
            for i in range(done + end - whole_end, done + end - whole_begin):
                p, top, total, o = _round(
                    q, rings, i, zero, p, top, total, o, bounds, 0, scale, inner_scale,
                    in_order, dtype, SIZE, BLOCK_N, STAGES,
                    False, HAS_LOW, HAS_HIGH, NEGATE, SOFTCAP, WORDS,
                )  # fmt: skip
            if HAS_LOW:
                for i in range(done + end - whole_begin, done + end - begin):
                    p, top, total, o = _round(
                        q, rings, i, zero, p, top, total, o, bounds, (end - 1 - (i - done)) * BLOCK_N, scale,
                        inner_scale, in_order, dtype, SIZE, BLOCK_N, STAGES,
                        True, HAS_LOW, HAS_HIGH, NEGATE, SOFTCAP, WORDS,
                    )  # fmt: skip
            done += end - begin

            last = done - 1
            is_there = _is_there_next(turn + 1, turns, next, PERSISTENT)
            if is_there:
                mbarrier.arrive(q_empty.index(at_q), count=1)
            this = where
            between = 0
            if BOUNDED:
                between = behind
                where, bounds, passed, begin, end, behind = _rows_of(
                    turn + 1, is_there, next, lengths, numbers,
                    CONSUMER, M, BLOCK_N, PERSISTENT, LOWER_RIGHT, HAS_LOW, HAS_HIGH,
                )  # fmt: skip
                between += passed
                _pass_keys(rings, done, done + between, STAGES)
            following = gl.where(is_there, turn + 1, turn)
            first = gl.where(is_there, done + between, last)
            at_q = following % Q_STAGES * CONSUMERS + CONSUMER
            at_k = first % STAGES
            at_v = last % STAGES
            mbarrier.wait(q_full.index(at_q), (following // Q_STAGES) & 1)
            mbarrier.wait(k_full.index(at_k), (first // STAGES) & 1)
            q = q_bufs.index(at_q).reshape([WARPGROUP, SIZE])
            keys = k_bufs.index(at_k).reshape([BLOCK_N, SIZE]).permute((1, 0))
            s_acc = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(at_v), (last // STAGES) & 1)
            operand = _operand(p, o, dtype)
            o_acc = warpgroup_mma(operand, v_bufs.index(at_v).reshape([BLOCK_N, SIZE]), o, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s_acc,))
            if is_there:
                mbarrier.arrive(k_empty.index(at_k), count=1)
            if not BOUNDED:  # nothing before asks where it is, and to find out takes divisions
                where, bounds, passed, begin, end, behind = _rows_of(
                    turn + 1, is_there, next, lengths, numbers,
                    CONSUMER, M, BLOCK_N, PERSISTENT, LOWER_RIGHT, HAS_LOW, HAS_HIGH,
                )  # fmt: skip
            total = gl.convert_layout(gl.sum(total, 1), top.type.layout)
            if SOFTCAP == SHARED:
                top += 0.5
            share, row_lse = _finished(top * scale, total, sinks, this[2])
            p32, top, total, fade = _softmax(
                s, None, None, bounds, (end - 1) * BLOCK_N, scale, inner_scale,
                True, MASKED, HAS_LOW, HAS_HIGH, NEGATE, SOFTCAP,
            )  # fmt: skip
            total = above_wait(total, -scale)
            o, operand = warpgroup_mma_wait(0, deps=(o_acc, operand))
            mbarrier.arrive(v_empty.index(at_v), count=1)
            if BOUNDED:
                _pass_values(rings, done, done + between, STAGES)
                done += between
            p = _weights(p32, o, in_order, dtype, WORDS)
            o = o * gl.convert_layout(share, gl.SliceLayout(1, o_layout), assert_trivial=True)[:, None]
            store_wait(0)
            written = o_bufs.index(CONSUMER).reshape(o_desc.block_type.shape)
            _write(o, row_lse, written, o_desc, lse, this, num_q, heads, s_layout, RAGGED_Q)
            turn += 1


@gluon.jit
def _is_there_next(turn, turns, next, PERSISTENT: gl.constexpr):
    """Whether this program has a `turn`-th tile; it must have the one before."""
    if PERSISTENT == DYNAMIC:
        return _is_handed(turn, next, 4)
    else:
        return turn < turns


@gluon.jit
def _rows_of(
    turn, is_there, next, lengths, numbers,
    CONSUMER: gl.constexpr, M: gl.constexpr, BLOCK_N: gl.constexpr, PERSISTENT: gl.constexpr,
    LOWER_RIGHT: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
):  # fmt: skip
    """Return where a warpgroup's rows of the `turn`-th tile are, the bounds of what they see, and which tiles of keys.

    That is how many come before that only later rows see, their own from begin to end, of which there is at least one,
    and how many come behind that only earlier rows see.

    If it is not there, what is returned is of another tile, with none before.
    """
    if PERSISTENT == DYNAMIC:
        tile_row, batch, head, first_q, len_q, first_k, len_k = _handed(turn, next, lengths, numbers, 4)
        mbarrier.arrive(next[2].index(turn % AHEAD), count=1)
    else:
        at = gl.program_id(0) + gl.where(is_there, turn, turn - 1) * numbers[10]
        tile_row, batch, head, first_q, len_q, first_k, len_k = _where(at, lengths, numbers, M, HAS_HIGH)
    low, high = _sides(len_q, len_k, numbers, LOWER_RIGHT)
    begin_all, end_all = _span(
        tile_row, gl.minimum(tile_row + M, len_q), 0, len_k, low, high, BLOCK_N, HAS_LOW, HAS_HIGH
    )
    row = tile_row + CONSUMER * WARPGROUP
    begin, end = _span(row, row + WARPGROUP, begin_all, len_k, low, high, BLOCK_N, HAS_LOW, HAS_HIGH)
    end = gl.minimum(end, end_all)
    begin = gl.minimum(begin, end - 1)
    before = gl.where(is_there, end_all - end, 0)
    where = (row, batch, head, first_q, len_q)
    return where, (row, len_k, low, high), before, begin, end, begin - begin_all


@gluon.jit
def _write(o, row_lse, written, o_desc, lse, place, num_q, heads, s_layout: gl.constexpr, RAGGED_Q: gl.constexpr):
    """Write 64 rows of out, through the shared memory `written`, and of lse."""
    row, batch, head, first_q, len_q = place
    written.reshape([WARPGROUP, o.shape[1]]).store(o.to(o_desc.dtype))
    fence_async_shared()
    if RAGGED_Q:
        where = [RAGGED_ROWS, first_q + len_q, RAGGED_ROWS - len_q + row, head, 0]
        store_tile(o_desc, where, written)
        lse_rows = lse + gl.cast(head, gl.int64) * num_q + first_q
    else:
        store_tile(o_desc, [batch, head, row, 0], written)
        lse_rows = lse + (gl.cast(batch, gl.int64) * heads + head) * num_q
    i = row + gl.arange(0, WARPGROUP, layout=gl.SliceLayout(1, s_layout))
    gl.store(lse_rows + i, row_lse, mask=i < len_q)


@gluon.jit
def _round(
    q, rings, i, zero, p, top, total, o, bounds, column, scale, inner_scale, in_order,
    dtype: gl.constexpr, SIZE: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr,
    HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
    NEGATE: gl.constexpr, SOFTCAP: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """Add the values of tile `i - 1`, whose probabilities are `p`; return those of tile `i`, and what else changes."""
    k_bufs, v_bufs, k_full, v_full, k_empty, v_empty = rings
    at_k = i % STAGES
    at_v = (i - 1) % STAGES
    mbarrier.wait(k_full.index(at_k), (i // STAGES) & 1)
    keys = k_bufs.index(at_k).reshape([BLOCK_N, SIZE]).permute((1, 0))
    s_acc = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(at_v), ((i - 1) // STAGES) & 1)
    operand = _operand(p, o, dtype)
    o_acc = warpgroup_mma(operand, v_bufs.index(at_v).reshape([BLOCK_N, SIZE]), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s_acc,))
    mbarrier.arrive(k_empty.index(at_k), count=1)
    p32, top, total, fade = _softmax(
        s, top, total, bounds, column, scale, inner_scale,
        False, MASKED, HAS_LOW, HAS_HIGH, NEGATE, SOFTCAP,
    )  # fmt: skip
    total = above_wait(total, 0.0)
    o, operand = warpgroup_mma_wait(0, deps=(o_acc, operand))
    mbarrier.arrive(v_empty.index(at_v), count=1)
    p = _weights(p32, o, in_order, dtype, WORDS)
    return p, top, total, _faded(o, fade)


@gluon.jit
def _weights(p, o, in_order, dtype: gl.constexpr, WORDS: gl.constexpr):
    """Return probabilities in the form in which they go from one round to the next; see `after_wait`."""
    if p.shape[1] == 2 * o.shape[1]:  # as many words as there are elements of the output
        return after_wait(packed(p, dtype), o, in_order)
    elif WORDS:
        return packed(p, dtype)
    else:
        return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, o.type.layout, 2), assert_trivial=True)


@gluon.jit
def _operand(p, o, dtype: gl.constexpr):
    """Return what `_weights` returned as the left operand of a product."""
    if p.dtype == gl.int32:
        return as_operand(p, dtype, gl.DotOperandLayout(0, o.type.layout, 2))
    else:
        return p


@gluon.jit
def _faded(o, fade):
    """Return the output so far, multiplied by what it fades by as maxima grow."""
    fade = gl.convert_layout(fade, gl.SliceLayout(1, o.type.layout), assert_trivial=True)
    return multiplied_where_needed(o, fade)


@gluon.jit
def _softmax(
    s, top, total, bounds, column, scale, inner_scale,
    FIRST: gl.constexpr, MASKED: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
    NEGATE: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Return unscaled probabilities of the products `s`, the rows' new maxima and sums, and what earlier ones fade by.

    Maxima are those of products; sums are kept apart for the threads that share a row, and are added up at the end.
    """
    if NEGATE:
        s = -s
    if SOFTCAP == SHARED:
        s = softcapped(s * inner_scale)
    elif SOFTCAP:  # tanh; that it has no relative precision near 0 is no loss in a logit
        s = 1.0 - 2.0 * reciprocal(exp2(s * inner_scale) + 1.0)
    if MASKED == AT_END:
        j = column + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
        s = hidden_behind(s, j - bounds[1] + 1)
    elif MASKED:
        s = _masked(s, bounds, column, HAS_LOW, HAS_HIGH)
    higher = _maxima(s)
    if not FIRST:
        higher = gl.maximum(top, higher)
        higher = gl.where((higher - top) * scale > GROWTH, higher, top)
    shift = higher
    if MASKED:  # a row that has seen no key yet: -inf - -inf would be NaN
        shift = gl.where(higher == float("-inf"), 0.0, higher)
    p = exp2(s * scale - (shift * scale)[:, None])
    if FIRST:
        fade = higher  # of nothing
        total = _part_sums(p)
    else:
        fade = exp2((top - shift) * scale)
        threads: gl.constexpr = gl.SliceLayout(1, total.type.layout)
        total = total * gl.convert_layout(fade, threads, assert_trivial=True)[:, None] + _part_sums(p)
    return p, higher, total, fade


@gluon.jit
def _masked(s, bounds, column, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr):
    """Return `s` with -inf where a row does not see a key; the first key is `column`."""
    row, len_k, low, high = bounds
    layout: gl.constexpr = s.type.layout
    j = column + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, layout))
    if HAS_LOW or HAS_HIGH:
        i = row + gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, layout))
    if HAS_HIGH:
        s = hidden_above(s, j[None, :], gl.minimum(i + high, len_k - 1)[:, None])
    else:
        s = hidden_above(s, j[None, :], len_k - 1)
    if HAS_LOW:
        s = hidden_below(s, j[None, :], (i + low)[:, None])
    return s


@gluon.jit
def _maxima(s):
    """Return the maximum of each row: eight parts of what one thread has of it, then these; then threads.

    As one chain of 32, each of whose maxima waits for the one before, it took a fifth of a round.
    """
    ROWS: gl.constexpr = s.shape[0]
    COLUMNS: gl.constexpr = s.shape[1]
    parts = gl.reshape(s, [ROWS, PARTS, COLUMNS // (8 * PARTS), 4, 2])
    highest = gl.max(gl.max(gl.max(gl.max(parts, 2), 3), 1), 1)
    return gl.convert_layout(highest, gl.SliceLayout(1, s.type.layout), assert_trivial=True)


@gluon.jit
def _part_sums(p):
    """Sum over those columns of each row that one thread has: four parts of a row."""
    ROWS: gl.constexpr = p.shape[0]
    COLUMNS: gl.constexpr = p.shape[1]
    return gl.sum(gl.sum(gl.reshape(p, [ROWS, COLUMNS // 8, 4, 2]), 3), 1)


@gluon.jit
def _finished(top, total, sinks, head):
    """Return what the output is multiplied by, and lse; `top` is the maximum of the logits, in powers of two."""
    if sinks is not None:
        sink = gl.cast(gl.load(sinks + head), gl.float32) * LOG2E
        highest = gl.maximum(top, sink)
        shift = gl.where(highest == float("-inf"), 0.0, highest)
        fade = exp2(top - shift)
        total = total * fade + exp2(sink - shift)
        share = gl.where(total == 0.0, 0.0, fade / total)
        top = highest
    else:
        share = gl.where(total == 0.0, 0.0, 1.0 / total)
    return share, (top + gl.log2(total)) * LN2


@gluon.jit
def _pass_over(rings, begin, end, STAGES: gl.constexpr):
    """Release tiles that this warpgroup does not need."""
    k_bufs, v_bufs, k_full, v_full, k_empty, v_empty = rings
    for i in range(begin, end):
        at = i % STAGES
        mbarrier.wait(k_full.index(at), (i // STAGES) & 1)
        mbarrier.arrive(k_empty.index(at), count=1)
        mbarrier.wait(v_full.index(at), (i // STAGES) & 1)
        mbarrier.arrive(v_empty.index(at), count=1)


@gluon.jit
def _pass_keys(rings, begin, end, STAGES: gl.constexpr):
    """Release the keys of tiles that this warpgroup does not need."""
    k_bufs, v_bufs, k_full, v_full, k_empty, v_empty = rings
    for i in range(begin, end):
        mbarrier.wait(k_full.index(i % STAGES), (i // STAGES) & 1)
        mbarrier.arrive(k_empty.index(i % STAGES), count=1)


@gluon.jit
def _pass_values(rings, begin, end, STAGES: gl.constexpr):
    """Release their values."""
    k_bufs, v_bufs, k_full, v_full, k_empty, v_empty = rings
    for i in range(begin, end):
        mbarrier.wait(v_full.index(i % STAGES), (i // STAGES) & 1)
        mbarrier.arrive(v_empty.index(i % STAGES), count=1)


@gluon.jit
def _turns(lengths, numbers, M: gl.constexpr, PERSISTENT: gl.constexpr, LAST_FIRST: gl.constexpr):
    """Return how many tiles this program computes, where that does not depend on how fast others are."""
    heads, group, num_q, num_k, k_rows, left, right, tiles, columns, section, programs = numbers
    if PERSISTENT:
        return (tiles * columns - gl.program_id(0) + programs - 1) // programs
    else:
        return _is_there(gl.program_id(0), lengths, numbers, M, LAST_FIRST)


@gluon.jit
def _is_there(at, lengths, numbers, M: gl.constexpr, LAST_FIRST: gl.constexpr):
    """Return 0 for a tile behind the end of its sequence, which is shorter than the longest one; else 1."""
    cu_q, cu_k, used = lengths
    if cu_q is not None:
        row, batch, head = _place(at, numbers, M, LAST_FIRST)
        return gl.where(row < gl.load(cu_q + batch + 1) - gl.load(cu_q + batch), 1, 0)
    else:
        return 1


@gluon.jit
def _place(at, numbers, M: gl.constexpr, LAST_FIRST: gl.constexpr):
    """Return (first row, batch, head) of tile number `at`."""
    heads, group, num_q, num_k, k_rows, left, right, tiles, columns, section, programs = numbers
    tile, column = schedule(at, tiles, columns, section, LAST_FIRST)
    return tile * M, column // heads, column % heads


@gluon.jit
def _where(at, lengths, numbers, M: gl.constexpr, LAST_FIRST: gl.constexpr):
    """Return where tile number `at` is: first row, batch, head, first query, queries, first key, keys."""
    row, batch, head = _place(at, numbers, M, LAST_FIRST)
    first_q, len_q, first_k, len_k = _sequence(batch, lengths, numbers)
    return row, batch, head, first_q, len_q, first_k, len_k


@gluon.jit
def _hand_on(at, turn, shared, WARPS: gl.constexpr, M: gl.constexpr, LAST_FIRST: gl.constexpr):
    """Tell all warps where the `turn`-th tile is, of which there is none before number `at`; row -1 if none is left."""
    descs, buffers, full, empty, next, lengths, numbers = shared
    next_tiles, next_full, next_empty, counter = next
    heads, group, num_q, num_k, k_rows, left, right, tiles, columns, section, programs = numbers
    last = tiles * columns - 1
    if lengths[0] is not None:
        while (at < last) & (_is_there(gl.minimum(at, last), lengths, numbers, M, LAST_FIRST) == 0):
            at = programs + gl.atomic_add(counter, 1, sem="relaxed")
    row, batch, head, first_q, len_q, first_k, len_k = _where(gl.minimum(at, last), lengths, numbers, M, LAST_FIRST)
    row = gl.where((at > last) | (row >= len_q), -1, row)
    slot = turn % AHEAD
    mbarrier.wait(next_empty.index(slot), ((turn // AHEAD) & 1) ^ 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    place = (row, batch, head, first_q, len_q, first_k, len_k)
    for i in gl.static_range(PLACE):
        next_tiles.index(slot * PLACE + i).store(gl.full([1], place[i], gl.int32, layout))
    mbarrier.arrive(next_full.index(slot), count=1)


@gluon.jit
def _is_handed(turn, next, WARPS: gl.constexpr):
    """Wait for what `_hand_on` tells of the `turn`-th tile, and return whether there is one."""
    slot = turn % AHEAD
    mbarrier.wait(next[1].index(slot), (turn // AHEAD) & 1)
    return _number(next[0], slot * PLACE, WARPS) >= 0


@gluon.jit
def _handed(turn, next, lengths, numbers, WARPS: gl.constexpr):
    """Return what `_where` does, of the `turn`-th tile; only after `_is_handed`."""
    heads, group, num_q, num_k, k_rows, left, right, tiles, columns, section, programs = numbers
    first = turn % AHEAD * PLACE
    row = _number(next[0], first, WARPS)
    batch = _number(next[0], first + 1, WARPS)
    head = _number(next[0], first + 2, WARPS)
    first_q = 0
    len_q = num_q
    first_k = batch * k_rows
    len_k = num_k
    if lengths[0] is not None:
        first_q = _number(next[0], first + 3, WARPS)
        len_q = _number(next[0], first + 4, WARPS)
        first_k = _number(next[0], first + 5, WARPS)
    if lengths[1] is not None or lengths[2] is not None:
        len_k = _number(next[0], first + 6, WARPS)
    return row, batch, head, first_q, len_q, first_k, len_k


@gluon.jit
def _number(numbers, i, WARPS: gl.constexpr):
    """Return a number of shared memory."""
    return gl.max(numbers.index(i).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def _sequence(batch, lengths, numbers):
    """Return (first query, queries, first key, keys)."""
    cu_q, cu_k, used = lengths
    heads, group, num_q, num_k, k_rows, left, right, tiles, columns, section, programs = numbers
    first_q = 0
    len_q = num_q
    first_k = batch * k_rows
    len_k = num_k
    if cu_q is not None:
        first_q = gl.load(cu_q + batch)
        len_q = gl.load(cu_q + batch + 1) - first_q
        first_k = gl.load(cu_k + batch)
        len_k = gl.load(cu_k + batch + 1) - first_k
    if used is not None:
        len_k = gl.load(used + batch)
    return first_q, len_q, first_k, len_k


@gluon.jit
def _sides(len_q, len_k, numbers, LOWER_RIGHT: gl.constexpr):
    """Return (low, high): query i sees the keys from i + low to i + high."""
    offset = 0
    if LOWER_RIGHT:
        offset = len_k - len_q
    return offset - numbers[5], offset + numbers[6]


@gluon.jit
def _span(
    first, end, least, len_k, low, high, BLOCK_N: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr
):  # fmt: skip
    """Return (begin, end) of the tiles of keys that rows `first` to `end - 1` see, from `least` on; at least one."""
    end_key = len_k
    if HAS_HIGH:
        end_key = gl.maximum(gl.minimum(len_k, end + high), 0)
    end_tile = gl.maximum((end_key + BLOCK_N - 1) // BLOCK_N, least + 1)
    begin = least
    if HAS_LOW:
        begin = gl.minimum(gl.maximum(gl.maximum(first + low, 0) // BLOCK_N, least), end_tile - 1)
    return begin, end_tile


@gluon.jit
def _whole(
    row, begin, end, len_k, low, high, BLOCK_N: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr
):  # fmt: skip
    """Return (begin, end) of those tiles, without the last one, of which 64 rows from `row` on see every key."""
    whole_end = end - 1
    if HAS_HIGH:
        seen = gl.maximum(gl.minimum(len_k, row + high + 1), 0)
        whole_end = gl.maximum(gl.minimum(whole_end, seen // BLOCK_N), begin)
    whole_begin = begin
    if HAS_LOW:
        unseen = gl.maximum(row + WARPGROUP - 1 + low, 0)
        whole_begin = gl.maximum(gl.minimum((unseen + BLOCK_N - 1) // BLOCK_N, whole_end), begin)
    return whole_begin, whole_end
