"""Which tiles a kernel works on: a plain table, read without timing anything at a user's first call.

The numbers keep every shipped kernel free of spilled registers and within the shared memory of its
architecture; a test compiles each of them and says so. They were not tuned on a card.
"""

from __future__ import annotations

from typing import NamedTuple


class Tiles(NamedTuple):
    """The size of a program's tiles, its warps, and how many tiles are loaded ahead."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


FORWARD, FEW_ROWS = "forward", "forward of few rows"
QUERY, KEYS, MASK = "gradient of the query", "gradients of keys and values", "gradient of the mask"
KERNELS = (FORWARD, FEW_ROWS, QUERY, KEYS, MASK)
FEW = 16
"""Rows (queries, times the query heads that share a head of keys) up to which a call counts as one of few rows."""

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_MEMORY = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes that one program may use. sm_80 stands for the cards from 8.0 on, of which the smallest have 99 KiB."""

SIZES = (64, 128, 256)
"""Classes of head sizes: the larger one of query and value, rounded up."""

KNOWN_SPILLS = {
    ("query_gradient_kernel", "float32", 256): 400,
    ("key_value_gradient_kernel", "float32", 128): 32,
    ("key_value_gradient_kernel", "float32", 256): 400,
    ("mask_gradient_kernel", "float32", 64): 32,
    ("mask_gradient_kernel", "float32", 128): 32,
    ("mask_gradient_kernel", "float32", 256): 400,
}
"""Bytes that kernels are known to spill at most, by name, dtype and class of head size; nothing else may.

IEEE products of float32 keep whole rows of both operands in registers, whatever the tile.
"""

INTERPRETER = Tiles(16, 16, 1, 1)

# Half-precision tiles by architecture, kernel and class of head size: without and with extra work on the logits
# (a mask, softcap, ALiBi, dropout), whose values need registers of their own.
_HALF: dict[tuple[str, str], tuple[tuple[Tiles, Tiles], tuple[Tiles, Tiles], tuple[Tiles, Tiles]]] = {
    ("sm_80", FORWARD): (
        (Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2)),
        (Tiles(128, 32, 8, 2), Tiles(32, 32, 4, 1)),
        (Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1)),
    ),
    ("sm_80", QUERY): (
        (Tiles(128, 64, 8, 2), Tiles(32, 32, 4, 2)),
        (Tiles(64, 32, 4, 2), Tiles(64, 32, 8, 1)),
        (Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1)),
    ),
    ("sm_80", KEYS): (
        (Tiles(32, 128, 8, 2), Tiles(32, 32, 4, 1)),
        (Tiles(32, 64, 8, 1), Tiles(32, 32, 8, 1)),
        (Tiles(16, 64, 8, 1), Tiles(16, 32, 8, 1)),
    ),
    ("sm_90", FORWARD): (
        (Tiles(128, 128, 8, 3), Tiles(128, 32, 8, 2)),
        (Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 2)),
        (Tiles(128, 32, 8, 2), Tiles(32, 32, 4, 1)),
    ),
    ("sm_90", QUERY): (
        (Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 2)),
        (Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2)),
        (Tiles(64, 16, 8, 1), Tiles(32, 32, 8, 1)),
    ),
    ("sm_90", KEYS): (
        (Tiles(64, 128, 8, 2), Tiles(16, 128, 8, 2)),
        (Tiles(32, 128, 8, 2), Tiles(16, 128, 8, 2)),
        (Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1)),
    ),
    ("sm_100", FORWARD): (
        (Tiles(128, 128, 8, 3), Tiles(64, 32, 8, 1)),
        (Tiles(128, 64, 8, 3), Tiles(64, 32, 8, 1)),
        (Tiles(128, 32, 8, 2), Tiles(32, 32, 4, 1)),
    ),
    ("sm_100", QUERY): (
        (Tiles(128, 64, 8, 2), Tiles(64, 32, 8, 1)),
        (Tiles(128, 64, 8, 2), Tiles(64, 32, 8, 1)),
        (Tiles(64, 16, 8, 1), Tiles(32, 32, 8, 1)),
    ),
    ("sm_100", KEYS): (
        (Tiles(32, 128, 8, 2), Tiles(32, 64, 8, 1)),
        (Tiles(32, 128, 8, 1), Tiles(32, 32, 8, 1)),
        (Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1)),
    ),
    ("gfx942", FORWARD): (
        (Tiles(128, 128, 8, 1), Tiles(64, 32, 8, 1)),
        (Tiles(128, 64, 8, 1), Tiles(64, 32, 4, 1)),
        (Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 1)),
    ),
    ("gfx942", QUERY): (
        (Tiles(128, 64, 8, 1), Tiles(64, 32, 4, 1)),
        (Tiles(64, 64, 8, 1), Tiles(32, 32, 4, 1)),
        (Tiles(64, 16, 8, 1), Tiles(16, 16, 8, 1)),
    ),
    ("gfx942", KEYS): (
        (Tiles(64, 128, 8, 1), Tiles(32, 64, 4, 1)),
        (Tiles(32, 64, 4, 1), Tiles(16, 128, 8, 1)),
        (Tiles(16, 64, 8, 1), Tiles(16, 32, 8, 1)),
    ),
}

# Float32 tiles by kernel and class of head size, for all architectures: IEEE products run on the general
# units, with their operands in registers.
_SINGLE: dict[str, tuple[Tiles, Tiles, Tiles]] = {
    FORWARD: (Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1), Tiles(16, 16, 8, 1)),
    QUERY: (Tiles(16, 16, 4, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    KEYS: (Tiles(16, 16, 4, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
}


# Tiles by kernel, half precision or float32, and class of head size, for all architectures.
_ALL_ARCHITECTURES: dict[str, tuple[tuple[Tiles, Tiles, Tiles], tuple[Tiles, Tiles, Tiles]]] = {
    FEW_ROWS: (
        (Tiles(16, 64, 4, 2), Tiles(16, 32, 4, 2), Tiles(16, 32, 4, 1)),
        (Tiles(16, 16, 4, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    ),
    MASK: (
        (Tiles(32, 32, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
        (Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    ),
}


def choose(architecture: str, kernel: str, itemsize: int, head_size: int, extra: bool) -> Tiles:
    """Return the tiles of one kernel.

    Args:
        architecture: one of `ARCHITECTURES`.
        kernel: one of `KERNELS`.
        itemsize: of query, key and value, in bytes.
        head_size: the larger one of query and value.
        extra: whether there is a mask, softcap, ALiBi or dropout.
    """
    size = next(place for place, limit in enumerate(SIZES) if head_size <= limit)
    if kernel in _ALL_ARCHITECTURES:
        return _ALL_ARCHITECTURES[kernel][itemsize == 4][size]
    if itemsize == 4:
        return _SINGLE[kernel][size]
    return _HALF[architecture, kernel][size][extra]
