"""The backward kernels for Hopper: one warp that loads by TMA, two warpgroups that multiply.

Scores of kernels that have keys are held transposed, keys in rows: so probabilities and their gradients come out of one
product in the registers that the next product takes its left operand from. What is computed in registers overlaps with
a product: each module draws its round. Which kernels run is decided in `gradients.py`:

    rows                  lse in powers of two, and delta, of each row
    key_gradients         dK and dV of 128 keys, head sizes to 128, and in the same rounds, where wanted, dQ
    key_gradients_wide    dK and dV of 64 keys, head sizes to 256
    query_gradient        dQ by itself, where it was not added up: equal bits on repeated runs
    gather                dQ from the order of registers, in which it was added up, to its place
    add_heads             the sum over the query heads of a group, where each had a program of its own
    spans, tiles          what they share

FlashAttention-3 (Shah et al., 2024, section 3) has the structure of `key_gradients`.
"""

from attnplug_flash_triton.hopper.backward.add_heads import add_heads_kernel
from attnplug_flash_triton.hopper.backward.gather import gather_kernel
from attnplug_flash_triton.hopper.backward.key_gradients import key_gradients_kernel
from attnplug_flash_triton.hopper.backward.key_gradients_wide import key_gradients_wide_kernel
from attnplug_flash_triton.hopper.backward.query_gradient import query_gradient_kernel
from attnplug_flash_triton.hopper.backward.rows import rows_kernel

__all__ = [
    "add_heads_kernel",
    "gather_kernel",
    "key_gradients_kernel",
    "key_gradients_wide_kernel",
    "query_gradient_kernel",
    "rows_kernel",
]
