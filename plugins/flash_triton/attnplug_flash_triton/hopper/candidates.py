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

from attnplug_flash_triton.hopper.outputs import DYNAMIC, EACH, SHARED


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


TWO, NARROW = dict(consumers=2), dict(block_n=64, stages=6)
"""With softcap a round is mostly arithmetic: fewer elements in it, or more registers, may let it overlap."""

CANDIDATES = (
    Candidate("four stages", 64, dict(stages=4), {"full": 0.99, "causal": 0.99}),
    Candidate("the next tile", 64, dict(persistent=DYNAMIC), {"full": 1.0}),
    Candidate("narrow tiles", 64, NARROW, {"softcap": 0.95, "causal softcap": 0.95}),
    Candidate("two warpgroups", 64, TWO, {"softcap": 1.0, "causal softcap": 1.0}),
    Candidate("shared reciprocals", 64, dict(softcap=SHARED), {"softcap": 1.0, "causal softcap": 1.0}),
    Candidate("narrow, shared", 64, NARROW | dict(softcap=SHARED), {"softcap": 0.95, "causal softcap": 0.95}),
    Candidate("narrow tiles", 128, dict(block_n=64, stages=4), {"softcap": 1.0, "causal softcap": 1.0}),
    Candidate("one reciprocal each", 128, dict(softcap=EACH), {"softcap": 1.05, "causal softcap": 1.05}),
    Candidate("three stages", 128, dict(stages=3, q_stages=1, own_out=False), {"full": 1.0, "short causal": 1.02}),
    Candidate("shared reciprocals", 256, dict(softcap=SHARED), {"softcap": 1.02, "causal softcap": 1.02}),
)
