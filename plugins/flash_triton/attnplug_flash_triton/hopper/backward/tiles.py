"""What programs that have keys share: which keys those are, the warp that loads, and how gradients are written."""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from attnplug_flash_triton.hopper.backward.spans import first_query_tile, queries_of, sequence
from attnplug_flash_triton.hopper.device import WARPGROUP, coordinates, load_tile, schedule, store_tile, store_wait


@gluon.jit
def key_tile(call, taken, HAS_HIGH: gl.constexpr):
    """Return (tile of keys, batch, number within the batch) of this program, which has `taken` query heads."""
    tile, column = schedule(gl.program_id(0), call.tiles, call.columns, call.section, HAS_HIGH)
    if HAS_HIGH:
        tile = call.tiles - 1 - tile  # the first keys are seen by the most queries
    outputs = call.heads // taken
    batch = column // outputs
    return tile, batch, column - batch * outputs


@gluon.jit
def load_for_keys(
    descs, buffers, bars, call, taken, M: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    RAGGED_K: gl.constexpr, LOWER_RIGHT: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
):  # fmt: skip
    """Bring the program's keys and values (64 for each of `GROUPS`), then tile after tile of queries."""
    q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, row_desc, dq_desc = descs
    q_bufs, do_bufs, k_bufs, v_bufs, lse_bufs, delta_bufs = buffers
    kv_full, q_full, do_full, q_empty, do_empty = bars
    RAGGED_Q: gl.constexpr = call.cu_q is not None
    tile, batch, x = key_tile(call, taken, HAS_HIGH)
    first_q, len_q, first_k, all_k, len_k, low, high = sequence(batch, call, LOWER_RIGHT)
    first_key = tile * (GROUPS * WARPGROUP)
    begin, end = queries_of(first_key, len_q, len_k, low, high, GROUPS * WARPGROUP, M, HAS_LOW, HAS_HIGH)
    kv_head = x * taken // call.group
    mbarrier.expect(kv_full, 2 * GROUPS * k_desc.block_type.nbytes)
    for w in gl.static_range(GROUPS):
        place = coordinates(batch, kv_head, first_key + w * WARPGROUP, first_k, len_k, RAGGED_K)
        load_tile(k_desc, place, kv_full, k_bufs.index(w))
        load_tile(v_desc, place, kv_full, v_bufs.index(w))
    done = 0
    for g in range(taken):
        head = x * taken + g
        first_tile = first_query_tile(batch, head, first_q, call, M)
        for j in range(begin, end):
            stage = done % STAGES
            phase = ((done // STAGES) & 1) ^ 1
            at = coordinates(batch, head, j * M, first_q, len_q, RAGGED_Q)
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
def row_of_tile(buf, M: gl.constexpr, layout: gl.constexpr):
    return buf.reshape([M]).load(gl.SliceLayout(0, layout))


@gluon.jit
def barriers(number: gl.constexpr, count: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(bars.index(i), count=count)
    return bars


@gluon.jit
def store_gradient(buf, gradient, desc, at, SIZE: gl.constexpr):
    """Write 64 rows of a gradient through a buffer that nothing reads any more."""
    buf.reshape([WARPGROUP, SIZE]).store(gradient.to(desc.dtype))
    fence_async_shared()
    store_tile(desc, at, buf.reshape(desc.block_type.shape))
    store_wait(0)
