"""What the parts of the forward kernel hand to each other, by name; Triton takes named tuples apart as it compiles."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton calls `configured` itself, when it compiles.
from dataclasses import dataclass
from typing import Any, NamedTuple

from triton.experimental import gluon


@dataclass(frozen=True)
class Config:
    """What is compiled in: see `forward_kernel`.

    Attributes:
        M: queries of a tile, those of all warpgroups.
        RAGGED_Q, RAGGED_K: where sequences of queries and of keys end is known on the GPU alone.
    """

    SIZE: int
    M: int
    BLOCK_N: int
    CONSUMERS: int
    STAGES: int
    Q_STAGES: int
    PERSISTENT: int
    OWN_OUT: bool
    RAGGED_Q: bool
    RAGGED_K: bool
    LOWER_RIGHT: bool
    HAS_LOW: bool
    HAS_HIGH: bool
    NEGATE: bool
    SOFTCAP: int
    WORDS: bool
    JOINED: bool


@gluon.constexpr_function
def configured(*values):
    """Return a `Config` of values that are compiled in."""
    return Config(*values)


class Call(NamedTuple):
    """Lengths and sizes of a call, and how its tiles are counted: see `forward_kernel`."""

    cu_q: Any
    cu_k: Any
    used: Any
    heads: Any
    group: Any
    num_q: Any
    num_k: Any
    k_rows: Any
    left: Any
    right: Any
    tiles: Any
    columns: Any
    section: Any
    programs: Any


class Ring(NamedTuple):
    """Shared memory that tiles go through, the i-th in buffer `i % STAGES`, and its barriers.

    Attributes:
        full: for each buffer, the bytes of a tile have arrived.
        empty: for each buffer, all that read it are done.
    """

    buffers: Any
    full: Any
    empty: Any


class Queue(NamedTuple):
    """Where the next tiles of queries are, handed on by the warp that loads: see `tiles.hand_on`.

    Attributes:
        places: `AHEAD * PLACE` numbers in shared memory.
        full, empty: barriers, as of a `Ring`.
        counter: in global memory, of the tiles that programs took.
    """

    places: Any
    full: Any
    empty: Any
    counter: Any


class Work(NamedTuple):
    """What the warps of a program share."""

    q_desc: Any
    k_desc: Any
    v_desc: Any
    o_desc: Any
    q: Any
    """A `Ring` of tiles of 64 rows, one for each warpgroup of each of `Q_STAGES`."""
    k: Any
    v: Any
    o_buffers: Any
    """With OWN_OUT for each warpgroup; else those of the queries."""
    queue: Any
    call: Any


class Outputs(NamedTuple):
    """What warpgroups that multiply need besides, to make and to write outputs: see `forward_kernel`."""

    lse: Any
    sinks: Any
    scale: Any
    inner_scale: Any
    in_order: Any


class Tile(NamedTuple):
    """Where a tile of queries is: its first row in its sequence, the sequence, and where that is in memory."""

    row: Any
    batch: Any
    head: Any
    first_q: Any
    len_q: Any
    first_k: Any
    len_k: Any


class Rows(NamedTuple):
    """64 rows of queries and what they see.

    Attributes:
        row: the first one, in its sequence.
        len_k: keys of the sequence.
        low, high: query i sees the keys from i + low to i + high.
        begin, end: the tiles of keys that any of them sees, at least one.
    """

    row: Any
    len_k: Any
    low: Any
    high: Any
    begin: Any
    end: Any
