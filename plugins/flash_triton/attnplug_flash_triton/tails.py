"""Rows that no sequence has: of packed tensors, those behind the last sequence, which no other kernel writes.

Where they begin only the GPU knows. Usually there are none, and to fill all of a tensor beforehand takes as long as
to write it.
"""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["sequences", "num_rows", "heads", "head_step", "row_step", "shares"])
def clear_kernel(
    cumulative, cleared, of_rows, sequences, num_rows, heads, head_step, row_step, shares,
    OF_ROWS: tl.constexpr, ALIGN: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write 0 to rows of `cleared`, `(num_rows, heads, SIZE)` by strides, and OF_ROWS to those of `of_rows`.

    They begin at `cumulative[sequences]`. `of_rows` is `(heads, num_rows)`, contiguous, or None. A program has
    one of `shares` of one head.
    """
    head, share = tl.cast(tl.program_id(0) % heads, tl.int64), tl.program_id(0) // heads
    zeros = tl.zeros([BLOCK, BLOCK_D], tl.float32).to(cleared.dtype.element_ty)
    d, row_step = tl.arange(0, BLOCK_D)[None, :], row_step * ALIGN  # known to be aligned, for wide steps
    to = cleared + head * head_step * ALIGN + (tl.arange(0, BLOCK) * row_step)[:, None] + d
    begin = tl.cast(tl.load(cumulative + sequences), tl.int64)
    for start in range(begin + share * BLOCK, num_rows, shares * BLOCK):
        row = start + tl.arange(0, BLOCK)
        exists = row < num_rows
        tl.store(to + start * row_step, zeros, mask=exists[:, None] & (d < SIZE))
        if of_rows is not None:
            tl.store(of_rows + head * num_rows + row, tl.full([BLOCK], OF_ROWS, tl.float32), mask=exists)
