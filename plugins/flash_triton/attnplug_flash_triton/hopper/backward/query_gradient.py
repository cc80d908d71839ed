"""The gradient of queries by itself, where it is not added up by other programs: equal bits on repeated runs.

A program has 128 queries, a warpgroup 64 of them. Products of the next tile of keys run while this one's exponentials
are computed:

    products        S = Q K', dP = dO V' of the next tile                              dQ += dS K
    in registers    P = exp2(S - lse)    dS = P (dP - delta), both of this tile
"""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from attnplug_flash_triton.hopper.backward.spans import (
    RUNTIME,
    Call,
    first_query_tile,
    hidden,
    keys_of,
    sequence,
    shifted_logits,
)
from attnplug_flash_triton.hopper.backward.tiles import barriers, store_gradient
from attnplug_flash_triton.hopper.device import WARPGROUP, coordinates, exp2, load_tile, schedule


@gluon.jit
def _query_tile(call, HAS_HIGH: gl.constexpr):
    """Return (first query, batch, head) of this program."""
    tile, column = schedule(gl.program_id(0), call.tiles, call.columns, call.section, HAS_HIGH)
    batch = column // call.heads
    return tile * 128, batch, column - batch * call.heads


@gluon.jit
def _load_for_queries(
    descs, buffers, bars, call, N: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    RAGGED_K: gl.constexpr, LOWER_RIGHT: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
):  # fmt: skip
    """Bring the program's 128 queries, then tile after tile of keys and values."""
    q_desc, do_desc, k_desc, v_desc, dq_desc = descs
    q_bufs, do_bufs, k_bufs, v_bufs = buffers
    q_full, k_full, v_full, k_empty, v_empty = bars
    RAGGED_Q: gl.constexpr = call.cu_q is not None
    first_query, batch, head = _query_tile(call, HAS_HIGH)
    first_q, len_q, first_k, all_k, len_k, low, high = sequence(batch, call, LOWER_RIGHT)
    begin, end = keys_of(first_query, len_k, low, high, 128, N, HAS_LOW, HAS_HIGH)
    kv_head = head // call.group
    mbarrier.expect(q_full, 4 * q_desc.block_type.nbytes)
    for w in gl.static_range(2):
        place = coordinates(batch, head, first_query + w * WARPGROUP, first_q, len_q, RAGGED_Q)
        load_tile(q_desc, place, q_full, q_bufs.index(w))
        load_tile(do_desc, place, q_full, do_bufs.index(w))
    for i in range(end - begin):
        at = coordinates(batch, kv_head, (begin + i) * N, first_k, len_k, RAGGED_K)
        of_k = i % K_STAGES
        mbarrier.wait(k_empty.index(of_k), ((i // K_STAGES) & 1) ^ 1)
        mbarrier.expect(k_full.index(of_k), k_desc.block_type.nbytes)
        load_tile(k_desc, at, k_full.index(of_k), k_bufs.index(of_k))
        of_v = i % V_STAGES
        mbarrier.wait(v_empty.index(of_v), ((i // V_STAGES) & 1) ^ 1)
        mbarrier.expect(v_full.index(of_v), v_desc.block_type.nbytes)
        load_tile(v_desc, at, v_full.index(of_v), v_bufs.index(of_v))


@gluon.jit
def _multiply_queries(
    descs, buffers, bars, rows, row_count, call, logit_scale, inner_scale, scale,
    SIZE: gl.constexpr, M: gl.constexpr, N: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    EVEN: gl.constexpr, LOWER_RIGHT: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
    SOFTCAP: gl.constexpr, MINE: gl.constexpr,
):  # fmt: skip
    """Compute dQ of 64 rows: scores of the next tile are multiplied while the exponentials of this one are computed."""
    q_desc, do_desc, k_desc, v_desc, dq_desc = descs
    q_bufs, do_bufs, k_bufs, v_bufs = buffers
    q_full, k_full, v_full, k_empty, v_empty = bars
    dtype: gl.constexpr = q_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    zero = gl.zeros([WARPGROUP, N], gl.float32, s_layout)
    dq = gl.zeros([WARPGROUP, SIZE], gl.float32, d_layout)
    first_of_both, batch, head = _query_tile(call, HAS_HIGH)
    first_q, len_q, first_k, all_k, len_k, low, high = sequence(batch, call, LOWER_RIGHT)
    begin, end = keys_of(first_of_both, len_k, low, high, 128, N, HAS_LOW, HAS_HIGH)
    total = end - begin
    first_query = first_of_both + MINE * WARPGROUP
    at_queries = first_query + gl.arange(0, WARPGROUP, layout=gl.SliceLayout(1, s_layout))
    here = rows + gl.cast(first_query_tile(batch, head, first_q, call, M), gl.int64) * M
    lse = gl.load(here + at_queries, mask=at_queries < len_q, other=float("inf"))
    delta = gl.load(here + row_count + at_queries, mask=at_queries < len_q, other=0.0)
    q = q_bufs.index(MINE).reshape([WARPGROUP, SIZE])
    do = do_bufs.index(MINE).reshape([WARPGROUP, SIZE])
    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    keys = k_bufs.index(0).reshape([N, SIZE])
    s_acc = warpgroup_mma(q, keys.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(0), 0)
    values = v_bufs.index(0).reshape([N, SIZE])
    dp_acc = warpgroup_mma(do, values.permute((1, 0)), zero, use_acc=False, is_async=True)
    s, dp = warpgroup_mma_wait(0, deps=(s_acc, dp_acc))
    mbarrier.arrive(v_empty.index(0), count=1)
    for i in range(total):
        of_k = i % K_STAGES
        next_k = (i + 1) % K_STAGES
        next_v = (i + 1) % V_STAGES
        mbarrier.wait(k_full.index(next_k), ((i + 1) // K_STAGES) & 1, pred=i + 1 < total)
        keys = k_bufs.index(next_k).reshape([N, SIZE])
        s_acc = warpgroup_mma(q, keys.permute((1, 0)), zero, use_acc=False, is_async=True)  # the last is not used
        mbarrier.wait(v_full.index(next_v), ((i + 1) // V_STAGES) & 1, pred=i + 1 < total)
        values = v_bufs.index(next_v).reshape([N, SIZE])
        dp_acc = warpgroup_mma(do, values.permute((1, 0)), zero, use_acc=False, is_async=True)
        shifted, slope = shifted_logits(s, lse[:, None], logit_scale, inner_scale, SOFTCAP)
        first_key = (begin + i) * N
        shifted = hidden(
            shifted, first_key, first_query, len_k, low, high, False, EVEN, SOFTCAP, HAS_LOW, HAS_HIGH
        )  # fmt: skip
        ds32 = exp2(shifted) * (dp - delta[:, None])
        if SOFTCAP:
            ds32 = ds32 * slope
        ds = gl.convert_layout(ds32.to(dtype), a_layout, assert_trivial=True)
        dq_acc = warpgroup_mma(ds, k_bufs.index(of_k).reshape([N, SIZE]), dq, is_async=True)
        s, dp, dq, ds = warpgroup_mma_wait(0, deps=(s_acc, dp_acc, dq_acc, ds))
        mbarrier.arrive(v_empty.index(next_v), count=1, pred=i + 1 < total)
        mbarrier.arrive(k_empty.index(of_k), count=1)
    at = coordinates(batch, head, first_query, first_q, len_q, call.cu_q is not None)
    store_gradient(q_bufs.index(MINE), dq * scale, dq_desc, at, SIZE)


@gluon.jit(do_not_specialize=[*RUNTIME, "row_count"])
def query_gradient_kernel(
    q_desc, do_desc, k_desc, v_desc, dq_desc, rows, cu_q, cu_k, used,
    heads, group, num_q, num_k, k_rows, left, right, q_tiles, tiles, columns, section, row_count,
    logit_scale, inner_scale, scale,
    SIZE: gl.constexpr, M: gl.constexpr, N: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    EVEN: gl.constexpr, LOWER_RIGHT: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
    SOFTCAP: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Write dQ of tiles of 128 queries.

    Args are those of `key_gradients_kernel`, and:
        q_desc, do_desc, dq_desc: tiles of 64 rows.
        k_desc, v_desc: tiles of N rows.
        rows: `(2, row_count)`, what `row_desc` describes there, with tiles of M rows.
    """
    dtype: gl.constexpr = q_desc.dtype
    q_bufs = gl.allocate_shared_memory(dtype, [2] + q_desc.block_type.shape, q_desc.layout)
    do_bufs = gl.allocate_shared_memory(dtype, [2] + do_desc.block_type.shape, do_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [K_STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [V_STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    bars = (q_full, barriers(K_STAGES, 1), barriers(V_STAGES, 1), barriers(K_STAGES, 2), barriers(V_STAGES, 2))
    descs = (q_desc, do_desc, k_desc, v_desc, dq_desc)
    buffers = (q_bufs, do_bufs, k_bufs, v_bufs)
    call = Call(
        cu_q, cu_k, used, heads, group, num_q, num_k, k_rows, left, right, q_tiles, tiles, columns, section
    )  # fmt: skip
    RAGGED_K: gl.constexpr = cu_k is not None or used is not None
    gl.warp_specialize(
        [
            (_multiply_queries, (
                descs, buffers, bars, rows, row_count, call, logit_scale, inner_scale, scale, SIZE, M, N,
                K_STAGES, V_STAGES, EVEN, LOWER_RIGHT, HAS_LOW, HAS_HIGH, SOFTCAP, 0,
            )),
            (_multiply_queries, (
                descs, buffers, bars, rows, row_count, call, logit_scale, inner_scale, scale, SIZE, M, N,
                K_STAGES, V_STAGES, EVEN, LOWER_RIGHT, HAS_LOW, HAS_HIGH, SOFTCAP, 1,
            )),
            (_load_for_queries, (
                descs, buffers, bars, call, N, K_STAGES, V_STAGES, RAGGED_K, LOWER_RIGHT, HAS_LOW,
                HAS_HIGH,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
