"""The checks are proven: every wrong kernel is caught by checks that say what is wrong, the correct one passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import attnplug
from attnplug import ImplSpec, SDPBackend
from attnplug.testing import Check, CheckFailure, Result, all_checks, check_impl
from mutants import Mutant, all_mutants
from mutants.kernel import CAPABILITIES, Kernel

CHECKS: dict[str, Check] = {check.name: check for check in all_checks()}
NAME = "under_test"
DTYPES = ["float32", "float16", "bfloat16", "float64"]  # what the kernel declares, in the order of the kit


@contextmanager
def registered(kernel: Kernel) -> Iterator[str]:
    """Register a kernel for a block."""
    spec = ImplSpec(name=NAME, kernel=kernel, backend=SDPBackend.MATH, capabilities=CAPABILITIES, priority=-1000)
    attnplug.register_impl(spec)
    try:
        yield NAME
    finally:
        attnplug.unregister_impl(NAME)


def made(check: str, dtype: str, level: str) -> bool:
    """Whether a run of the whole kit makes a check for a dtype."""
    asked = CHECKS[check]
    return dtype in asked.dtypes_of(DTYPES, level) and (level == "full" or not asked.full)


def run_one(mutant: Mutant, check: str) -> Result:
    level = "full" if CHECKS[check].full else "quick"
    (result,) = check_impl(NAME, device="cpu", dtype=mutant.dtype, level=level, checks=[check]).results
    return result


def case(mutant: Mutant, *marks: pytest.MarkDecorator) -> Any:
    return pytest.param(mutant, marks=marks, id=f"{mutant.kernel.__module__}.{mutant.name}")


def is_quick(mutant: Mutant) -> bool:
    return not all(CHECKS[check].full for check in mutant.checks)


QUICK = [case(mutant) for mutant in all_mutants() if is_quick(mutant)]
FULL = [case(mutant, pytest.mark.slow) for mutant in all_mutants() if not is_quick(mutant)]


@pytest.mark.parametrize("mutant", [*QUICK, *FULL])
def test_wrong_kernel_is_caught_by_the_checks_that_name_its_mistake_and_a_line_shows_it_again(
    mutant: Mutant, record_property, capsys: pytest.CaptureFixture[str]
) -> None:
    assert all(made(check, mutant.dtype, "full") for check in mutant.checks)
    record_property("mutant", mutant.name)
    record_property("quick", any(made(check, mutant.dtype, "quick") for check in mutant.checks))
    simplest_last = sorted(mutant.checks, key=lambda check: CHECKS[check].full, reverse=True)
    with registered(mutant.kernel()):
        results = [run_one(mutant, check) for check in simplest_last]
        missed = [result.check for result in results if result.status != "failed"]
        assert not missed, f"{mutant.kernel.__doc__} Not noticed by {missed}"
        if is_quick(mutant):  # the line of a full check has the same form, and takes long
            assert_shown_again(results[-1].reason.rpartition("again: ")[2], capsys)


def assert_shown_again(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the line that a failure ends with, and assert that it fails, too."""
    if ".check(" in line:
        with pytest.raises(CheckFailure):
            exec(line)
    else:
        exec(line)
        assert "0 passed, 1 failed" in " ".join(capsys.readouterr().out.split())


def test_correct_kernel_passes_everything() -> None:
    with registered(Kernel()) as name:
        report = check_impl(name, device="cpu")
    assert report.passed, str(report)
    assert {result.status for result in report.results} == {"passed", "not applicable"}, str(report)
    undone = {result.check for result in report.results if result.status == "not applicable"}
    assert undone == {check.name for check in CHECKS.values() if check.full}


def test_every_check_has_a_wrong_kernel_that_it_must_catch() -> None:
    assert {check for mutant in all_mutants() for check in mutant.checks} == CHECKS.keys()
