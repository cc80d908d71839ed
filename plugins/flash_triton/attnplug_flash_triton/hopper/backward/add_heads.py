"""After the products: the sum over the query heads of a group, where each had a program of its own."""

# mypy: ignore-errors
# Triton reads these functions itself; Python's types do not describe them.
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["blocks", "heads", "num_k", "group", "scale"])
def add_heads_kernel(
    parts, grad, blocks, heads, num_k, group, part_batch, part_head, part_row, grad_batch, grad_head, grad_row,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sum of the `group` gradients that query heads have for each of `heads` heads of keys or values."""
    block, column = tl.program_id(0) % blocks, tl.cast(tl.program_id(0) // blocks, tl.int64)
    batch, head = column // heads, column % heads
    row = tl.cast(block * BLOCK + tl.arange(0, BLOCK), tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    exists = (row < num_k) & (d < SIZE)
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for member in range(group):
        at = batch * part_batch + (head * group + member) * part_head + row * part_row + d
        total += tl.load(parts + at, mask=exists, other=0.0).to(tl.float32)
    to = grad + batch * grad_batch + head * grad_head + row * grad_row + d
    tl.store(to, total.to(grad.dtype.element_ty), mask=exists)
