"""The forward kernel: one program for one tile of queries of one head (or of one group of heads).

The online softmax of FlashAttention-2 (Dao, 2023): running maximum and sum for each row, one division
at the end.

Logits are kept in one of two units. Where nothing is added to `scale * q @ k.T`, they are multiples of
ln 2 (`FOLDED`): the factor log2(e) hides in the scale, and an exponential costs one FMA and one exp2. An
additive mask may hold the lowest finite number, which that factor would turn into -inf, so that with a
mask, a softcap or ALiBi the logits are natural.
"""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
import triton
import triton.language as tl

from attnplug_flash_triton.tiles import (
    LN2,
    LOG2E,
    NO_MASK,
    is_seen,
    kept,
    key_pointers,
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

# Arguments that are not compiled in, so that a kernel is compiled once for all lengths and strides.
RUNTIME = [
    *("q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row"),
    *("mask_batch", "mask_head", "mask_m", "mask_n", "slopes_batch", "table_batch"),
    *("heads", "group", "num_q", "num_k", "scale", "softcap", "dropout", "left", "right"),
    *("tiles", "columns", "section"),
]


@triton.jit(do_not_specialize=[*RUNTIME, "keep_scale", "splits", "rows_in_all"])
def forward_kernel(
    q, k, v, mask, slopes, used, cu_q, cu_k, table, seed_at,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_m, mask_n, slopes_batch, table_batch,
    heads, group, num_q, num_k, scale, softcap, dropout, left, right, tiles, columns, section,
    sinks, out, lse, tops, totals, keep_scale, splits, rows_in_all,
    LOWER_RIGHT: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr, MASK_UNIT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    FOLDED: tl.constexpr, NEGATE: tl.constexpr, PAGE_SIZE: tl.constexpr, ALIGN: tl.constexpr,
    SIZE: tl.constexpr, SIZE_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, PACK: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write out and lse for one tile of rows; with SPLIT, the unfinished sums over one part of the keys.

    Shapes: q `(B, heads, num_q, SIZE)` by strides, k and v likewise with `heads / group` heads; out, lse,
    tops and totals contiguous, `(B, heads, num_q[, SIZE_V])`, or `(num_q, heads, SIZE_V)` and `(heads, num_q)`
    where sequences are packed; with SPLIT, `splits` of them, `rows_in_all` rows each.

    Row `r` is query `r // PACK`: with PACK = group, the query heads that share keys stand next to each other
    in one tile. `tops` and `totals` are the maximum and the sum of each row's softmax, None if not wanted.
    A column is one (batch, head, part of the keys), or with PACK one (batch, group of heads, part).
    """
    tile, column = schedule(tl.program_id(0), tiles, columns, section, HAS_HIGH)
    part = column % splits if SPLIT else 0
    column = column // splits if SPLIT else column
    batch, first_head = column // (heads // PACK), column % (heads // PACK) * PACK
    first_q, len_q = sequence(cu_q, None, batch, num_q)
    first_k, len_k = sequence(cu_k, used, batch, num_k)
    start_m = tile * BLOCK_M
    if start_m >= len_q * PACK:
        return

    offset = len_k - len_q if LOWER_RIGHT else 0
    low, high = offset - left, offset + right
    row = start_m + tl.arange(0, BLOCK_M)
    exists = row < len_q * PACK
    batch_wide, kv_head = batch.to(tl.int64), (first_head // group).to(tl.int64)
    q_batch, q_head, q_row = strides(q_batch, q_head, q_row, ALIGN)
    k_batch, k_head, k_row = strides(k_batch, k_head, k_row, ALIGN)
    v_batch, v_head, v_row = strides(v_batch, v_head, v_row, ALIGN)
    q += batch_wide * q_batch + first_head * q_head + first_q.to(tl.int64) * q_row
    k += kv_head * k_head
    v += kv_head * v_head
    if PAGE_SIZE == 0:
        k += batch_wide * k_batch + first_k.to(tl.int64) * k_row
        v += batch_wide * v_batch + first_k.to(tl.int64) * v_row
    else:
        table += batch_wide * table_batch
    if PACK == 1:
        i, head = row, first_head
        q_rows = row_pointers(q, q_row, start_m, BLOCK_M)
        i_rows, head_rows, head_wide = i[:, None], head, first_head.to(tl.int64)
    else:
        i, head = row // PACK, first_head + row % PACK
        q_rows = q + i.to(tl.int64) * q_row + row % PACK * q_head
        i_rows, head_rows, head_wide = i[:, None], head[:, None], head.to(tl.int64)[:, None]
    query = load_rows(q_rows, exists, SIZE, BLOCK_D)
    if NEGATE:  # so that a maximum of products is a maximum of logits; never in float32, see FOLDED in problem.py
        query, scale = -query, -scale

    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + batch_wide * slopes_batch + head_rows).to(tl.float32)
    if MASK != NO_MASK:
        mask += batch_wide * mask_batch + head_wide * mask_head
        if MASK_ROWS:
            mask += i_rows.to(tl.int64) * mask_m
    seed = tl.load(seed_at) if DROPOUT else 0
    random_column = batch * heads + head_rows

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head + row * 0).to(tl.float32) * (LOG2E if FOLDED else 1.0)
        if SPLIT:
            sink = tl.where(part == 0, sink, float("-inf"))
        top = sink
        total = tl.where(sink == float("-inf"), 0.0, 1.0)

    last_m = tl.minimum(start_m + BLOCK_M, len_q * PACK) - 1
    begin, inner_begin, inner_end, end = span(
        start_m // PACK, last_m // PACK, len_k, low, high, BLOCK_N, HAS_LOW, HAS_HIGH
    )
    if SPLIT:
        size = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), splits) * BLOCK_N
        begin += part * size
        end = tl.minimum(end, begin + size)
    for start in tl.range(begin, end, BLOCK_N):
        j = (start + tl.arange(0, BLOCK_N))[None, :]
        edge = (start < inner_begin) | (start >= inner_end) if HAS_LOW else start >= inner_end
        there = start + tl.arange(0, BLOCK_N) < len_k
        k_rows = key_pointers(k, k_row, start, len_k, table, k_batch, BLOCK_N, PAGE_SIZE)
        key = load_rows(k_rows, there, SIZE, BLOCK_D)
        qk = products(query, q_rows, exists, key, k_rows, there, SIZE, BLOCK_D, PRECISION)
        if FOLDED and MASK == NO_MASK:
            if edge:
                qk = tl.where(is_seen(i_rows, j, len_k, low, high, HAS_LOW, HAS_HIGH), qk, float("-inf"))
            higher = tl.maximum(top, tl.max(qk, 1) * scale)  # see NEGATE
        else:
            qk, _ = logits(
                qk, i_rows, j, mask, mask_n, slope, scale, softcap, len_q, len_k, offset, low, high,
                edge, HAS_LOW, HAS_HIGH, MASK, MASK_UNIT, SOFTCAP, ALIBI,
            )  # fmt: skip
            higher = tl.maximum(top, tl.max(qk, 1))
        # A row that has seen no key yet has the maximum -inf, and -inf - -inf would be NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        if FOLDED and MASK == NO_MASK:
            p = tl.exp2(qk * scale - shift[:, None])
        else:
            p = tl.exp2(qk - shift[:, None] if FOLDED else (qk - shift[:, None]) * LOG2E)
        fade = tl.exp2(top - shift if FOLDED else (top - shift) * LOG2E)
        total = total * fade + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(kept(seed, random_column, i_rows, j, dropout), p, 0.0)
        v_rows = key_pointers(v, v_row, start, len_k, table, v_batch, BLOCK_N, PAGE_SIZE)
        value = load_rows(v_rows, there, SIZE_V, BLOCK_DV)
        acc = tl.dot(p.to(value.dtype), value, acc * fade[:, None], input_precision=PRECISION)
        top = higher

    if FOLDED and not SPLIT:
        top *= LN2
    if cu_q is None:
        statistics = (batch_wide * heads + head) * num_q + i
        out_rows = out + statistics * SIZE_V
    else:
        statistics = head.to(tl.int64) * num_q + first_q + i
        out_rows = out + ((first_q + i).to(tl.int64) * heads + head) * SIZE_V
    if SPLIT:
        out_rows += part.to(tl.int64) * rows_in_all * SIZE_V
        statistics += part.to(tl.int64) * rows_in_all
    else:
        acc *= tl.where(total == 0.0, 0.0, keep_scale / total)[:, None]
        tl.store(lse + statistics, top + tl.log(total), mask=exists)
    if tops is not None:
        tl.store(tops + statistics, top, mask=exists)
        tl.store(totals + statistics, total, mask=exists)
    store_rows(out_rows, exists, acc, SIZE_V, BLOCK_DV)
