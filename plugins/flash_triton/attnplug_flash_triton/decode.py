"""Split-KV decoding: with few queries and many keys, programs share the keys, and this kernel adds them up.

As in Flash-Decoding (Dao, Haziza, Massa and Sizov, 2023). The parts come with the maximum and the sum of
their softmax, and unfinished sums of values; a part that has seen no key has the maximum -inf.
"""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
import triton
import triton.language as tl

from attnplug_flash_triton.tiles import LN2, LOG2E

MOST_PARTS = 64


@triton.jit(do_not_specialize=["sequences", "keep_scale", "splits", "rows_in_all", "heads", "num_q"])
def combine_kernel(
    parts, part_tops, part_totals, out, lse, tops, totals, cu_q,
    sequences, keep_scale, splits, rows_in_all, heads, num_q,
    PACKED: tl.constexpr, FOLDED: tl.constexpr, SIZE_V: tl.constexpr, BLOCK_DV: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write out and lse of one row, and its statistics where wanted. Shapes are those of `forward_kernel`.

    A packed row that no sequence has, behind the last one, has seen no key.
    """
    row = tl.program_id(0).to(tl.int64)
    out_row = row % num_q * heads + row // num_q if PACKED else row
    part, d = tl.arange(0, PARTS), tl.arange(0, BLOCK_DV)[None, :]
    if PACKED:
        splits = tl.where(row % num_q < tl.load(cu_q + sequences), splits, 0)
    top = tl.load(part_tops + part * rows_in_all + row, mask=part < splits, other=float("-inf"))
    some = top > float("-inf")
    total = tl.load(part_totals + part * rows_in_all + row, mask=some, other=0.0)
    highest = tl.max(top, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2(top - shift if FOLDED else (top - shift) * LOG2E)
    denominator = tl.sum(total * weight, 0)
    values = parts + (part.to(tl.int64)[:, None] * rows_in_all + out_row) * SIZE_V + d
    acc = tl.load(values, mask=some[:, None] & (d < SIZE_V), other=0.0)
    acc = tl.sum(acc * weight[:, None], 0) * tl.where(denominator == 0.0, 0.0, keep_scale / denominator)
    d = tl.arange(0, BLOCK_DV)
    tl.store(out + out_row * SIZE_V + d, acc.to(out.dtype.element_ty), mask=d < SIZE_V)
    tl.store(lse + row, (highest * LN2 if FOLDED else highest) + tl.log(denominator))
    if tops is not None:
        tl.store(tops + row, highest)
        tl.store(totals + row, denominator)
