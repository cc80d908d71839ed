"""When a result is right: the contract's rule, written once.

The conformance kit, the benchmarks, production verification and the project's own tests hold results against
`Expected`. No implementation has a tolerance of its own.
"""

from attnplug._accuracy.rule import Expected, Mistake, Outcome

__all__ = ["Expected", "Mistake", "Outcome"]
