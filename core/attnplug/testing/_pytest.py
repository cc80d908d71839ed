"""The checks as cases of an author's own test. pytest is imported here, and only when this is called."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from attnplug._arguments import as_dict
from attnplug._errors import did_you_mean
from attnplug._registry.registry import PROGRAM
from attnplug.testing._checks import Check
from attnplug.testing._pool import Worker
from attnplug.testing._report import DECLINED, FAILED, NOT_APPLICABLE, Result
from attnplug.testing._runner import TIMEOUT, check_workers, plan
from attnplug.testing._running import find, run_check
from attnplug.testing._subject import Subject
from attnplug.testing._tasks import Task
from attnplug.testing.checks import all_checks


class BoundCheck:
    """A check and the subject it is for: what a parametrized test gets, and calls."""

    def __init__(self, check: Check, subject: Subject, isolated: bool, timeout: float) -> None:
        self.check, self.subject = check, subject
        self.isolated, self.timeout = isolated, timeout
        self.__doc__ = check.function.__doc__

    def __repr__(self) -> str:
        return f"{self.check.name}[{self.subject.dtype}]"

    def run(self) -> Result:
        """Run the check; the result says what became of it."""
        if self.isolated:
            return _worker().run(Task.of(self.check, self.subject), self.timeout)
        return run_check(self.check, self.subject)

    def __call__(self) -> None:
        """Run the check as a test: fail if it failed, skip if it does not apply."""
        import pytest

        result = self.run()
        if result.status == FAILED:
            pytest.fail(f"{result.claim}\n{result.reason}", pytrace=False)
        if result.status in (DECLINED, NOT_APPLICABLE):
            pytest.skip(f"{result.status}: {result.reason}")


@cache
def _worker() -> Worker:
    """Return the one worker of this process; several tests at once are pytest's to run."""
    worker = Worker()
    atexit.register(worker.close)
    return worker


def parametrize_with_checks(
    name: str,
    expected_failures: Mapping[str, str] | None = None,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    level: str = "quick",
    isolated: bool | None = None,
    timeout: float = TIMEOUT,
) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a test so that it runs once for each check of an implementation; it takes `check`, and calls it.

    Args:
        name: of the implementation. It is looked up when the test module is imported, so register it before.
        expected_failures: check to reason, for each check that is known to fail; `"check_values"` for all
            dtypes of a check, `"check_values[float16]"` for one. An expected failure that passes fails the
            test, so that the list never outlives its reasons.
        device: as for `check_impl`.
        dtype: as for `check_impl`.
        level: as for `check_impl`.
        isolated: whether checks run in another process, which is replaced when a kernel crashes it. By
            default on a GPU, for an implementation that other processes find: one that is installed.
        timeout: seconds that a check may take there.

    Raises:
        ValueError: a name in `expected_failures` is not a check.
        UnknownImplementationError: there is no implementation of this name.

    Examples:
        >>> from attnplug.testing import parametrize_with_checks
        >>> @parametrize_with_checks("torch")
        ... def test_torch_keeps_the_contract(check):
        ...     check()
    """
    import pytest

    none: Mapping[str, str] = {}
    expected = as_dict("expected_failures", none if expected_failures is None else expected_failures, "a mapping")
    check_workers(timeout=timeout)
    record = find(name)
    planned = list(plan(record, device, dtype, level))
    if isolated is None:
        isolated = record.distribution != PROGRAM and not planned[0][1].device.startswith("cpu")
    bound = [BoundCheck(check, subject, isolated, timeout) for check, subject in planned]
    known = {check.name for check in all_checks()} | {repr(each) for each in bound}
    for key in expected:
        if key not in known:
            raise ValueError(f"expected_failures: {key!r} is not a check{did_you_mean(key, known)}")

    def case(each: BoundCheck) -> Any:
        reason = expected.get(repr(each), expected.get(each.check.name))
        marks = () if reason is None else (pytest.mark.xfail(reason=reason, strict=True),)
        return pytest.param(each, id=repr(each), marks=marks)

    return pytest.mark.parametrize("check", [case(each) for each in bound])
