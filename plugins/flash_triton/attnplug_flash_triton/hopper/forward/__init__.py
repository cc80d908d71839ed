"""The forward kernel for Hopper: one warp that loads, two or three warpgroups that multiply 64 rows of queries each.

    loads       K(n-1)  Q  K(n-2)  V(n-1)  K(n-3)  V(n-2) ...             (TMA, as far ahead as there are buffers)
    products    | Q K(i+1)'  P(i) V(i) ............. | Q K(i+2)'  P(i+1) V(i+1) ...
    softmax     |           | exponentials of i+1 .. |           | exponentials of i+2 ...

That is the pipeline within a warpgroup of FlashAttention-3 (Shah et al., 2024, section 3.2): in every round the
product of the queries with the next keys and the one of the last probabilities with their values are issued together;
softmax waits for the first, the rescaling of the output for the second. Meanwhile the other warpgroups multiply.

Tiles of keys are taken from the last one to the first: masked ones at the end, whole ones, masked ones at the beginning
of a window. Only the first and the masked ones pay for masking.

A program computes one tile of queries, or one after another (PERSISTENT), and then loads the next while it finishes the
last. Where tiles differ in length, the loading warp takes their numbers from a counter in global memory, and hands
them on through shared memory.

Where a sequence's length is not known on the host (variable length, `seqused_k`), keys, values and outputs go through
ragged descriptors, with which TMA itself ends a tile at the end of its sequence: see `descriptors.py`.

    kernel     the kernel: its arguments, shared memory and barriers, and which warps do what
    loads      the warp that loads
    attend     a warpgroup that multiplies, tile by tile of queries
    joined     the same, where one tile begins while the one before ends
    rounds     one tile of keys after another, and what is written at the end
    softmax    from products to probabilities, and how these are kept
    tiles      which tile of queries a program computes next, and where it is
    spans      which tiles of keys its rows see
    records    what these hand to each other
"""

from attnplug_flash_triton.hopper.forward.kernel import forward_kernel

__all__ = ["forward_kernel"]
