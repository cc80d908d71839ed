"""What all kernels share: which tiles a tile sees, how tiles are read, and how logits are made.

A kernel works on tiles of queries against tiles of keys. Index tensors `i` (queries) and `j` (keys) are
positions in one sequence, in two dimensions that broadcast, so that the same functions serve tiles of
(queries, keys) and their transposes. Whatever may exceed 32 bits is multiplied in 64.
"""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

NO_MASK = tl.constexpr(0)
BOOLEAN = tl.constexpr(1)
ADDITIVE = tl.constexpr(2)

PART = tl.constexpr(64)


@triton.jit
def schedule(program, tiles, columns, section, LAST_FIRST: tl.constexpr):
    """Return (tile, column) of a program, where a column is a head of a sequence.

    Programs that run at the same time share the keys of `section` columns, few enough for the L2 cache;
    within a section the longest tiles of a causal call come first, so that no long one is left for last.
    """
    first = program // (tiles * section) * section
    rest = program % (tiles * section)
    width = tl.minimum(section, columns - first)
    tile = rest // width
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return tile, first + rest % width


@triton.jit
def sequence(cumulative, used, batch, length):
    """Return (first token, length) of a sequence: from `cumulative` if packed, limited to `used` if given."""
    first = batch * 0
    if cumulative is not None:
        first = tl.load(cumulative + batch)
        length = tl.load(cumulative + batch + 1) - first
    if used is not None:
        length = tl.load(used + batch)
    return first, length


@triton.jit
def span(first, last, length, low, high, BLOCK: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr):
    """Return (begin, inner_begin, inner_end, end) of what positions `first` to `last` see.

    Position `x` sees `x + low` to `x + high` within `0` to `length - 1`. Every tile of `BLOCK` that
    starts from `inner_begin` to before `inner_end` is seen in full by all positions; the tiles before and
    after, from `begin` and to before `end`, in part; all others, not at all.
    """
    begin = 0
    inner_begin = 0
    end = length
    inner_end = length // BLOCK * BLOCK
    if HAS_HIGH:
        end = tl.maximum(tl.minimum(end, last + high + 1), 0)
        inner_end = tl.minimum(inner_end, tl.maximum(first + high + 1, 0) // BLOCK * BLOCK)
    if HAS_LOW:
        begin = tl.maximum(first + low, 0) // BLOCK * BLOCK
        inner_begin = (tl.maximum(last + low, 0) + BLOCK - 1) // BLOCK * BLOCK
        inner_begin = tl.maximum(tl.minimum(inner_begin, (end + BLOCK - 1) // BLOCK * BLOCK), begin)
        inner_end = tl.maximum(inner_end, inner_begin)
    return begin, inner_begin, inner_end, end


@triton.jit
def strides(batch, head, row, ALIGN: tl.constexpr):
    """Return strides in elements from strides in units of `ALIGN` elements.

    The multiplication tells the compiler that rows are aligned, so that it reads them in wide steps; the
    strides themselves are not compiled in.
    """
    return batch.to(tl.int64) * ALIGN, head.to(tl.int64) * ALIGN, row * ALIGN


@triton.jit
def row_pointers(base, stride, start, BLOCK: tl.constexpr):
    """Return pointers (BLOCK,) to rows `start`, `start + 1` ..."""
    return base + tl.cast(start, tl.int64) * stride + tl.arange(0, BLOCK) * stride


@triton.jit
def load_rows(pointers, exists, SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Read (rows, BLOCK_D), zero beyond `SIZE` and in rows that do not exist."""
    d = tl.arange(0, BLOCK_D)[None, :]
    exists = exists[:, None] if SIZE == BLOCK_D else exists[:, None] & (d < SIZE)
    return tl.load(pointers[:, None] + d, mask=exists, other=0.0)


@triton.jit
def store_rows(pointers, exists, tile, SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write what `load_rows` reads."""
    d = tl.arange(0, BLOCK_D)[None, :]
    tile = tile.to(pointers.dtype.element_ty)
    tl.store(pointers[:, None] + d, tile, mask=exists[:, None] & (d < SIZE))


@triton.jit
def key_pointers(base, stride, start, length, table, page_stride, BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Return what `row_pointers` does for keys or values, in pages where there are pages (`PAGE_SIZE` is 0 without)."""
    if PAGE_SIZE == 0:
        return row_pointers(base, stride, start, BLOCK)
    else:
        j = start + tl.arange(0, BLOCK)
        page = tl.load(table + j // PAGE_SIZE, mask=j < length, other=0).to(tl.int64)
        return base + page * page_stride + j % PAGE_SIZE * stride


@triton.jit
def products(
    left, left_rows, left_exists, right, right_rows, right_exists,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return `left @ right.T`, float32; `_rows` are the pointers that the two tiles were read from.

    IEEE products of float32 run on the general units, which keep whole rows of both operands in registers:
    where rows are long, they are read again in parts instead.
    """
    if left.dtype == tl.float32 and PRECISION == "ieee" and BLOCK_D > PART:
        total = tl.zeros([left.shape[0], right.shape[0]], tl.float32)
        for start in tl.range(0, SIZE, PART):
            d = start + tl.arange(0, PART)[None, :]
            some_left = tl.load(left_rows[:, None] + d, mask=left_exists[:, None] & (d < SIZE), other=0.0)
            some_right = tl.load(right_rows[:, None] + d, mask=right_exists[:, None] & (d < SIZE), other=0.0)
            total = tl.dot(some_left, tl.trans(some_right), total, input_precision=PRECISION)
        return total
    else:
        return tl.dot(left, tl.trans(right), input_precision=PRECISION)


@triton.jit
def added(left, right, total, exists, PRECISION: tl.constexpr):
    """Return `total + left @ right`, 0 for rows that do not exist.

    IEEE products of float32 are summed by themselves first. In one chain of thousands of terms of one sign, each rounds
    the whole sum, which the contract's rule for sums does not allow; the condition keeps the compiler from making one.
    """
    if left.dtype == tl.float32 and PRECISION == "ieee":
        return total + tl.where(exists[:, None], tl.dot(left, right, input_precision=PRECISION), 0.0)
    else:
        return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def tanh(x):
    """Tanh to float32's last bits: a quotient of exponentials, and near 0, where that cancels, a polynomial.

    The polynomial is the one of tanhf in the Cephes library, good below 0.625.
    """
    z = x * x
    series = -5.70498872745e-3 * z + 2.06390887954e-2
    series = series * z - 5.37397155531e-2
    series = series * z + 1.33314422036e-1
    series = (series * z - 3.33332819422e-1) * z * x + x
    power = tl.exp2(tl.minimum(tl.abs(x), 10.0, propagate_nan=tl.PropagateNan.ALL) * (2 * LOG2E))
    size = 1.0 - 2.0 / (power + 1.0)
    return tl.where(tl.abs(x) < 0.625, series, tl.where(x < 0, -size, size))


@triton.jit
def is_seen(i, j, len_k, low, high, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr):
    """Whether the query at `i` sees the key at `j`: it exists, and the window reaches it."""
    seen = j < len_k
    if HAS_HIGH:
        seen = seen & (j <= i + high)
    if HAS_LOW:
        seen = seen & (j >= i + low)
    return seen


@triton.jit
def logits(
    qk, i, j, mask_rows, mask_n, slope, scale, softcap, len_q, len_k, offset, low, high,
    edge, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, MASK: tl.constexpr,
    MASK_UNIT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """Return the logits of query positions `i` and key positions `j`, -inf where not seen, and the softcap's tanh.

    Args:
        qk: products of queries and keys, float32.
        mask_rows: pointers to the mask's elements of key 0, for each of `i` (one for all if it has no rows).
        slope: of ALiBi.
        offset: where the diagonal starts; `low` and `high` are the window's bounds, with it added.
        MASK_UNIT: whether the mask's elements of one row stand next to each other, so that `mask_n` is 1.
        edge: whether a bound of the window or of the keys can lie in this tile.
    """
    s = qk * scale
    t = s
    if SOFTCAP:
        t = tanh(s / softcap)
        s = t * softcap
    if ALIBI:
        s -= slope * tl.abs(i + offset - j).to(tl.float32)
    if MASK != NO_MASK:
        exists = (i < len_q) & (j < len_k)
        columns = j if MASK_UNIT else j.to(tl.int64) * mask_n
        elements = tl.load(mask_rows + columns, mask=exists, other=0)
        if MASK == ADDITIVE:
            s += elements.to(tl.float32)
        else:
            s = tl.where(elements != 0, s, float("-inf"))
    if edge:  # the same for a whole tile, so it costs a jump; a loop for the edges alone costs registers
        s = tl.where(is_seen(i, j, len_k, low, high, HAS_LOW, HAS_HIGH), s, float("-inf"))
    return s, t


@triton.jit
def kept(seed, column, i, j, dropout):
    """Whether dropout keeps the probability of query `i` and key `j`: Philox at the counter (j, i, column)."""
    zero = (i + j) * 0
    number, _, _, _ = tl.philox(seed, zero + j, zero + i, zero + column, zero)
    return tl.random.uint_to_uniform_float(number) >= dropout
