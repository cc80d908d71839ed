"""Which checks run for an implementation, and what becomes of each."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterator

import torch

import attnplug
from attnplug._control.registration import check_name
from attnplug._errors import did_you_mean
from attnplug._types import ImplRecord
from attnplug.testing._checks import Check, all_checks
from attnplug.testing._compare import AGAIN, CheckFailure, Declined
from attnplug.testing._report import DECLINED, FAILED, NOT_APPLICABLE, PASSED, Report, Result
from attnplug.testing._subject import DTYPES, Subject

LEVELS = ("quick", "full")


def check_impl(
    name: str,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    level: str = "quick",
    checks: Collection[str] | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> Report:
    """Check an implementation against everything that its capabilities promise.

    Args:
        name: of a registered implementation.
        device: such as `cpu` or `cuda`; by default a card if there is one that the implementation runs on.
        dtype: the only one to check; by default each that is declared.
        level: `quick`, seconds for a fast kernel, or `full`: every dtype in every check, and long sequences.
        checks: the names of the only ones to make; by default all.
        on_result: called with each result as it is found.

    Raises:
        UnknownImplementationError: there is no implementation of this name.
        ValueError: it is not available here, does not run on `device` or for `dtype`; or there is no such level, or
            no such check.

    Examples:
        >>> from attnplug.testing import check_impl
        >>> report = check_impl("torch", dtype="float32")  # doctest: +SKIP
        >>> report.passed  # doctest: +SKIP
        True
    """
    record = find(name)
    device = _device(record, device)
    _assert_known(checks or ())
    results = []
    for check, subject in plan(record, device, dtype, level):
        if checks is not None and check.name not in checks:
            continue
        result = run_check(check, subject)
        results.append(result)
        if on_result is not None:
            on_result(result)
    return Report(name, device, level, tuple(results))


def find(name: str) -> ImplRecord:
    """Return the record of the implementation to check.

    Raises:
        UnknownImplementationError: there is none.
        ValueError: it cannot run on this machine, or is broken; says why.
    """
    records = {record.name: record for record in attnplug.list_impls()}
    if name not in records:
        check_name(name)
    if records[name].status != "available":
        raise ValueError(f"implementation {name!r} is {records[name].status}: {records[name].reason}")
    return records[name]


def _assert_known(checks: Collection[str]) -> None:
    known = {check.name for check in all_checks()}
    for name in checks:
        if name not in known:
            raise ValueError(f"checks: {name!r} is no check{did_you_mean(name, known)}")


def plan(
    record: ImplRecord, device: str | None, dtype: str | torch.dtype | None, level: str
) -> Iterator[tuple[Check, Subject]]:
    """Yield each check with the subject that it shall run for."""
    if level not in LEVELS:
        raise ValueError(f"level: expected one of {', '.join(LEVELS)}, got {level!r}")
    device = _device(record, device)
    dtypes = _dtypes(record, device, dtype)
    for check in all_checks():
        for each in check.dtypes_of(dtypes, level):
            yield check, Subject(record, device, each, level == "full")


def run_check(check: Check, subject: Subject) -> Result:
    """Run one check and say what became of it."""
    start = time.perf_counter()
    cards = [torch.device(subject.device)] if subject.device.startswith("cuda") else []
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(cards):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            status, reason = _outcome(check, subject)
    except CheckFailure as failure:
        status, reason = FAILED, str(failure)
    except Exception as error:  # whatever a kernel raises is the kernel's failure, and the next check goes on
        status, reason = FAILED, f"raised {type(error).__name__}: {error}"
    if status == FAILED and not reason.rpartition("\n")[2].startswith(AGAIN):
        reason = f"{reason}\n{_again(check, subject)}"
    seconds = time.perf_counter() - start
    return Result(check.name, subject.dtype, status, reason, tuple(subject.declined), check.claim, seconds)


def _again(check: Check, subject: Subject) -> str:
    """Return a line of Python that makes the check again."""
    where = f"device={subject.device!r}, dtype={subject.dtype!r}, level={'full' if subject.full else 'quick'!r}"
    run = f"check_impl({subject.name!r}, {where}, checks=[{check.name!r}])"
    return f"{AGAIN}from attnplug.testing import check_impl; print({run})"


def _outcome(check: Check, subject: Subject) -> tuple[str, str]:
    if reason := _not_applicable(check, subject):
        return NOT_APPLICABLE, reason
    try:
        check.function(subject)
    except Declined as declined:
        if str(declined):
            return DECLINED, str(declined)
    if subject.ran:
        return PASSED, ""
    if not subject.declined:
        return NOT_APPLICABLE, subject.uncovered[0] if subject.uncovered else "asks for nothing that is declared"
    if check.may_decline:
        return DECLINED, subject.declined[0]
    declared = ", ".join(feature.name for feature in check.features) or "its dtypes and head sizes"
    return FAILED, f"declares {declared} but declines every call that asks for it: {subject.declined[0]}"


def _not_applicable(check: Check, subject: Subject) -> str:
    missing = [feature.name for feature in check.features if not subject.has(feature)]
    if missing:
        return f"does not declare {', '.join(missing)}"
    if check.dtypes in DTYPES and check.dtypes != subject.dtype:
        return f"does not declare {check.dtypes}"
    if check.full and not subject.full:
        return "part of a full run only"
    if check.gradients and not subject.gradients:
        return "has no backward"
    return ""


def _device(record: ImplRecord, device: str | None) -> str:
    declared = record.capabilities.devices
    if device is None:
        for kind in ("cuda", *sorted(declared or ()), "cpu"):
            if (declared is None or kind in declared) and (kind != "cuda" or torch.cuda.is_available()):
                return kind
        return "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device: {device!r} is none: {error}") from error
    if declared is not None and kind not in declared:
        raise ValueError(f"device: {record.name!r} runs on {', '.join(sorted(declared))}, got {device!r}")
    try:
        torch.zeros(1, device=device).item()  # which the meta device has not
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device: {device!r} cannot be used here: {error}") from error
    return device


def _dtypes(record: ImplRecord, device: str, dtype: str | torch.dtype | None) -> list[str]:
    declared = [each for each in DTYPES if Subject(record, device, each, False).parts]
    if not declared:
        raise ValueError(f"device: {record.name!r} declares nothing for {device}: {record.capabilities}")
    if dtype is None:
        return declared
    wanted = str(dtype).removeprefix("torch.")
    if wanted not in declared:
        raise ValueError(f"dtype: {record.name!r} declares {', '.join(declared)} on {device}, got {wanted!r}")
    return [wanted]
