"""Wrong kernels, to prove the checks: each is `Kernel`, which is correct, with one realistic bug."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mutants.kernel import Kernel


@dataclass(frozen=True)
class Mutant:
    """A wrong kernel, and the checks that must each catch it.

    Attributes:
        kernel: its docstring says what the bug is.
        checks: names of checks that must fail, each of which says what is wrong.
        dtype: the one in which it is checked.
    """

    kernel: type[Kernel]
    checks: tuple[str, ...]
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return self.kernel.__name__


MUTANTS: list[Mutant] = []


def wrong(*checks: str, dtype: str = "float32") -> Callable[[type[Kernel]], type[Kernel]]:
    """Add a kernel to the mutants, with the checks that must catch it, for `dtype`."""

    def add(kernel: type[Kernel]) -> type[Kernel]:
        assert kernel.__doc__ and checks
        MUTANTS.append(Mutant(kernel, checks, dtype))
        return kernel

    return add


def all_mutants() -> list[Mutant]:
    """Return every mutant."""
    from mutants import (  # noqa: F401, each registers its mutants
        compiling,
        dropout,
        gradients,
        heads,
        loading,
        logits,
        masks,
        memory,
        rounding,
        running,
        softmax,
        varlen,
    )

    return MUTANTS
