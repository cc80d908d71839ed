"""Before the products: lse in powers of two, and `delta = sum(out * grad_out) - grad_lse`, of each row."""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
import triton
import triton.language as tl


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
