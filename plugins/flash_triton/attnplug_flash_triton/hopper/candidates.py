"""What may make forward faster, and has not run on a GPU: changes of `outputs.TILES`, none of which any call uses.

`make gpu PART=candidates` measures them against what is shipped, and says which should take its place. Then the winner
moves to `outputs.TILES`, and what lost goes, here and in the kernel.

What is expected stands here before it is measured. It comes from the machine code (Triton 3.6, ptxas 13.1): the
instructions of one thread in a round, which is 64 queries against one tile of keys; and the clocks for which a round
keeps the tensor cores busy, and the special function unit, 8 for each instruction. Microseconds are estimates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Candidate(NamedTuple):
    """One change of the tiles of one class of head sizes.

    Attributes:
        name: of the change.
        size: the class of head sizes.
        change: fields of `Tiles`.
        expected: for each kind of call that it is measured on, its time as a share of what is shipped.
    """

    name: str
    size: int
    change: Mapping[str, Any]
    expected: Mapping[str, float]


TWO = dict(consumers=2)
"""Three warpgroups take 192 rows of queries, of which sequences of 1024 fill 5.3, so that 11 % of the rounds are for
rows that are not there. Two take 128, and have more registers, but one less to compute while the others wait."""

NARROW_128, NARROW_64 = dict(block_n=64, stages=4), dict(block_n=64, stages=6)
"""A window of 1024 has 1025 keys for each query, and 64 rows visit 9.5 tiles of 128 keys, or 18 of 64: 1216 and 1152
keys. A round costs more than its products, so that more rounds may cost what fewer keys gain."""

CANDIDATES = (
    Candidate("two warpgroups", 64, TWO, {"short": 0.95, "short causal": 0.93, "window": 0.98, "full": 1.06}),
    Candidate("narrow tiles", 64, NARROW_64, {"window": 1.0}),
    Candidate("narrow tiles", 128, NARROW_128, {"window": 0.98}),
)
