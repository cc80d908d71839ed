"""Rows that no sequence has: of packed tensors, those behind the last sequence, which no other kernel writes.

Where they begin only the GPU knows. Usually there are none, and to fill all of a tensor beforehand takes as long as
to write it.
"""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["sequences", "num_rows", "heads", "row_step", "head_step", "programs"])
def clear_kernel(
    cumulative, cleared, of_rows, sequences, num_rows, heads, row_step, head_step, programs,
    OF_ROWS: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write 0 to rows of `cleared`, `(num_rows, heads, SIZE)` by strides, and OF_ROWS to those of `of_rows`.

    They begin at `cumulative[sequences]`. `of_rows` is `(heads, num_rows)`, contiguous, or None.
    """
    begin = tl.cast(tl.load(cumulative + sequences), tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    zeros = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    end = (num_rows - begin) * heads
    for start in range(tl.cast(tl.program_id(0), tl.int64) * BLOCK, end, programs * BLOCK):
        place = start + tl.arange(0, BLOCK)
        row, head, exists = begin + place // heads, place % heads, place < end
        to = cleared + (row * row_step + head * head_step)[:, None] + d
        tl.store(to, zeros.to(cleared.dtype.element_ty), mask=exists[:, None] & (d < SIZE))
        if of_rows is not None:
            tl.store(of_rows + head * num_rows + row, tl.full([BLOCK], OF_ROWS, tl.float32), mask=exists)
