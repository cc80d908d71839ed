"""The checks are proven: every wrong kernel is caught by checks that say what is wrong, the correct one passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from mutants import Mutant, all_mutants
from mutants.kernel import CAPABILITIES, Kernel

import attnplug
from attnplug import ImplSpec, SDPBackend
from attnplug.testing import Check, Result, all_checks, check_impl
from attnplug.testing._runner import find, run_check
from attnplug.testing._subject import Subject

CHECKS: dict[str, Check] = {check.name: check for check in all_checks()}
NAME = "under_test"


@contextmanager
def registered(kernel: Kernel) -> Iterator[str]:
    """Register a kernel for a block."""
    spec = ImplSpec(name=NAME, kernel=kernel, backend=SDPBackend.MATH, capabilities=CAPABILITIES, priority=-1000)
    attnplug.register_impl(spec)
    try:
        yield NAME
    finally:
        attnplug.unregister_impl(NAME)


def results(mutant: Mutant) -> dict[str, Result]:
    """Return what the checks that must catch a mutant say of it."""
    with registered(mutant.kernel()) as name:
        subject = {check: Subject(find(name), "cpu", mutant.dtype, False) for check in mutant.checks}
        return {check: run_check(CHECKS[check], subject[check]) for check in mutant.checks}


@pytest.mark.parametrize("mutant", all_mutants(), ids=lambda mutant: f"{mutant.kernel.__module__}.{mutant.name}")
def test_wrong_kernel_is_caught_by_the_checks_that_name_its_mistake(mutant: Mutant, record_property) -> None:
    record_property("mutant", mutant.name)
    missed = [check for check, result in results(mutant).items() if result.status != "failed"]
    assert not missed, f"{mutant.kernel.__doc__} Not noticed by {missed}"


def test_correct_kernel_passes_everything() -> None:
    with registered(Kernel()) as name:
        report = check_impl(name, device="cpu")
    assert report.passed, str(report)
    assert {result.status for result in report.results} == {"passed", "not applicable"}, str(report)
    undone = {result.check for result in report.results if result.status == "not applicable"}
    assert undone == {"check_nested_tensors"} | {check.name for check in CHECKS.values() if check.full}


def test_there_are_wrong_kernels_for_every_group_of_checks() -> None:
    assert len(all_mutants()) >= 40
    named = {check for mutant in all_mutants() for check in mutant.checks}
    modules = {check.function.__module__ for check in CHECKS.values()}
    covered = {CHECKS[name].function.__module__ for name in named}
    # attnplug itself answers empty calls, and the correct kernel has no nested tensors.
    assert modules - covered == {"attnplug.testing.checks.empty", "attnplug.testing.checks.nested"}
