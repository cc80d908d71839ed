"""After the products: dQ from the order of registers, in which it was added up, to its place."""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
import triton
import triton.language as tl


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
