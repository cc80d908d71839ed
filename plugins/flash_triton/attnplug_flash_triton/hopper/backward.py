"""The backward kernels for Hopper: one warp that loads by TMA, two warpgroups that multiply.

Scores are held transposed, keys in rows: so probabilities and their gradients come out of one product in the registers
that the next product takes its left operand from. A round of the fused kernel, which is one tile of queries:

    products        dP' = V dO'    dV += P' dO     dK += dS' Q    dQ = dS K    S' = K Q' of the next round
    in registers    P' = exp2(S' - lse)    dS' = P' (dP' - delta)                          dQ -> memory

What is computed in registers overlaps with the product above it. Which kernels run is decided in `gradients.py`:

    rows_kernel                 lse in powers of two, and delta = sum(out * grad_out) - grad_lse, of each row
    key_gradients_kernel        head sizes to 128. A program has 128 keys, a warpgroup 64 of them; both work on the same
                                tile of queries. `FUSED`: they exchange dS in shared memory, compute half of dQ each,
                                and TMA adds it to float32 in global memory; else dK and dV alone
    key_gradients_wide_kernel   to 256. A program has 64 keys; one warpgroup computes S, P and dV, the other dP, dS, dK
    query_gradient_kernel       dQ by itself, where it was not added up: equal bits on repeated runs
    gather_kernel               dQ from the order of registers, in which it was added up, to its place
    add_heads_kernel            the sum over the query heads of a group, where each had a program of its own

FlashAttention-3 (Shah et al., 2024, section 3) has the structure of the fused kernel.
"""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attnplug_flash_triton.hopper.device import (
    WARPGROUP,
    as_operand,
    exp2,
    load_tile,
    packed,
    reduce_add,
    schedule,
    store_tile,
    store_wait,
    unpacked,
)

RAGGED_ROWS = gl.constexpr(2**30)
FAR = gl.constexpr(2**30)
"""A position behind everything that a query can see."""

# Arguments that are not compiled in, so that a kernel is compiled once for all lengths.
RUNTIME = [
    *("heads", "group", "num_q", "num_k", "k_rows", "left", "right", "q_tiles", "tiles", "columns", "section"),
    *("logit_scale", "inner_scale", "scale"),
]


# ------------------------------------------------------------------------------------ sequences, spans and masks


@gluon.jit
def _sequence(batch, lengths, numbers, LOWER_RIGHT: gl.constexpr):
    """Return (first query, queries, first key, keys, keys that exist, low, high) of a sequence.

    Query i sees keys from i + low to i + high.
    """
    cu_q, cu_k, used = lengths
    heads, group, num_q, num_k, k_rows, left, right, q_tiles, tiles, columns, section = numbers
    if cu_q is not None:
        first_q = gl.load(cu_q + batch)
        first_k = gl.load(cu_k + batch)
        len_q = gl.load(cu_q + batch + 1) - first_q
        all_k = gl.load(cu_k + batch + 1) - first_k
    else:
        first_q = batch * 0
        first_k = batch * k_rows
        len_q = num_q
        all_k = num_k
    len_k = gl.load(used + batch) if used is not None else all_k
    offset = len_k - len_q if LOWER_RIGHT else 0
    return first_q, len_q, first_k, all_k, len_k, offset - left, offset + right


@gluon.jit
def _where(batch, head, row, first, length, RAGGED: gl.constexpr):
    """Return the coordinates of a tile; a ragged descriptor ends `length` rows after row `first`."""
    if RAGGED:
        return RAGGED_ROWS, first + length, RAGGED_ROWS - length + row, head, 0
    else:
        return batch, head, row, 0


@gluon.jit
def _first_tile(batch, head, first_q, lengths, numbers, M: gl.constexpr):
    """Return the number of a sequence's first tile of M queries, in what has a place for each."""
    heads, group, num_q, num_k, k_rows, left, right, q_tiles, tiles, columns, section = numbers
    if lengths[0] is not None:
        return head * q_tiles + first_q // M + batch  # a sequence may begin and end within a tile
    else:
        return (batch * heads + head) * q_tiles


@gluon.jit
def _queries_of(
    first_key, len_q, len_k, low, high, KEYS: gl.constexpr, M: gl.constexpr, HAS_LOW: gl.constexpr,
    HAS_HIGH: gl.constexpr,
):  # fmt: skip
    """Return (begin, end) of the tiles of queries that see any of `KEYS` keys."""
    begin = 0
    end = len_q
    if HAS_HIGH:
        begin = gl.maximum(first_key - high, 0) // M
    if HAS_LOW:
        end = gl.maximum(gl.minimum(end, gl.minimum(first_key + KEYS, len_k) - low), 0)
    end = gl.maximum((end + M - 1) // M, begin)
    return begin, gl.where(first_key < len_k, end, begin)


@gluon.jit
def _keys_of(
    first_query, len_k, low, high, QUERIES: gl.constexpr, N: gl.constexpr, HAS_LOW: gl.constexpr,
    HAS_HIGH: gl.constexpr,
):  # fmt: skip
    """Return (begin, end) of the tiles of keys that any of `QUERIES` queries sees, at least one tile."""
    begin = 0
    end = len_k
    if HAS_HIGH:
        end = gl.minimum(end, first_query + QUERIES + high)
    if HAS_LOW:
        begin = gl.maximum(first_query + low, 0) // N
    return begin, gl.maximum((end + N - 1) // N, begin + 1)


@gluon.jit
def _on_edge(
    first_key, first_query, len_k, low, high, KEYS: gl.constexpr, QUERIES: gl.constexpr, HAS_LOW: gl.constexpr,
    HAS_HIGH: gl.constexpr,
):  # fmt: skip
    """Whether not every one of some queries sees every one of some keys."""
    edge = first_key + KEYS > len_k
    if HAS_HIGH:
        edge = edge | (first_query + high < first_key + KEYS - 1)
    if HAS_LOW:
        edge = edge | (first_query + QUERIES - 1 + low > first_key)
    return edge


@gluon.jit
def _masked(
    x, first_key, first_query, len_k, low, high, KEYS_IN_ROWS: gl.constexpr, HAS_LOW: gl.constexpr,
    HAS_HIGH: gl.constexpr,
):  # fmt: skip
    """Return `x`, -inf where a query does not see a key."""
    layout: gl.constexpr = x.type.layout
    rows = gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, layout))[:, None]
    columns = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, layout))[None, :]
    if KEYS_IN_ROWS:
        keys = first_key + rows
        queries = first_query + columns
    else:
        keys = first_key + columns
        queries = first_query + rows
    keys = gl.where(keys < len_k, keys, FAR)
    seen = keys <= queries + high if HAS_HIGH else keys < FAR
    if HAS_LOW:
        seen = seen & (keys >= queries + low)
    return gl.where(seen, x, float("-inf"))


@gluon.jit
def _hide(
    x, first_key, first_query, len_k, low, high, KEYS_IN_ROWS: gl.constexpr, EVEN: gl.constexpr,
    SOFTCAP: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
):  # fmt: skip
    """Return `x`, -inf where a query does not see a key. `SOFTCAP`: in every tile, since a branch takes registers."""
    KEYS: gl.constexpr = x.shape[0] if KEYS_IN_ROWS else x.shape[1]
    QUERIES: gl.constexpr = x.shape[1] if KEYS_IN_ROWS else x.shape[0]
    if EVEN:
        return x
    elif SOFTCAP:
        return _masked(x, first_key, first_query, len_k, low, high, KEYS_IN_ROWS, HAS_LOW, HAS_HIGH)
    else:
        if _on_edge(first_key, first_query, len_k, low, high, KEYS, QUERIES, HAS_LOW, HAS_HIGH):
            x = _masked(x, first_key, first_query, len_k, low, high, KEYS_IN_ROWS, HAS_LOW, HAS_HIGH)
        return x


@gluon.jit
def _shifted(s, lse, logit_scale, inner_scale, SOFTCAP: gl.constexpr):
    """Return (logits less lse, in powers of two; the derivative of the softcap)."""
    if SOFTCAP:
        tanh = 1.0 - 2.0 / (exp2(s * inner_scale) + 1.0)
        return tanh * logit_scale - lse, 1.0 - tanh * tanh
    else:
        return s * logit_scale - lse, 1.0


# ----------------------------------------------------------------------------- a tile of keys: how it is brought


@gluon.jit
def _place(numbers, taken, HAS_HIGH: gl.constexpr):
    """Return (tile of keys, batch, number within the batch) of this program, which has `taken` query heads."""
    heads, group, num_q, num_k, k_rows, left, right, q_tiles, tiles, columns, section = numbers
    tile, column = schedule(gl.program_id(0), tiles, columns, section, HAS_HIGH)
    if HAS_HIGH:
        tile = tiles - 1 - tile  # the first keys are seen by the most queries
    outputs = heads // taken
    batch = column // outputs
    return tile, batch, column - batch * outputs


@gluon.jit
def _load_for_keys(
    descs, buffers, bars, lengths, numbers, taken, M: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    RAGGED_K: gl.constexpr, LOWER_RIGHT: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
):  # fmt: skip
    """Bring the program's keys and values (64 for each of `GROUPS`), then tile after tile of queries."""
    q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, row_desc, dq_desc = descs
    q_bufs, do_bufs, k_bufs, v_bufs, lse_bufs, delta_bufs = buffers
    kv_full, q_full, do_full, q_empty, do_empty = bars
    RAGGED_Q: gl.constexpr = lengths[0] is not None
    tile, batch, x = _place(numbers, taken, HAS_HIGH)
    first_q, len_q, first_k, all_k, len_k, low, high = _sequence(batch, lengths, numbers, LOWER_RIGHT)
    first_key = tile * (GROUPS * WARPGROUP)
    begin, end = _queries_of(first_key, len_q, len_k, low, high, GROUPS * WARPGROUP, M, HAS_LOW, HAS_HIGH)
    kv_head = x * taken // numbers[1]
    mbarrier.expect(kv_full, 2 * GROUPS * k_desc.block_type.nbytes)
    for w in gl.static_range(GROUPS):
        place = _where(batch, kv_head, first_key + w * WARPGROUP, first_k, len_k, RAGGED_K)
        load_tile(k_desc, place, kv_full, k_bufs.index(w))
        load_tile(v_desc, place, kv_full, v_bufs.index(w))
    done = 0
    for g in range(taken):
        head = x * taken + g
        first_tile = _first_tile(batch, head, first_q, lengths, numbers, M)
        for j in range(begin, end):
            stage = done % STAGES
            phase = ((done // STAGES) & 1) ^ 1
            at = _where(batch, head, j * M, first_q, len_q, RAGGED_Q)
            mbarrier.wait(q_empty.index(stage), phase)
            mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes + row_desc.block_type.nbytes)
            load_tile(q_desc, at, q_full.index(stage), q_bufs.index(stage))
            load_tile(row_desc, [0, (first_tile + j) * M], q_full.index(stage), lse_bufs.index(stage))
            mbarrier.wait(do_empty.index(stage), phase)
            mbarrier.expect(do_full.index(stage), do_desc.block_type.nbytes + row_desc.block_type.nbytes)
            load_tile(do_desc, at, do_full.index(stage), do_bufs.index(stage))
            load_tile(row_desc, [1, (first_tile + j) * M], do_full.index(stage), delta_bufs.index(stage))
            done += 1


@gluon.jit
def _row(buf, M: gl.constexpr, layout: gl.constexpr):
    return buf.reshape([M]).load(gl.SliceLayout(0, layout))


@gluon.jit
def _bars(number: gl.constexpr, count: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(bars.index(i), count=count)
    return bars


@gluon.jit
def _store(buf, gradient, desc, at, SIZE: gl.constexpr):
    """Write 64 rows of a gradient through a buffer that nothing reads any more."""
    buf.reshape([WARPGROUP, SIZE]).store(gradient.to(desc.dtype))
    fence_async_shared()
    store_tile(desc, at, buf.reshape(desc.block_type.shape))
    store_wait(0)


# ------------------------------------------------------------------------------------------- head sizes to 128


@gluon.jit
def _in_order_of_registers(x):
    """Return a product's result of 64 rows, flat, so that four values of a thread are next to each other."""
    COLUMNS: gl.constexpr = x.shape[1]
    x = gl.permute(gl.reshape(x, [4, 2, 8, COLUMNS // 8, 4, 2]), [3, 0, 2, 4, 1, 5])
    return gl.reshape(x, [COLUMNS // 4, 256])


@gluon.jit
def _multiply(
    descs, buffers, ds_bufs, dq_bufs, bars, ds_full, lengths, numbers, taken, logit_scale, inner_scale, scale,
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

    tile, batch, x = _place(numbers, taken, HAS_HIGH)
    first_q, len_q, first_k, all_k, len_k, low, high = _sequence(batch, lengths, numbers, LOWER_RIGHT)
    begin, end = _queries_of(tile * 128, len_q, len_k, low, high, 128, M, HAS_LOW, HAS_HIGH)
    first_key = tile * 128 + MINE * WARPGROUP
    total = (end - begin) * taken
    j = begin
    first_tile = _first_tile(batch, x * taken, first_q, lengths, numbers, M)
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
        lse = _row(lse_bufs.index(stage), M, s_layout)
        shifted, slope = _shifted(s, lse[None, :], logit_scale, inner_scale, SOFTCAP)
        shifted = _hide(shifted, first_key, j * M, len_k, low, high, True, EVEN, SOFTCAP, HAS_LOW, HAS_HIGH)
        p32 = exp2(shifted)
        words = packed(p32, dtype)
        p = as_operand(words, dtype, a_layout)
        if SOFTCAP:
            words = packed(p32 * slope, dtype)
        dv_acc = warpgroup_mma(p, do, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp_acc,))
        delta = _row(delta_bufs.index(stage), M, s_layout)
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
            first_tile += numbers[7]
    at = _where(batch, x, first_key, first_k, all_k, lengths[1] is not None)
    result = v_bufs.index(MINE)  # these values were read by this warpgroup alone
    _store(result, dv, dv_desc, at, SIZE)
    _store(result, dk * scale, dk_desc, at, SIZE)


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
    q_full = _bars(STAGES, 1)
    do_full = _bars(STAGES, 1)
    empty = _bars(STAGES, 2)  # both operands of a round are released together
    ds_full = _bars(4, 1)
    descs = (q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, row_desc, dq_desc)
    buffers = (q_bufs, do_bufs, k_bufs, v_bufs, lse_bufs, delta_bufs)
    bars = (kv_full, q_full, do_full, empty, empty)
    lengths = (cu_q, cu_k, used)
    numbers = (heads, group, num_q, num_k, k_rows, left, right, q_tiles, tiles, columns, section)
    RAGGED_K: gl.constexpr = cu_k is not None or used is not None
    gl.warp_specialize(
        [
            (_multiply, (
                descs, buffers, ds_bufs, dq_bufs, bars, ds_full, lengths, numbers, taken, logit_scale, inner_scale,
                scale, M, SIZE, STAGES, FUSED, EVEN, RAGGED_K, LOWER_RIGHT, HAS_LOW, HAS_HIGH, SOFTCAP, 0,
            )),
            (_multiply, (
                descs, buffers, ds_bufs, dq_bufs, bars, ds_full, lengths, numbers, taken, logit_scale, inner_scale,
                scale, M, SIZE, STAGES, FUSED, EVEN, RAGGED_K, LOWER_RIGHT, HAS_LOW, HAS_HIGH, SOFTCAP, 1,
            )),
            (_load_for_keys, (
                descs, buffers, bars, lengths, numbers, taken, M, 2, STAGES, RAGGED_K, LOWER_RIGHT, HAS_LOW, HAS_HIGH,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- head sizes to 256


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
    descs, buffers, p_bufs, bars, p_full, lengths, numbers, taken, logit_scale, inner_scale,
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

    tile, batch, x = _place(numbers, taken, HAS_HIGH)
    first_q, len_q, first_k, all_k, len_k, low, high = _sequence(batch, lengths, numbers, LOWER_RIGHT)
    first_key = tile * WARPGROUP
    begin, end = _queries_of(first_key, len_q, len_k, low, high, WARPGROUP, M, HAS_LOW, HAS_HIGH)
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
        lse = _row(lse_bufs.index(stage), M, s_layout)
        shifted, slope = _shifted(s, lse[None, :], logit_scale, inner_scale, SOFTCAP)
        shifted = _hide(shifted, first_key, j * M, len_k, low, high, True, EVEN, SOFTCAP, HAS_LOW, HAS_HIGH)
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
    at = _where(batch, x, first_key, first_k, all_k, lengths[1] is not None)
    _store(k_bufs.index(0), dv, dv_desc, at, SIZE)  # of keys, which the other warpgroup does not read


@gluon.jit
def _multiply_keys(
    descs, buffers, p_bufs, bars, p_full, lengths, numbers, taken, scale,
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

    tile, batch, x = _place(numbers, taken, HAS_HIGH)
    first_q, len_q, first_k, all_k, len_k, low, high = _sequence(batch, lengths, numbers, LOWER_RIGHT)
    first_key = tile * WARPGROUP
    begin, end = _queries_of(first_key, len_q, len_k, low, high, WARPGROUP, M, HAS_LOW, HAS_HIGH)
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
        delta = _row(delta_bufs.index(stage), M, s_layout)
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
    at = _where(batch, x, first_key, first_k, all_k, lengths[1] is not None)
    _store(v_bufs.index(0), dk * scale, dk_desc, at, SIZE)  # of values, likewise


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
    bars = (kv_full, _bars(STAGES, 1), _bars(STAGES, 1), _bars(STAGES, 2), _bars(STAGES, 2))
    p_full = _bars(2, 1)
    descs = (q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, row_desc, row_desc)
    buffers = (q_bufs, do_bufs, k_bufs, v_bufs, lse_bufs, delta_bufs)
    lengths = (cu_q, cu_k, used)
    numbers = (heads, group, num_q, num_k, k_rows, left, right, q_tiles, tiles, columns, section)
    RAGGED_K: gl.constexpr = cu_k is not None or used is not None
    gl.warp_specialize(
        [
            (_multiply_values, (
                descs, buffers, p_bufs, bars, p_full, lengths, numbers, taken, logit_scale, inner_scale, SIZE,
                STAGES, EVEN, LOWER_RIGHT, HAS_LOW, HAS_HIGH, SOFTCAP,
            )),
            (_multiply_keys, (
                descs, buffers, p_bufs, bars, p_full, lengths, numbers, taken, scale, SIZE, STAGES, LOWER_RIGHT,
                HAS_LOW, HAS_HIGH,
            )),
            (_load_for_keys, (
                descs, buffers, bars, lengths, numbers, taken, 64, 1, STAGES, RAGGED_K, LOWER_RIGHT, HAS_LOW,
                HAS_HIGH,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- dQ by itself


@gluon.jit
def _query_tile(numbers, HAS_HIGH: gl.constexpr):
    """Return (first query, batch, head) of this program."""
    heads, group, num_q, num_k, k_rows, left, right, q_tiles, tiles, columns, section = numbers
    tile, column = schedule(gl.program_id(0), tiles, columns, section, HAS_HIGH)
    batch = column // heads
    return tile * 128, batch, column - batch * heads


@gluon.jit
def _load_for_queries(
    descs, buffers, bars, lengths, numbers, N: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    RAGGED_K: gl.constexpr, LOWER_RIGHT: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
):  # fmt: skip
    """Bring the program's 128 queries, then tile after tile of keys and values."""
    q_desc, do_desc, k_desc, v_desc, dq_desc = descs
    q_bufs, do_bufs, k_bufs, v_bufs = buffers
    q_full, k_full, v_full, k_empty, v_empty = bars
    RAGGED_Q: gl.constexpr = lengths[0] is not None
    first_query, batch, head = _query_tile(numbers, HAS_HIGH)
    first_q, len_q, first_k, all_k, len_k, low, high = _sequence(batch, lengths, numbers, LOWER_RIGHT)
    begin, end = _keys_of(first_query, len_k, low, high, 128, N, HAS_LOW, HAS_HIGH)
    kv_head = head // numbers[1]
    mbarrier.expect(q_full, 4 * q_desc.block_type.nbytes)
    for w in gl.static_range(2):
        place = _where(batch, head, first_query + w * WARPGROUP, first_q, len_q, RAGGED_Q)
        load_tile(q_desc, place, q_full, q_bufs.index(w))
        load_tile(do_desc, place, q_full, do_bufs.index(w))
    for i in range(end - begin):
        at = _where(batch, kv_head, (begin + i) * N, first_k, len_k, RAGGED_K)
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
    descs, buffers, bars, rows, row_count, lengths, numbers, logit_scale, inner_scale, scale,
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
    first_of_both, batch, head = _query_tile(numbers, HAS_HIGH)
    first_q, len_q, first_k, all_k, len_k, low, high = _sequence(batch, lengths, numbers, LOWER_RIGHT)
    begin, end = _keys_of(first_of_both, len_k, low, high, 128, N, HAS_LOW, HAS_HIGH)
    total = end - begin
    first_query = first_of_both + MINE * WARPGROUP
    at_queries = first_query + gl.arange(0, WARPGROUP, layout=gl.SliceLayout(1, s_layout))
    here = rows + gl.cast(_first_tile(batch, head, first_q, lengths, numbers, M), gl.int64) * M
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
        shifted, slope = _shifted(s, lse[:, None], logit_scale, inner_scale, SOFTCAP)
        first_key = (begin + i) * N
        shifted = _hide(
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
    at = _where(batch, head, first_query, first_q, len_q, lengths[0] is not None)
    _store(q_bufs.index(MINE), dq * scale, dq_desc, at, SIZE)


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
    bars = (q_full, _bars(K_STAGES, 1), _bars(V_STAGES, 1), _bars(K_STAGES, 2), _bars(V_STAGES, 2))
    descs = (q_desc, do_desc, k_desc, v_desc, dq_desc)
    buffers = (q_bufs, do_bufs, k_bufs, v_bufs)
    lengths = (cu_q, cu_k, used)
    numbers = (heads, group, num_q, num_k, k_rows, left, right, q_tiles, tiles, columns, section)
    RAGGED_K: gl.constexpr = cu_k is not None or used is not None
    gl.warp_specialize(
        [
            (_multiply_queries, (
                descs, buffers, bars, rows, row_count, lengths, numbers, logit_scale, inner_scale, scale, SIZE, M, N,
                K_STAGES, V_STAGES, EVEN, LOWER_RIGHT, HAS_LOW, HAS_HIGH, SOFTCAP, 0,
            )),
            (_multiply_queries, (
                descs, buffers, bars, rows, row_count, lengths, numbers, logit_scale, inner_scale, scale, SIZE, M, N,
                K_STAGES, V_STAGES, EVEN, LOWER_RIGHT, HAS_LOW, HAS_HIGH, SOFTCAP, 1,
            )),
            (_load_for_queries, (
                descs, buffers, bars, lengths, numbers, N, K_STAGES, V_STAGES, RAGGED_K, LOWER_RIGHT, HAS_LOW,
                HAS_HIGH,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- before and after


@triton.jit(do_not_specialize=["blocks", "heads", "num_q", "q_tiles", "row_count"])
def rows_kernel(
    out, grad_out, lse, grad_lse, rows, delta, cu_q,
    blocks, heads, num_q, q_tiles, row_count, out_batch, out_head, out_row, grad_batch, grad_head, grad_row,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write lse in powers of two and delta of `BLOCK` rows of a head to where tiles of M queries find them.

    A row that saw no key gets lse inf, which makes its probabilities 0, and so do rows of the last tile that do not
    exist. `delta` gets the deltas in the order of `lse`: `(B, heads, num_q)`, or `(heads, tokens)` with `cu_q`.
    """
    block, column = tl.program_id(0) % blocks, tl.cast(tl.program_id(0) // blocks, tl.int64)
    batch, head = column // heads, column % heads
    if cu_q is None:
        first, length = 0, num_q
        of_lse, tile = column * num_q, column * q_tiles
    else:
        first = tl.load(cu_q + batch)
        length = tl.load(cu_q + batch + 1) - first
        of_lse, tile = head * num_q + first, head * q_tiles + first // M + batch
        batch = tl.cast(0, tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    exists, d = at < length, tl.arange(0, BLOCK_D)
    seen = exists[:, None] & (d < SIZE)[None, :]
    row = tl.cast(first + at, tl.int64)[:, None]
    o = tl.load(out + batch * out_batch + head * out_head + row * out_row + d[None, :], mask=seen, other=0.0)
    do = tl.load(grad_out + batch * grad_batch + head * grad_head + row * grad_row + d[None, :], mask=seen, other=0.0)
    total = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if grad_lse is not None:
        total -= tl.load(grad_lse + of_lse + at, mask=exists, other=0.0)
    tl.store(delta + of_lse + at, total, mask=exists)
    shift = tl.load(lse + of_lse + at, mask=exists, other=float("inf")) * 1.4426950408889634
    shift = tl.where(shift == float("-inf"), float("inf"), shift)
    has_place = at < (length + M - 1) // M * M
    tl.store(rows + tile * M + at, shift, mask=has_place)
    tl.store(rows + row_count + tile * M + at, total, mask=has_place)


@triton.jit(do_not_specialize=["halves", "heads", "num_q", "q_tiles", "scale"])
def gather_kernel(
    sums, dq, cu_q, halves, heads, num_q, q_tiles, dq_batch, dq_head, dq_row, scale,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Write dQ from the two halves of a tile, which are in the order of registers: see `_in_order_of_registers`."""
    PART: tl.constexpr = M * BLOCK_D // 128
    at_half, column = tl.program_id(0) % halves, tl.cast(tl.program_id(0) // halves, tl.int64)
    tile, half = at_half // 2, at_half % 2
    batch, head = column // heads, column % heads
    if cu_q is None:
        first, length = 0, num_q
        place = column * q_tiles + tile
    else:
        first = tl.load(cu_q + batch)
        length = tl.load(cu_q + batch + 1) - first
        place = head * q_tiles + first // M + batch + tile
        batch = tl.cast(0, tl.int64)
    if tile * M < length:
        x = tl.load(sums + (place * 2 + half) * (64 * PART) + tl.arange(0, 64 * PART))
        x = tl.permute(tl.reshape(x, [PART // 8, 4, 8, 4, 2, 2]), [1, 4, 2, 0, 3, 5])
        x = tl.reshape(x, [64, PART]) * scale
        at, d = tile * M + tl.arange(0, 64), tl.arange(0, PART)
        if M == 128:
            at += half * 64
        else:
            d += half * PART
        row = tl.cast(first + at, tl.int64)[:, None]
        to = dq + batch * dq_batch + head * dq_head + row * dq_row + d[None, :]
        tl.store(to, x.to(dq.dtype.element_ty), mask=(at < length)[:, None] & (d < SIZE)[None, :])


@triton.jit(do_not_specialize=["blocks", "heads", "num_k", "group", "scale"])
def add_heads_kernel(
    parts, grad, blocks, heads, num_k, group, part_batch, part_head, part_row, grad_batch, grad_head, grad_row,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sum of the `group` gradients that query heads have for each of `heads` heads of keys or values."""
    block, column = tl.program_id(0) % blocks, tl.cast(tl.program_id(0) // blocks, tl.int64)
    batch, head = column // heads, column % heads
    row = tl.cast(block * BLOCK + tl.arange(0, BLOCK), tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    exists = (row < num_k) & (d < SIZE)
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for member in range(group):
        at = batch * part_batch + (head * group + member) * part_head + row * part_row + d
        total += tl.load(parts + at, mask=exists, other=0.0).to(tl.float32)
    to = grad + batch * grad_batch + head * grad_head + row * grad_row + d
    tl.store(to, total.to(grad.dtype.element_ty), mask=exists)
