"""Kernels registered for a test; how many mutants are caught is said at the end."""

from __future__ import annotations

from typing import Any

import pytest

import attnplug
from attnplug import ImplSpec, SDPBackend
from mutants.kernel import CAPABILITIES


@pytest.fixture
def register():
    """Register a kernel for the length of a test and return its name."""

    def add(kernel, capabilities=CAPABILITIES, name="mine"):
        attnplug.register_impl(ImplSpec(name=name, kernel=kernel, backend=SDPBackend.MATH, capabilities=capabilities))
        return name

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [*terminalreporter.stats.get("passed", ()), *terminalreporter.stats.get("failed", ())]
    tried = [report for report in reports if dict(report.user_properties).get("mutant")]
    if tried:
        caught = [report for report in tried if report.passed]
        quick = sum(dict(report.user_properties)["quick"] for report in caught)
        told = f"wrong kernels caught: by a quick run {quick}, by a full run {len(caught)}, of {len(tried)}"
        terminalreporter.write_line(told)
