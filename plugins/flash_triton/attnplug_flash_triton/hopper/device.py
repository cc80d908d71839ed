"""What the kernels for Hopper share on the device: tiles moved by TMA, exponentials, operands of products, barriers.

Written in Gluon, Triton's language with explicit layouts, shared memory and barriers. Its names for the copies of
TMA differ between Triton 3.6 and later releases: `load_tile`, `store_tile` and `reduce_add` are the ones used here.
"""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)

RAGGED_ROWS = gl.constexpr(2**30)
WARPGROUP = gl.constexpr(64)
"""Rows of a product that one warpgroup computes: those of a WGMMA instruction. With fewer, mma.sync takes its place."""

# (descriptor, coordinates, barrier, buffer): start to copy a tile; `barrier` counts the bytes. What lies outside the
# tensor arrives as 0.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
# (descriptor, coordinates, buffer): start to copy a tile; what lies outside is not written. Finished by `store_wait`.
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
store_wait = tma.store_wait


@builtin
def reduce_add(desc, coord, src, _semantic=None):
    """Start to add a tile of shared memory to a tensor in global memory. Finished by `store_wait`."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


@gluon.jit
def exp2(x):
    """2 to the power of x by the special function unit, 0 for -inf; Triton's own adds a case for subnormal results."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def reciprocal(x):
    """1 / x by the special function unit."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def softcapped(x):
    """Return -1 / (1 + 2**x), which is (tanh(y) - 1) / 2 where x = 2 log2(e) y; four elements share a reciprocal.

    From 2**25 on, 1 / (1 + 2**x) is nothing beside 1 in float32: there it ends, so that the product of four is finite.
    There a NaN goes, too, so that it reaches none of the other three, which may be of another row; it comes back last.
    """
    return gl.inline_asm_elementwise(
        _SOFTCAPPED,
        "=f,=f,=f,=f,f,f,f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=4,
    )


_SOFTCAPPED = gl.constexpr(
    "{ .reg .f32 a<4>, n<4>, ab, cd, r, s, t; "
    + " ".join(
        f"ex2.approx.ftz.f32 n{i}, ${4 + i}; sub.f32 n{i}, 0fBF800000, n{i}; max.f32 a{i}, n{i}, 0fCC000000;"
        for i in range(4)
    )
    + " mul.f32 ab, a0, a1; mul.f32 cd, a2, a3; mul.f32 r, ab, cd; rcp.approx.ftz.f32 r, r; "
    "mul.f32 s, r, cd; mul.f32 t, r, ab; "
    "mul.f32 $0, s, a1; mul.f32 $1, s, a0; mul.f32 $2, t, a3; mul.f32 $3, t, a2; "
    + " ".join(f"max.NaN.f32 ${i}, ${i}, n{i};" for i in range(4))
    + " }"
)


@gluon.constexpr_function
def _multiplication(count):
    """Return the assembly of `multiplied_where_needed` for `count` elements of a thread, in pairs of two rows."""
    out, value, factor = (lambda i, n=n: f"${n * count + i}" for n in range(3))
    lines = [f"mov.f32 {out(i)}, {value(i)};" for i in range(count)]
    lines += [
        ".reg .pred p, q;",
        f"setp.neu.f32 p, {factor(0)}, 0f3F800000;",
        f"setp.neu.or.f32 p, {factor(2)}, 0f3F800000, p;",
        "vote.sync.any.pred q, p, 0xffffffff;",
        "@!q bra DONE;",
    ]
    lines += [f"mul.f32 {out(i)}, {value(i)}, {factor(i)};" for i in range(count)]
    return "{ " + " ".join(lines) + " DONE: }"


@gluon.constexpr_function
def _constraints(outputs, floats, integers=0):
    return ",".join(["=f"] * outputs + ["f"] * floats + ["r"] * integers)


@gluon.jit
def multiplied_where_needed(x, factors):
    """Return `x`, an accumulator of products, multiplied by a factor for each row; warps that have only 1 skip it."""
    return gl.inline_asm_elementwise(
        _multiplication(32),
        _constraints(32, 64),
        [x, factors[:, None]],
        dtype=gl.float32,
        is_pure=True,
        pack=32,
    )


@gluon.constexpr_function
def _hiding(count):
    """Return the assembly of `hidden_behind` for `count` elements of a thread, in pairs of two rows."""
    lines = [".reg .pred p;"]
    for i in range(count):
        column = i // 4 * 8 + i % 2
        lines.append(f"setp.gt.s32 p, ${2 * count}, {-column};")
        lines.append(f"selp.f32 ${i}, 0fFF800000, ${count + i}, p;")
    return "{ " + " ".join(lines) + " }"


@gluon.jit
def hidden_behind(x, past):
    """Return products `x`, with -inf in the columns whose `past` is above 0; it rises by 1 from column to column.

    A thread keeps `past` of one column, and not of 32: these do not change from tile to tile, and would be spilled.
    """
    return gl.inline_asm_elementwise(
        _hiding(32),
        _constraints(32, 32, 32),
        [x, past[None, :]],
        dtype=gl.float32,
        is_pure=True,
        pack=32,
    )


@gluon.jit
def hidden_above(x, place, last):
    """Return `x`, with -inf where `place` is above `last`. Triton's own comparison makes bits of it first."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.le.s32 p, $2, $3; selp.f32 $0, $1, 0fFF800000, p; }",
        "=f,f,r,r",
        [x, place, last],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def hidden_below(x, place, first):
    """Return `x`, with -inf where `place` is below `first`."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ge.s32 p, $2, $3; selp.f32 $0, $1, 0fFF800000, p; }",
        "=f,f,r,r",
        [x, place, first],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def above_wait(x, above):
    """Return `x`, computed before the next wait for products.

    ptxas moves such a wait up past arithmetic, so that nothing overlaps, but not past a store. This one is never made:
    `x` is a sum of exponentials, which is not negative, and `above` is not positive, which ptxas cannot know.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a; mov.b32 a, 0; setp.lt.f32 p, $1, $2; @p st.shared.f32 [a], $1; mov.f32 $0, $1; }",
        "=f,f,f",
        [x, above],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def packed(x, dtype: gl.constexpr):
    """Return float32 `x` in 16 bits, two in a word, so that a loop hands it on in words."""
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1]
    low, high = gl.split(gl.reshape(x, [ROWS, COLUMNS // 2, 2]))
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )


@gluon.jit
def as_operand(words, dtype: gl.constexpr, layout: gl.constexpr):
    """Return what `packed` returned as the left operand of a product."""
    ROWS: gl.constexpr = words.shape[0]
    COLUMNS: gl.constexpr = words.shape[1] * 2
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    x = gl.reshape(gl.join(low, high), [ROWS, COLUMNS]).to(dtype, bitcast=True)
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def after_wait(words, waited, in_order):
    """Return `words`, ready after the wait for products that `waited` comes from; both have the same shape.

    ptxas packs probabilities before that wait, while a product still reads the registers of the last ones: then the new
    ones are kept in other registers, and moved. A byte permutation that reads `waited` but takes nothing from it, as
    `in_order` says at run time (0x3210), gives ptxas a reason to wait: 32 registers of a thread are free for other use.
    """
    ROWS: gl.constexpr = words.shape[0]
    COLUMNS: gl.constexpr = words.shape[1]
    x = gl.permute(gl.reshape(words, [ROWS, COLUMNS // 8, 2, 4]), (0, 1, 3, 2))
    x = gl.convert_layout(gl.reshape(x, [ROWS, COLUMNS]), waited.type.layout, assert_trivial=True)
    x = gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,f,r", [x, waited, in_order], dtype=gl.int32, is_pure=True, pack=1
    )
    x = gl.permute(gl.reshape(x, [ROWS, COLUMNS // 8, 4, 2]), (0, 1, 3, 2))
    return gl.convert_layout(gl.reshape(x, [ROWS, COLUMNS]), words.type.layout, assert_trivial=True)


@gluon.jit
def unpacked(words, dtype: gl.constexpr, layout: gl.constexpr):
    """Return what `packed` returned in 32 bits."""
    ROWS: gl.constexpr = words.shape[0]
    COLUMNS: gl.constexpr = words.shape[1] * 2
    if dtype == gl.bfloat16:
        low, high = gl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $2, 16; mov.b32 $0, t; and.b32 t, $2, 0xffff0000; mov.b32 $1, t; }",
            "=f,=f,r",
            [words],
            dtype=(gl.float32, gl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        low, high = gl.inline_asm_elementwise(
            "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }",
            "=f,=f,r",
            [words],
            dtype=(gl.float32, gl.float32),
            is_pure=True,
            pack=1,
        )
    return gl.convert_layout(gl.reshape(gl.join(low, high), [ROWS, COLUMNS]), layout, assert_trivial=True)


@gluon.jit
def schedule(program, tiles, columns, section, LAST_FIRST: gl.constexpr):
    """Return (tile, column) of a program, where a column is a head of a sequence.

    Programs that run at the same time share the keys of `section` columns, few enough for the L2 cache. Where later
    tiles are longer (a causal call), those of all columns of a section come first; else a column's tiles come together.
    """
    first = program // (tiles * section) * section
    rest = program % (tiles * section)
    if LAST_FIRST:
        width = gl.minimum(section, columns - first)
        return tiles - 1 - rest // width, first + rest % width
    else:
        return rest % tiles, first + rest // tiles


@gluon.jit
def coordinates(batch, head, row, first, length, RAGGED: gl.constexpr):
    """Return the coordinates of a tile; a ragged descriptor ends `length` rows after row `first`."""
    if RAGGED:
        return RAGGED_ROWS, first + length, RAGGED_ROWS - length + row, head, 0
    else:
        return batch, head, row, 0
