"""The kernel: its arguments, its shared memory and barriers, and which warps do what."""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from attnplug_flash_triton.hopper.device import WARPGROUP
from attnplug_flash_triton.hopper.forward.attend import attend
from attnplug_flash_triton.hopper.forward.loads import load
from attnplug_flash_triton.hopper.forward.records import Call, Outputs, Queue, Ring, Work, configured
from attnplug_flash_triton.hopper.forward.tiles import AHEAD, PLACE

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
        JOINED: where one tile of queries ends, the next begins; see `joined`. It takes OWN_OUT, two Q_STAGES,
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
    places = gl.allocate_shared_memory(gl.int32, [AHEAD * PLACE, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
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

    config: gl.constexpr = configured(
        SIZE, CONSUMERS * WARPGROUP, BLOCK_N, CONSUMERS, STAGES, Q_STAGES, PERSISTENT, OWN_OUT, cu_q is not None,
        cu_k is not None or used is not None, LOWER_RIGHT, HAS_LOW, HAS_HIGH, NEGATE, SOFTCAP, WORDS, JOINED,
    )  # fmt: skip
    call = Call(
        cu_q, cu_k, used, heads, group, num_q, num_k, k_rows, left, right, tiles, columns, section, programs
    )  # fmt: skip
    q, k, v = Ring(q_bufs, q_full, q_empty), Ring(k_bufs, k_full, k_empty), Ring(v_bufs, v_full, v_empty)
    work = Work(q_desc, k_desc, v_desc, o_desc, q, k, v, o_bufs, Queue(places, next_full, next_empty, counter), call)
    outputs = Outputs(lse, sinks, scale, inner_scale, in_order)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [(attend, (work, outputs, 0, config)), (attend, (work, outputs, 1, config)), (load, (work, 1, config))],
            [4, 1],
            [REGISTERS, LOADER_REGISTERS],
        )
    else:  # the warps that load are the first ones, which get the registers that are left over
        gl.warp_specialize(
            [
                (load, (work, 4, config)),
                (attend, (work, outputs, 0, config)),
                (attend, (work, outputs, 1, config)),
                (attend, (work, outputs, 2, config)),
            ],
            [4, 4, 4],
            [REGISTERS, REGISTERS, REGISTERS],
        )
