"""The backward kernels: the gradient of the query, then those of keys and values.

Probabilities are computed again from the rows' statistics, as in FlashAttention-2. Each gradient has a
kernel of its own, whose programs own what they write: no atomic addition, so equal bits on repeated runs.
With grouped queries, one program sums over the query heads that share its keys.
"""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
import triton
import triton.language as tl

from attnplug_flash_triton.forward import RUNTIME
from attnplug_flash_triton.tiles import (
    LOG2E,
    NO_MASK,
    added,
    kept,
    load_rows,
    logits,
    products,
    row_pointers,
    schedule,
    sequence,
    span,
    store_rows,
    strides,
)


@triton.jit
def load_statistics(shifts, totals, at, exists, FOLDED: tl.constexpr):
    """Return what is subtracted from each row's logits, in their unit, and what the exponential is multiplied by.

    A row that saw no key gets inf, which makes its probabilities 0, as do rows that do not exist.
    `shifts` is the lse; or the maximum, where `totals` has the sum: in float32 the lse's rounding would
    show, and where an additive mask makes all logits of a row as low as a finite number can be, their lse
    has no digits left for the sum.
    """
    shift = tl.load(shifts + at, mask=exists, other=float("inf"))
    shift = tl.where(shift == float("-inf"), float("inf"), shift)
    inverse = 1.0
    if totals is not None:
        total = tl.load(totals + at, mask=exists, other=1.0)
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    return shift * LOG2E if FOLDED else shift, inverse


@triton.jit
def gradient_of_logits(
    qk, grad_p, i, j, column, mask, mask_n, slope, shift, inverse, delta, scale, softcap, dropout, keep_scale, seed,
    len_q, len_k, offset, low, high,
    edge, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, MASK: tl.constexpr,
    MASK_UNIT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, FOLDED: tl.constexpr,
    OF_MASK: tl.constexpr = False,
):  # fmt: skip
    """Return (probabilities after dropout, gradient of `scale * q @ k.T`) of one tile.

    `p * (grad_p - delta)`, where `delta` is the row's sum of `p * grad_p`; the softcap's derivative is
    `1 - tanh^2`. With `OF_MASK`, the gradient of what the mask was added to, which comes after the softcap.
    """
    s, t = logits(
        qk, i, j, mask, mask_n, slope, scale, softcap, len_q, len_k, offset, low, high,
        edge, HAS_LOW, HAS_HIGH, MASK, MASK_UNIT, SOFTCAP, ALIBI,
    )  # fmt: skip
    p = tl.exp2(s - shift if FOLDED else (s - shift) * LOG2E) * inverse
    dropped = p
    if DROPOUT:
        factor = tl.where(kept(seed, column, i, j, dropout), keep_scale, 0.0)
        dropped = p * factor
        grad_p = grad_p * factor
    grad = p * (grad_p - delta)
    if SOFTCAP and not OF_MASK:
        grad *= 1.0 - t * t
    return dropped, grad


BACKWARD_RUNTIME = [*RUNTIME, "grad_out_batch", "grad_out_head", "grad_out_row", "keep_scale", "factor"]


@triton.jit(do_not_specialize=[*BACKWARD_RUNTIME, "grad_q_batch", "grad_q_head", "grad_q_row"])
def query_gradient_kernel(
    q, k, v, mask, slopes, used, cu_q, cu_k, table, seed_at,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_m, mask_n, slopes_batch, table_batch,
    heads, group, num_q, num_k, scale, softcap, dropout, left, right, tiles, columns, section,
    grad_out, grad_out_batch, grad_out_head, grad_out_row, shifts, totals, delta, keep_scale, factor,
    out, grad_lse, grad_q, grad_q_batch, grad_q_head, grad_q_row,
    LOWER_RIGHT: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr, MASK_UNIT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    FOLDED: tl.constexpr, ALIGN: tl.constexpr, SIZE: tl.constexpr, SIZE_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the query's gradient of one tile of rows, and their delta, which the other kernels read.

    `delta = sum(out * grad_out) - grad_lse`: for a row, the sum of `p * grad_p`, less what reaches the
    logits through lse. `factor` is the true scale, where `scale` may have log2(e) in it.
    """
    tile, column = schedule(tl.program_id(0), tiles, columns, section, HAS_HIGH)
    batch, head = column // heads, column % heads
    first_q, len_q = sequence(cu_q, None, batch, num_q)
    first_k, len_k = sequence(cu_k, used, batch, num_k)
    start_m = tile * BLOCK_M
    if start_m >= len_q:
        return

    offset = len_k - len_q if LOWER_RIGHT else 0
    low, high = offset - left, offset + right
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    kv_head, first_q = head // group, first_q.to(tl.int64)
    q_batch, q_head, q_row = strides(q_batch, q_head, q_row, ALIGN)
    k_batch, k_head, k_row = strides(k_batch, k_head, k_row, ALIGN)
    v_batch, v_head, v_row = strides(v_batch, v_head, v_row, ALIGN)
    grad_out_batch, grad_out_head, grad_out_row = strides(grad_out_batch, grad_out_head, grad_out_row, ALIGN)
    grad_q_batch, grad_q_head, grad_q_row = strides(grad_q_batch, grad_q_head, grad_q_row, ALIGN)
    q += batch * q_batch + head * q_head + first_q * q_row
    k += batch * k_batch + kv_head * k_head + first_k.to(tl.int64) * k_row
    v += batch * v_batch + kv_head * v_head + first_k.to(tl.int64) * v_row
    grad_out += batch * grad_out_batch + head * grad_out_head + first_q * grad_out_row
    grad_q += batch * grad_q_batch + head * grad_q_head + first_q * grad_q_row
    row = start_m + tl.arange(0, BLOCK_M)
    exists, i = row < len_q, row[:, None]
    if cu_q is None:
        statistics = (batch * heads + head) * num_q + row
        out_rows = out + statistics * SIZE_V
    else:
        statistics = head * num_q + first_q + row
        out_rows = out + ((first_q + row) * heads + head) * SIZE_V

    grad_out_rows = row_pointers(grad_out, grad_out_row, start_m, BLOCK_M)
    grad_out_tile = load_rows(grad_out_rows, exists, SIZE_V, BLOCK_DV)
    out_tile = load_rows(out_rows, exists, SIZE_V, BLOCK_DV)
    delta_row = tl.sum(out_tile.to(tl.float32) * grad_out_tile.to(tl.float32), 1)
    if grad_lse is not None:
        delta_row -= tl.load(grad_lse + statistics, mask=exists, other=0.0)
    tl.store(delta + statistics, delta_row, mask=exists)
    shift, inverse = load_statistics(shifts, totals, statistics, exists, FOLDED)
    if totals is not None:
        inverse = inverse[:, None]

    q_rows = row_pointers(q, q_row, start_m, BLOCK_M)
    query = load_rows(q_rows, exists, SIZE, BLOCK_D)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + batch * slopes_batch + head).to(tl.float32)
    if MASK != NO_MASK:
        mask += batch * mask_batch + head * mask_head
        if MASK_ROWS:
            mask += i.to(tl.int64) * mask_m
    seed = tl.load(seed_at) if DROPOUT else 0

    grad = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, inner_begin, inner_end, end = span(
        start_m, tl.minimum(start_m + BLOCK_M, len_q) - 1, len_k, low, high, BLOCK_N, HAS_LOW, HAS_HIGH
    )
    for start in tl.range(begin, end, BLOCK_N):
        j = (start + tl.arange(0, BLOCK_N))[None, :]
        edge = (start < inner_begin) | (start >= inner_end) if HAS_LOW else start >= inner_end
        k_rows, v_rows = row_pointers(k, k_row, start, BLOCK_N), row_pointers(v, v_row, start, BLOCK_N)
        there = start + tl.arange(0, BLOCK_N) < len_k
        key = load_rows(k_rows, there, SIZE, BLOCK_D)
        value = load_rows(v_rows, there, SIZE_V, BLOCK_DV)
        qk = products(query, q_rows, exists, key, k_rows, there, SIZE, BLOCK_D, PRECISION)
        grad_p = products(
            grad_out_tile, grad_out_rows, exists, value, v_rows, there, SIZE_V, BLOCK_DV, PRECISION
        )  # fmt: skip
        _, grad_logits = gradient_of_logits(
            qk, grad_p, i, j, column, mask, mask_n, slope, shift[:, None], inverse, delta_row[:, None],
            scale, softcap, dropout, keep_scale, seed, len_q, len_k, offset, low, high,
            edge, HAS_LOW, HAS_HIGH, MASK, MASK_UNIT, SOFTCAP, ALIBI, DROPOUT, FOLDED,
        )  # fmt: skip
        grad = tl.dot(grad_logits.to(key.dtype), key, grad, input_precision=PRECISION)
    store_rows(row_pointers(grad_q, grad_q_row, start_m, BLOCK_M), exists, grad * factor, SIZE, BLOCK_D)


@triton.jit(
    do_not_specialize=[
        *BACKWARD_RUNTIME,
        *("grad_k_batch", "grad_k_head", "grad_k_row", "grad_v_batch", "grad_v_head", "grad_v_row"),
    ]
)
def key_value_gradient_kernel(
    q, k, v, mask, slopes, used, cu_q, cu_k, table, seed_at,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_m, mask_n, slopes_batch, table_batch,
    heads, group, num_q, num_k, scale, softcap, dropout, left, right, tiles, columns, section,
    grad_out, grad_out_batch, grad_out_head, grad_out_row, shifts, totals, delta, keep_scale, factor,
    grad_k, grad_v, grad_k_batch, grad_k_head, grad_k_row, grad_v_batch, grad_v_head, grad_v_row,
    LOWER_RIGHT: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr, MASK_UNIT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    FOLDED: tl.constexpr, ALIGN: tl.constexpr, SIZE: tl.constexpr, SIZE_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one tile of keys and values. A column is one (batch, head of keys).

    Keys beyond the used length get zero, and no product sees what memory holds there.
    """
    tile, column = schedule(tl.program_id(0), tiles, columns, section, False)
    batch, kv_head = column // (heads // group), column % (heads // group)
    first_q, len_q = sequence(cu_q, None, batch, num_q)
    first_k, all_k = sequence(cu_k, None, batch, num_k)
    _, len_k = sequence(cu_k, used, batch, num_k)
    start_n = tile * BLOCK_N
    if start_n >= all_k:
        return

    offset = len_k - len_q if LOWER_RIGHT else 0
    low, high = offset - left, offset + right
    batch32, first_head = batch, kv_head * group
    batch, kv_head = batch.to(tl.int64), kv_head.to(tl.int64)
    first_q, first_k = first_q.to(tl.int64), first_k.to(tl.int64)
    q_batch, q_head, q_row = strides(q_batch, q_head, q_row, ALIGN)
    k_batch, k_head, k_row = strides(k_batch, k_head, k_row, ALIGN)
    v_batch, v_head, v_row = strides(v_batch, v_head, v_row, ALIGN)
    grad_out_batch, grad_out_head, grad_out_row = strides(grad_out_batch, grad_out_head, grad_out_row, ALIGN)
    grad_k_batch, grad_k_head, grad_k_row = strides(grad_k_batch, grad_k_head, grad_k_row, ALIGN)
    grad_v_batch, grad_v_head, grad_v_row = strides(grad_v_batch, grad_v_head, grad_v_row, ALIGN)
    k += batch * k_batch + kv_head * k_head + first_k * k_row
    v += batch * v_batch + kv_head * v_head + first_k * v_row
    n = start_n + tl.arange(0, BLOCK_N)
    j, there = n[:, None], n < len_k
    k_rows, v_rows = row_pointers(k, k_row, start_n, BLOCK_N), row_pointers(v, v_row, start_n, BLOCK_N)
    key = load_rows(k_rows, there, SIZE, BLOCK_D)
    value = load_rows(v_rows, there, SIZE_V, BLOCK_DV)
    seed = tl.load(seed_at) if DROPOUT else 0

    grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # Key j is seen by queries from j - high to j - low. Queries that do not exist have probability 0, and
    # keys that do not exist are left out at the end, so that only the bounds of the window make an edge.
    begin, inner_begin, inner_end, end = span(
        start_n, start_n + BLOCK_N - 1, len_q, -high, -low, BLOCK_M, HAS_HIGH, HAS_LOW
    )
    end = tl.where(start_n < len_k, end, begin)
    for head32 in tl.range(first_head, first_head + group):
        head = tl.cast(head32, tl.int64)
        q_of_head = q + batch * q_batch + head * q_head + first_q * q_row
        grad_out_of_head = grad_out + batch * grad_out_batch + head * grad_out_head + first_q * grad_out_row
        statistics = (batch * heads + head) * num_q if cu_q is None else head * num_q + first_q
        slope = tl.load(slopes + batch * slopes_batch + head).to(tl.float32) if ALIBI else 0.0
        mask_of_head = mask
        if MASK != NO_MASK:
            mask_of_head += batch * mask_batch + head * mask_head
        random_column = batch32 * heads + head32
        for start in tl.range(begin, end, BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            exists, i = row < len_q, row[None, :]
            edge = False
            if HAS_LOW or HAS_HIGH:
                edge = (start < inner_begin) | (start >= inner_end)
            q_rows = row_pointers(q_of_head, q_row, start, BLOCK_M)
            query = load_rows(q_rows, exists, SIZE, BLOCK_D)
            qk = products(key, k_rows, there, query, q_rows, exists, SIZE, BLOCK_D, PRECISION)
            grad_out_rows = row_pointers(grad_out_of_head, grad_out_row, start, BLOCK_M)
            grad_out_tile = load_rows(grad_out_rows, exists, SIZE_V, BLOCK_DV)
            grad_p = products(
                value, v_rows, there, grad_out_tile, grad_out_rows, exists, SIZE_V, BLOCK_DV, PRECISION
            )  # fmt: skip
            shift, inverse = load_statistics(shifts, totals, statistics + row, exists, FOLDED)
            if totals is not None:
                inverse = inverse[None, :]
            delta_row = tl.load(delta + statistics + row, mask=exists, other=0.0)
            mask_at = mask_of_head
            if MASK_ROWS:
                mask_at += i.to(tl.int64) * mask_m
            dropped, grad_logits = gradient_of_logits(
                qk, grad_p, i, j, random_column, mask_at, mask_n, slope, shift[None, :], inverse, delta_row[None, :],
                scale, softcap, dropout, keep_scale, seed, len_q, len_k, offset, low, high,
                edge, HAS_LOW, HAS_HIGH, MASK, MASK_UNIT, SOFTCAP, ALIBI, DROPOUT, FOLDED,
            )  # fmt: skip
            grad_value = added(dropped.to(grad_out_tile.dtype), grad_out_tile, grad_value, there, PRECISION)
            grad_key = added(grad_logits.to(query.dtype), query, grad_key, there, PRECISION)

    grad_k += batch * grad_k_batch + kv_head * grad_k_head + first_k * grad_k_row
    grad_v += batch * grad_v_batch + kv_head * grad_v_head + first_k * grad_v_row
    exists = n < all_k
    grad_key = tl.where(j < len_k, grad_key, 0.0)
    grad_value = tl.where(j < len_k, grad_value, 0.0)
    store_rows(row_pointers(grad_k, grad_k_row, start_n, BLOCK_N), exists, grad_key * factor, SIZE, BLOCK_D)
    store_rows(row_pointers(grad_v, grad_v_row, start_n, BLOCK_N), exists, grad_value, SIZE_V, BLOCK_DV)
