"""The kernel for the gradient of an additive mask, of every broadcast form.

The gradient of a mask element is the sum of the logits' gradients of all (batch, head, query, key) that
read it. One program owns a tile of the mask and runs over everything that is broadcast to it, computing
the logits' gradients once more: no atomic addition, and no tensor of the size of all logits.
"""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
import triton
import triton.language as tl

from attnplug_flash_triton.backward import BACKWARD_RUNTIME, gradient_of_logits, load_statistics
from attnplug_flash_triton.tiles import load_rows, products, row_pointers, sequence, strides


@triton.jit(do_not_specialize=[*BACKWARD_RUNTIME, "mask_batches", "mask_heads", "mask_rows", "mask_columns", "batches"])
def mask_gradient_kernel(
    q, k, v, mask, slopes, used, cu_q, cu_k, table, seed_at,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_m, mask_n, slopes_batch, table_batch,
    heads, group, num_q, num_k, scale, softcap, dropout, left, right, tiles, columns, section,
    grad_out, grad_out_batch, grad_out_head, grad_out_row, shifts, totals, delta, keep_scale, factor,
    grad_mask, mask_batches, mask_heads, mask_rows, mask_columns, batches,
    LOWER_RIGHT: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr, MASK_UNIT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    FOLDED: tl.constexpr, ALIGN: tl.constexpr, SIZE: tl.constexpr, SIZE_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write one tile of grad_mask, float32 `(mask_batches, mask_heads, mask_rows, mask_columns)`, contiguous.

    Each of those sizes is 1 where the mask is broadcast. `tiles` counts the tiles along the mask's columns.
    """
    program = tl.program_id(0)
    tile_n, rest = program % tiles, program // tiles
    tiles_m = tl.cdiv(mask_rows, BLOCK_M)
    tile_m, rest = rest % tiles_m, rest // tiles_m
    mask_head_at, mask_batch_at = rest % mask_heads, rest // mask_heads
    q_batch, q_head, q_row = strides(q_batch, q_head, q_row, ALIGN)
    k_batch, k_head, k_row = strides(k_batch, k_head, k_row, ALIGN)
    v_batch, v_head, v_row = strides(v_batch, v_head, v_row, ALIGN)
    grad_out_batch, grad_out_head, grad_out_row = strides(grad_out_batch, grad_out_head, grad_out_row, ALIGN)
    seed = tl.load(seed_at) if DROPOUT else 0

    # What the tile stands for in each dimension: itself, or everything.
    first_batch = tl.where(mask_batches > 1, mask_batch_at, 0)
    last_batch = tl.where(mask_batches > 1, mask_batch_at + 1, batches)
    first_head = tl.where(mask_heads > 1, mask_head_at, 0)
    last_head = tl.where(mask_heads > 1, mask_head_at + 1, heads)
    first_m = tl.where(mask_rows > 1, tile_m * BLOCK_M, 0)
    last_m = tl.where(mask_rows > 1, tile_m * BLOCK_M + 1, num_q)
    first_n = tl.where(mask_columns > 1, tile_n * BLOCK_N, 0)
    last_n = tl.where(mask_columns > 1, tile_n * BLOCK_N + 1, num_k)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for batch32 in tl.range(first_batch, last_batch):
        batch = tl.cast(batch32, tl.int64)
        _, len_k = sequence(None, used, batch, num_k)
        offset = len_k - num_q if LOWER_RIGHT else 0
        low, high = offset - left, offset + right
        for head32 in tl.range(first_head, last_head):
            head = tl.cast(head32, tl.int64)
            q_at = q + batch * q_batch + head * q_head
            k_at = k + batch * k_batch + head // group * k_head
            v_at = v + batch * v_batch + head // group * v_head
            grad_out_at = grad_out + batch * grad_out_batch + head * grad_out_head
            slope = tl.load(slopes + batch * slopes_batch + head).to(tl.float32) if ALIBI else 0.0
            statistics = (batch * heads + head) * num_q
            for start_m in tl.range(first_m, last_m, BLOCK_M):
                row = start_m + tl.arange(0, BLOCK_M)
                i, exists = row[:, None], row < num_q
                mask_at = mask + batch * mask_batch + head * mask_head
                if MASK_ROWS:
                    mask_at += i.to(tl.int64) * mask_m
                q_rows = row_pointers(q_at, q_row, start_m, BLOCK_M)
                query = load_rows(q_rows, exists, SIZE, BLOCK_D)
                grad_out_rows = row_pointers(grad_out_at, grad_out_row, start_m, BLOCK_M)
                grad_out_tile = load_rows(grad_out_rows, exists, SIZE_V, BLOCK_DV)
                shift, inverse = load_statistics(shifts, totals, statistics + row, exists, FOLDED)
                delta_row = tl.load(delta + statistics + row, mask=exists, other=0.0)
                for start_n in tl.range(first_n, last_n, BLOCK_N):
                    j = (start_n + tl.arange(0, BLOCK_N))[None, :]
                    k_rows = row_pointers(k_at, k_row, start_n, BLOCK_N)
                    v_rows = row_pointers(v_at, v_row, start_n, BLOCK_N)
                    there = start_n + tl.arange(0, BLOCK_N) < len_k
                    key = load_rows(k_rows, there, SIZE, BLOCK_D)
                    value = load_rows(v_rows, there, SIZE_V, BLOCK_DV)
                    _dropped, grad = gradient_of_logits(
                        products(query, q_rows, exists, key, k_rows, there, SIZE, BLOCK_D, PRECISION),
                        products(
                            grad_out_tile, grad_out_rows, exists, value, v_rows, there, SIZE_V, BLOCK_DV, PRECISION
                        ),
                        i, j, batch32 * heads + head32, mask_at, mask_n, slope, shift[:, None], inverse[:, None],
                        delta_row[:, None], scale, softcap, dropout, keep_scale, seed,
                        num_q, len_k, offset, low, high,
                        True, HAS_LOW, HAS_HIGH, MASK, MASK_UNIT, SOFTCAP, ALIBI, DROPOUT, FOLDED, OF_MASK=True,
                    )  # fmt: skip
                    # Beyond the keys and queries that exist, a probability is exp2(-inf), 0.
                    sums += grad

    row, column = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if mask_rows == 1:
        sums = tl.where(row[:, None] == 0, tl.sum(sums, 0)[None, :], 0.0)
    if mask_columns == 1:
        sums = tl.where(column[None, :] == 0, tl.sum(sums, 1)[:, None], 0.0)
    base = grad_mask + (mask_batch_at * mask_heads + mask_head_at).to(tl.int64) * mask_rows * mask_columns
    exists = (row[:, None] < mask_rows) & (column[None, :] < mask_columns)
    tl.store(base + row.to(tl.int64)[:, None] * mask_columns + column[None, :], sums, mask=exists)
