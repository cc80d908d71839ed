"""Gradients of keys and values, and in the same rounds of queries, to head size 128.

A program has 128 keys, a warpgroup 64 of them; both work on the same tile of queries. With `FUSED` they exchange dS in
shared memory, compute half of dQ each, and TMA adds it to float32 in global memory:

    loads           Q, lse | dO, delta of the next tiles, as far ahead as there are buffers
    products        dP' = V dO'      dV += P' dO     dK += dS' Q    dQ = dS K    S' = K Q' of the next round
    in registers    P' = exp2(S' - lse)    dS' = P' (dP' - delta)                          dQ -> memory

Without, a round begins with S' and ends with dK.
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

from attnplug_flash_triton.hopper.backward.spans import (
    RUNTIME,
    Call,
    first_query_tile,
    hidden,
    queries_of,
    sequence,
    shifted_logits,
)
from attnplug_flash_triton.hopper.backward.tiles import barriers, key_tile, load_for_keys, row_of_tile, store_gradient
from attnplug_flash_triton.hopper.device import (
    WARPGROUP,
    as_operand,
    coordinates,
    exp2,
    packed,
    reduce_add,
    store_wait,
    unpacked,
)


@gluon.jit
def _in_order_of_registers(x):
    """Return a product's result of 64 rows, flat, so that four values of a thread are next to each other."""
    COLUMNS: gl.constexpr = x.shape[1]
    x = gl.permute(gl.reshape(x, [4, 2, 8, COLUMNS // 8, 4, 2]), [3, 0, 2, 4, 1, 5])
    return gl.reshape(x, [COLUMNS // 4, 256])


@gluon.jit
def _multiply(
    descs, buffers, ds_bufs, dq_bufs, bars, ds_full, call, taken, logit_scale, inner_scale, scale,
    M: gl.constexpr, SIZE: gl.constexpr, STAGES: gl.constexpr, FUSED: gl.constexpr, EVEN: gl.constexpr,
    RAGGED_K: gl.constexpr, LOWER_RIGHT: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
    SOFTCAP: gl.constexpr, MINE: gl.constexpr,
):  # fmt: skip
    """Compute dK and dV of 64 keys, those of warpgroup number `MINE`, and with `FUSED` half of dQ."""
    q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, row_desc, dq_desc = descs
    q_bufs, do_bufs, k_bufs, v_bufs, lse_bufs, delta_bufs = buffers
    kv_full, q_full, do_full, q_empty, do_empty = bars
    OTHER: gl.constexpr = 1 - MINE
    PART: gl.constexpr = M * SIZE // 128
    """Columns of a warpgroup's part of dQ: all of 64 queries of 128, or half of those of 64 queries."""
    dtype: gl.constexpr = q_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    zero = gl.zeros([WARPGROUP, M], gl.float32, s_layout)
    dq_zero = gl.zeros([64, PART], gl.float32, dq_layout)
    dk = gl.zeros([WARPGROUP, SIZE], gl.float32, d_layout)
    dv = gl.zeros([WARPGROUP, SIZE], gl.float32, d_layout)

    tile, batch, x = key_tile(call, taken, HAS_HIGH)
    first_q, len_q, first_k, all_k, len_k, low, high = sequence(batch, call, LOWER_RIGHT)
    begin, end = queries_of(tile * 128, len_q, len_k, low, high, 128, M, HAS_LOW, HAS_HIGH)
    first_key = tile * 128 + MINE * WARPGROUP
    total = (end - begin) * taken
    j = begin
    first_tile = first_query_tile(batch, x * taken, first_q, call, M)
    keys = k_bufs.index(MINE).reshape([WARPGROUP, SIZE])
    values = v_bufs.index(MINE).reshape([WARPGROUP, SIZE])
    mbarrier.wait(kv_full, 0)
    if FUSED:
        mbarrier.wait(q_full.index(0), 0, pred=total > 0)
        q = q_bufs.index(0).reshape([M, SIZE])
        s_acc = warpgroup_mma(keys, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s_acc,))
    for i in range(total):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        q = q_bufs.index(stage).reshape([M, SIZE])
        do = do_bufs.index(stage).reshape([M, SIZE])
        if not FUSED:
            mbarrier.wait(q_full.index(stage), phase)
            s_acc = warpgroup_mma(keys, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(do_full.index(stage), phase)
        dp_acc = warpgroup_mma(values, do.permute((1, 0)), zero, use_acc=False, is_async=True)
        if not FUSED:
            s = warpgroup_mma_wait(1, deps=(s_acc,))
        lse = row_of_tile(lse_bufs.index(stage), M, s_layout)
        shifted, slope = shifted_logits(s, lse[None, :], logit_scale, inner_scale, SOFTCAP)
        shifted = hidden(shifted, first_key, j * M, len_k, low, high, True, EVEN, SOFTCAP, HAS_LOW, HAS_HIGH)
        p32 = exp2(shifted)
        words = packed(p32, dtype)
        p = as_operand(words, dtype, a_layout)
        if SOFTCAP:
            words = packed(p32 * slope, dtype)
        dv_acc = warpgroup_mma(p, do, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp_acc,))
        delta = row_of_tile(delta_bufs.index(stage), M, s_layout)
        ds16 = (unpacked(words, dtype, s_layout) * (dp - delta[None, :])).to(dtype)
        ds = gl.convert_layout(ds16, a_layout, assert_trivial=True)
        if FUSED:
            turn = i & 1
            mine = ds_bufs.index(turn * 2 + MINE)
            other = ds_bufs.index(turn * 2 + OTHER)
            mine.store(ds16)
            fence_async_shared()
            mbarrier.arrive(ds_full.index(turn * 2 + MINE), count=1)
            dk_acc = warpgroup_mma(ds, q, dk, is_async=True)
            dv, p = warpgroup_mma_wait(1, deps=(dv_acc, p))
            my_keys = k_bufs.index(MINE).reshape([WARPGROUP, SIZE])
            their_keys = k_bufs.index(OTHER).reshape([WARPGROUP, SIZE])
            if M == 128:
                mine = mine.slice(MINE * 64, 64, 1)
                other = other.slice(MINE * 64, 64, 1)
            else:
                my_keys = my_keys.slice(MINE * PART, PART, 1)
                their_keys = their_keys.slice(MINE * PART, PART, 1)
            dq_acc = warpgroup_mma(mine.permute((1, 0)), my_keys, dq_zero, use_acc=False, is_async=True)
            mbarrier.wait(ds_full.index(turn * 2 + OTHER), (i >> 1) & 1)
            dq_acc = warpgroup_mma(other.permute((1, 0)), their_keys, dq_acc, is_async=True)
            after = (i + 1) % STAGES
            mbarrier.wait(q_full.index(after), ((i + 1) // STAGES) & 1, pred=i + 1 < total)
            q = q_bufs.index(after).reshape([M, SIZE])
            s_acc = warpgroup_mma(keys, q.permute((1, 0)), zero, use_acc=False, is_async=True)  # the last is not used
            dq, dk, ds = warpgroup_mma_wait(1, deps=(dq_acc, dk_acc, ds))
            mbarrier.arrive(q_empty.index(stage), count=1)
            store_wait(0)
            dq_bufs.index(MINE).store(_in_order_of_registers(dq))
            fence_async_shared()
            reduce_add(dq_desc, [((first_tile + j) * 2 + MINE) * (PART // 4), 0], dq_bufs.index(MINE))
            s = warpgroup_mma_wait(0, deps=(s_acc,))
        else:
            dk_acc = warpgroup_mma(ds, q, dk, is_async=True)
            dv, p, dk, ds = warpgroup_mma_wait(0, deps=(dv_acc, p, dk_acc, ds))
            mbarrier.arrive(q_empty.index(stage), count=1)
        j += 1
        if j == end:
            j = begin
            first_tile += call.q_tiles
    at = coordinates(batch, x, first_key, first_k, all_k, call.cu_k is not None)
    result = v_bufs.index(MINE)  # these values were read by this warpgroup alone
    store_gradient(result, dv, dv_desc, at, SIZE)
    store_gradient(result, dk * scale, dk_desc, at, SIZE)


@gluon.jit(do_not_specialize=[*RUNTIME, "taken"])
def key_gradients_kernel(
    q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, row_desc, dq_desc, cu_q, cu_k, used,
    heads, group, num_q, num_k, k_rows, left, right, q_tiles, tiles, columns, section, taken,
    logit_scale, inner_scale, scale,
    SIZE: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr, FUSED: gl.constexpr, EVEN: gl.constexpr,
    LOWER_RIGHT: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, SOFTCAP: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Write dK and dV of tiles of 128 keys; with `FUSED`, add to dQ.

    Args:
        q_desc, do_desc: `(B, heads, num_q, size)`, tiles of M rows; ragged with `cu_q`.
        k_desc, v_desc: `(B, heads / group, num_k, size)`, tiles of 64 rows; ragged with `cu_k` or `used`.
        dk_desc, dv_desc: `(B, heads / taken, num_k, size)`, tiles of 64 rows; ragged with `cu_k`.
        row_desc: `(2, tiles * M)`: lse in powers of two (inf: nothing is seen), and delta.
        dq_desc: `(tiles * M * SIZE / 256, 256)`, float32, zero before.
        k_rows: with `used`, how many rows of keys there are from one sequence to the next.
        q_tiles: tiles of queries of one head.
        tiles, columns, section: see `schedule`; a column is `taken` query heads of a sequence.
        logit_scale: of the logits in powers of two; with SOFTCAP, of the tanh.
        inner_scale: with SOFTCAP, what products are multiplied by within the tanh, times 2 log2(e).
        scale: of dK.
        EVEN: every query sees every key, and tiles of keys are whole.
    """
    dtype: gl.constexpr = q_desc.dtype
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    do_bufs = gl.allocate_shared_memory(dtype, [STAGES] + do_desc.block_type.shape, do_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [2] + k_desc.block_type.shape, k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [2] + v_desc.block_type.shape, v_desc.layout)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES] + row_desc.block_type.shape, row_desc.layout)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES] + row_desc.block_type.shape, row_desc.layout)
    if FUSED:
        ds_bufs = gl.allocate_shared_memory(dtype, [4, WARPGROUP, M], gl.NVMMASharedLayout(128, 16, 2))
        dq_bufs = gl.allocate_shared_memory(gl.float32, [2] + dq_desc.block_type.shape, dq_desc.layout)
    else:
        ds_bufs = q_bufs
        dq_bufs = q_bufs
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    q_full = barriers(STAGES, 1)
    do_full = barriers(STAGES, 1)
    empty = barriers(STAGES, 2)  # both operands of a round are released together
    ds_full = barriers(4, 1)
    descs = (q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, row_desc, dq_desc)
    buffers = (q_bufs, do_bufs, k_bufs, v_bufs, lse_bufs, delta_bufs)
    bars = (kv_full, q_full, do_full, empty, empty)
    call = Call(
        cu_q, cu_k, used, heads, group, num_q, num_k, k_rows, left, right, q_tiles, tiles, columns, section
    )  # fmt: skip
    RAGGED_K: gl.constexpr = cu_k is not None or used is not None
    gl.warp_specialize(
        [
            (_multiply, (
                descs, buffers, ds_bufs, dq_bufs, bars, ds_full, call, taken, logit_scale, inner_scale,
                scale, M, SIZE, STAGES, FUSED, EVEN, RAGGED_K, LOWER_RIGHT, HAS_LOW, HAS_HIGH, SOFTCAP, 0,
            )),
            (_multiply, (
                descs, buffers, ds_bufs, dq_bufs, bars, ds_full, call, taken, logit_scale, inner_scale,
                scale, M, SIZE, STAGES, FUSED, EVEN, RAGGED_K, LOWER_RIGHT, HAS_LOW, HAS_HIGH, SOFTCAP, 1,
            )),
            (load_for_keys, (
                descs, buffers, bars, call, taken, M, 2, STAGES, RAGGED_K, LOWER_RIGHT, HAS_LOW, HAS_HIGH,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
