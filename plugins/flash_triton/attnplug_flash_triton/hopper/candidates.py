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

from attnplug_flash_triton.hopper.outputs import HANDED, SHARED


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


WORDS = dict(words=True)
"""Causal calls have two loops of rounds, and probabilities go from one to the other as 16-bit values: in every round,
ptxas takes words apart and puts them together, between one product and the next. That is 64 of 535 instructions at
head size 128, and 33 of 454 at 256; full calls, with one loop, have none. In words there are 494 and 421."""

HANDED_ON = dict(persistent=HANDED)
"""Between two tiles of queries, the loading warp waits for the counter (0.7 us) and divides (0.3 us) before the next
keys are on their way, and then the multiplying warps divide; of variable length, all read the lengths, one after the
other (1 us). A causal tile of 8192 keys takes 60 us, one of a window of 1024 or of a short sequence 15 and less.
Handed on, all that happens while the tile before is computed."""

ALL_OF_IT = WORDS | HANDED_ON

SHARED_RECIPROCALS = dict(softcap=SHARED)
"""A tanh takes an exponential and a reciprocal: with softcap the special function unit is busy for 1552 clocks, where
head size 64 has 512 of products, and 128 has 1024. Four elements with one reciprocal: 1168 clocks, and 820
instructions where there were 726. The constant term of the logits goes to lse. So 0.85 of a call without softcap is
within reach at head size 128, not at 64. `tanh.approx` would take 1040 clocks, and is wrong by 2**-11: where all
logits are alike, lse would be wrong by more than 1e-3."""

POLYNOMIAL = dict(by_polynomial=8)
"""At head size 64 the special function unit is busy for 528 clocks, and the tensor cores for 512. One exponential in
eight by multiplications: 464 clocks, 522 instructions where there were 457. In a prototype, full calls gained 2 % by
it, and causal ones lost 2 %."""

CANDIDATES = (
    Candidate("words", 128, WORDS, {"causal": 0.95, "window": 0.95}),
    Candidate("words, handed on", 128, ALL_OF_IT, {"causal": 0.93, "window": 0.90, "variable length": 0.85}),
    Candidate("shared reciprocals", 128, SHARED_RECIPROCALS, {"softcap": 0.80, "softcap causal": 0.82}),
    Candidate("handed on", 64, HANDED_ON, {"causal": 0.98, "window": 0.94, "variable length": 0.85}),
    Candidate("shared reciprocals", 64, SHARED_RECIPROCALS, {"softcap": 0.78, "softcap causal": 0.80}),
    Candidate("one in eight", 64, POLYNOMIAL, {"full": 0.97, "causal": 0.98}),
    Candidate("one in four", 64, dict(by_polynomial=4), {"full": 0.96}),
    Candidate("one in eight, handed on", 64, POLYNOMIAL | HANDED_ON, {"causal": 0.96}),
    Candidate("words", 256, WORDS, {"causal": 0.98}),
    Candidate("words, handed on", 256, ALL_OF_IT, {"causal": 0.96, "window": 0.94}),
    Candidate("shared reciprocals", 256, SHARED_RECIPROCALS, {"softcap": 0.93}),
)
