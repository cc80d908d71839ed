"""Kernels that cannot even be loaded."""

from __future__ import annotations

from mutants import wrong
from mutants.kernel import Kernel


@wrong("check_kernel_loads")
class SupportsIsNoFunction(Kernel):
    """Writes what it supports as a list, where attnplug calls a function."""

    supports = ("causal", "dropout")
