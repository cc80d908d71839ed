"""Gradients of keys and values, to head size 256: a warpgroup has registers for one of them.

A program has 64 keys. One warpgroup computes scores and dV, the other dK; probabilities go from one to the other in
16 bits through shared memory, in the order of registers:

    first     S' = K Q' of the next round          P' = exp2(S' - lse) -> memory    dV += P' dO
    second    dP' = V dO' of the next round        dS' = P' (dP' - delta)           dK += dS' Q
"""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from attnplug_flash_triton.hopper.backward.spans import (
    RUNTIME,
    Call,
    hidden,
    queries_of,
    sequence,
    shifted_logits,
)
from attnplug_flash_triton.hopper.backward.tiles import barriers, key_tile, load_for_keys, row_of_tile, store_gradient
from attnplug_flash_triton.hopper.device import WARPGROUP, coordinates, exp2


@gluon.jit
def _handed_over(x):
    """Return 64 x 64 of a product, flat, so that eight values of a thread are next to each other."""
    return gl.reshape(gl.permute(gl.reshape(x, [4, 2, 8, 4, 2, 4, 2]), [3, 0, 2, 5, 4, 1, 6]), [4096])


@gluon.jit
def _taken_over(flat, layout: gl.constexpr):
    """Return what `_handed_over` returned, as it was."""
    x = gl.permute(gl.reshape(flat, [4, 4, 8, 4, 2, 2, 2]), [1, 5, 2, 0, 4, 3, 6])
    return gl.convert_layout(gl.reshape(x, [64, 64]), layout, assert_trivial=True)


@gluon.jit
def _multiply_values(
    descs, buffers, p_bufs, bars, p_full, call, taken, logit_scale, inner_scale,
    SIZE: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr, LOWER_RIGHT: gl.constexpr, HAS_LOW: gl.constexpr,
    HAS_HIGH: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Compute scores, probabilities, which the other warpgroup gets too, and dV."""
    q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, row_desc, dq_desc = descs
    q_bufs, do_bufs, k_bufs, v_bufs, lse_bufs, delta_bufs = buffers
    kv_full, q_full, do_full, q_empty, do_empty = bars
    M: gl.constexpr = 64
    dtype: gl.constexpr = q_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    zero = gl.zeros([WARPGROUP, M], gl.float32, s_layout)
    dv = gl.zeros([WARPGROUP, SIZE], gl.float32, d_layout)

    tile, batch, x = key_tile(call, taken, HAS_HIGH)
    first_q, len_q, first_k, all_k, len_k, low, high = sequence(batch, call, LOWER_RIGHT)
    first_key = tile * WARPGROUP
    begin, end = queries_of(first_key, len_q, len_k, low, high, WARPGROUP, M, HAS_LOW, HAS_HIGH)
    total = (end - begin) * taken
    j = begin
    keys = k_bufs.index(0).reshape([WARPGROUP, SIZE])
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(q_full.index(0), 0, pred=total > 0)
    q = q_bufs.index(0).reshape([M, SIZE])
    s_acc = warpgroup_mma(keys, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s_acc,))
    for i in range(total):
        stage = i % STAGES
        turn = i & 1
        do = do_bufs.index(stage).reshape([M, SIZE])
        lse = row_of_tile(lse_bufs.index(stage), M, s_layout)
        shifted, slope = shifted_logits(s, lse[None, :], logit_scale, inner_scale, SOFTCAP)
        shifted = hidden(shifted, first_key, j * M, len_k, low, high, True, EVEN, SOFTCAP, HAS_LOW, HAS_HIGH)
        p32 = exp2(shifted)
        p16 = p32.to(dtype)
        mbarrier.arrive(q_empty.index(stage), count=1)
        # The probabilities of two rounds ago were read: their queries, released later, have made room for these.
        if SOFTCAP:
            p_bufs.index(turn).store(_handed_over((p32 * slope).to(dtype)))
        else:
            p_bufs.index(turn).store(_handed_over(p16))
        mbarrier.arrive(p_full.index(turn), count=1)
        p = gl.convert_layout(p16, a_layout, assert_trivial=True)
        mbarrier.wait(do_full.index(stage), (i // STAGES) & 1)
        dv_acc = warpgroup_mma(p, do, dv, is_async=True)
        after = (i + 1) % STAGES
        mbarrier.wait(q_full.index(after), ((i + 1) // STAGES) & 1, pred=i + 1 < total)
        q = q_bufs.index(after).reshape([M, SIZE])
        s_acc = warpgroup_mma(keys, q.permute((1, 0)), zero, use_acc=False, is_async=True)  # the last is not used
        dv, p = warpgroup_mma_wait(1, deps=(dv_acc, p))
        mbarrier.arrive(do_empty.index(stage), count=1)
        s = warpgroup_mma_wait(0, deps=(s_acc,))
        j += 1
        if j == end:
            j = begin
    at = coordinates(batch, x, first_key, first_k, all_k, call.cu_k is not None)
    store_gradient(k_bufs.index(0), dv, dv_desc, at, SIZE)  # of keys, which the other warpgroup does not read


@gluon.jit
def _multiply_keys(
    descs, buffers, p_bufs, bars, p_full, call, taken, scale,
    SIZE: gl.constexpr, STAGES: gl.constexpr, LOWER_RIGHT: gl.constexpr, HAS_LOW: gl.constexpr,
    HAS_HIGH: gl.constexpr,
):  # fmt: skip
    """Compute the gradients of probabilities and of scores, and dK."""
    q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, row_desc, dq_desc = descs
    q_bufs, do_bufs, k_bufs, v_bufs, lse_bufs, delta_bufs = buffers
    kv_full, q_full, do_full, q_empty, do_empty = bars
    M: gl.constexpr = 64
    dtype: gl.constexpr = q_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    zero = gl.zeros([WARPGROUP, M], gl.float32, s_layout)
    p_layout: gl.constexpr = _handed_over(zero).type.layout
    dk = gl.zeros([WARPGROUP, SIZE], gl.float32, d_layout)

    tile, batch, x = key_tile(call, taken, HAS_HIGH)
    first_q, len_q, first_k, all_k, len_k, low, high = sequence(batch, call, LOWER_RIGHT)
    first_key = tile * WARPGROUP
    begin, end = queries_of(first_key, len_q, len_k, low, high, WARPGROUP, M, HAS_LOW, HAS_HIGH)
    total = (end - begin) * taken
    values = v_bufs.index(0).reshape([WARPGROUP, SIZE])
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(do_full.index(0), 0, pred=total > 0)
    do = do_bufs.index(0).reshape([M, SIZE])
    dp_acc = warpgroup_mma(values, do.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma_wait(0, deps=(dp_acc,))
    for i in range(total):
        stage = i % STAGES
        turn = i & 1
        delta = row_of_tile(delta_bufs.index(stage), M, s_layout)
        dp = dp - delta[None, :]
        mbarrier.wait(p_full.index(turn), (i >> 1) & 1)
        p = _taken_over(p_bufs.index(turn).load(p_layout), s_layout).to(gl.float32)
        ds16 = (p * dp).to(dtype)
        mbarrier.arrive(do_empty.index(stage), count=1)
        ds = gl.convert_layout(ds16, a_layout, assert_trivial=True)
        mbarrier.wait(q_full.index(stage), (i // STAGES) & 1)
        dk_acc = warpgroup_mma(ds, q_bufs.index(stage).reshape([M, SIZE]), dk, is_async=True)
        after = (i + 1) % STAGES
        mbarrier.wait(do_full.index(after), ((i + 1) // STAGES) & 1, pred=i + 1 < total)
        do = do_bufs.index(after).reshape([M, SIZE])
        dp_acc = warpgroup_mma(values, do.permute((1, 0)), zero, use_acc=False, is_async=True)  # the last is not used
        dk, ds = warpgroup_mma_wait(1, deps=(dk_acc, ds))
        mbarrier.arrive(q_empty.index(stage), count=1)
        dp = warpgroup_mma_wait(0, deps=(dp_acc,))
    at = coordinates(batch, x, first_key, first_k, all_k, call.cu_k is not None)
    store_gradient(v_bufs.index(0), dk * scale, dk_desc, at, SIZE)  # of values, likewise


@gluon.jit(do_not_specialize=[*RUNTIME, "taken"])
def key_gradients_wide_kernel(
    q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, row_desc, cu_q, cu_k, used,
    heads, group, num_q, num_k, k_rows, left, right, q_tiles, tiles, columns, section, taken,
    logit_scale, inner_scale, scale,
    SIZE: gl.constexpr, STAGES: gl.constexpr, EVEN: gl.constexpr,
    LOWER_RIGHT: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, SOFTCAP: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Write dK and dV of tiles of 64 keys. The arguments are those of `key_gradients_kernel`, with M = 64."""
    gl.static_assert(STAGES == 2, "as many as there are buffers of probabilities")
    dtype: gl.constexpr = q_desc.dtype
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    do_bufs = gl.allocate_shared_memory(dtype, [STAGES] + do_desc.block_type.shape, do_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [1] + k_desc.block_type.shape, k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [1] + v_desc.block_type.shape, v_desc.layout)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES] + row_desc.block_type.shape, row_desc.layout)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES] + row_desc.block_type.shape, row_desc.layout)
    p_bufs = gl.allocate_shared_memory(dtype, [2, 4096], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    bars = (kv_full, barriers(STAGES, 1), barriers(STAGES, 1), barriers(STAGES, 2), barriers(STAGES, 2))
    p_full = barriers(2, 1)
    descs = (q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, row_desc, row_desc)
    buffers = (q_bufs, do_bufs, k_bufs, v_bufs, lse_bufs, delta_bufs)
    call = Call(
        cu_q, cu_k, used, heads, group, num_q, num_k, k_rows, left, right, q_tiles, tiles, columns, section
    )  # fmt: skip
    RAGGED_K: gl.constexpr = cu_k is not None or used is not None
    gl.warp_specialize(
        [
            (_multiply_values, (
                descs, buffers, p_bufs, bars, p_full, call, taken, logit_scale, inner_scale, SIZE,
                STAGES, EVEN, LOWER_RIGHT, HAS_LOW, HAS_HIGH, SOFTCAP,
            )),
            (_multiply_keys, (
                descs, buffers, p_bufs, bars, p_full, call, taken, scale, SIZE, STAGES, LOWER_RIGHT,
                HAS_LOW, HAS_HIGH,
            )),
            (load_for_keys, (
                descs, buffers, bars, call, taken, 64, 1, STAGES, RAGGED_K, LOWER_RIGHT, HAS_LOW,
                HAS_HIGH,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
