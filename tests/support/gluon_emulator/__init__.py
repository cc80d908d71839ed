"""Runs Gluon kernels' own source on a CPU, and finds their races, wrong waits and missing fences.

Triton's interpreter does not know Gluon. Here a kernel is the Python function that it is written as, with Triton's
names replaced: tensors are torch tensors in float32, partitions of `warp_specialize` are threads of which one runs at
a time, barriers have phases. What the hardware does by itself is made as bad as it may be:

- shared memory is NaN until something is written;
- a copy of TMA makes its target NaN at once and lands when the seed says so, at the latest when nobody else can run;
- products and stores of TMA read their operands at once or at the wait for them, as the seed says;
- which thread goes on is drawn at every step; with some seeds, one always goes first.

Whether a result was right by luck is not left to the seed: every access to a buffer must be ordered with those before
it by barriers (a vector clock for each thread and copy, as in FastTrack: Flanagan and Freund, 2009), and what threads
write must be fenced before products and copies read it. A buffer is what the first dimension of an allocation counts.

Numbers are float32, whatever a descriptor says: rounding would hide small errors.
"""

from gluon_emulator.events import Fault
from gluon_emulator.launching import launch, mutant, run_plan

__all__ = ["Fault", "launch", "mutant", "run_plan"]
