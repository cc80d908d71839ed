"""What becomes of one check."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch

import attnplug
from attnplug._control.registration import check_name
from attnplug._registry.discovery import get_registry
from attnplug._types import ImplRecord
from attnplug.testing._checks import Check
from attnplug.testing._failure import AGAIN, CheckFailure, Declined, told
from attnplug.testing._report import DECLINED, FAILED, NOT_APPLICABLE, PASSED, STATUSES, Result
from attnplug.testing._subject import DTYPES, Subject


def find(name: str) -> ImplRecord:
    """Return the record of the implementation to check.

    Its kernel is loaded, because some say only then what is missing here. A check tells of one that cannot be.

    Raises:
        UnknownImplementationError: there is none.
        ValueError: it cannot run on this machine, or its plugin is broken; says why.
    """
    record = _record(name)
    if record.status == "available":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", attnplug.PluginWarning)  # the check of this says the same
            get_registry().get(name).load()
        record = _record(name)
    if record.status != "available" and not (record.status == "broken" and name in get_registry()):
        raise ValueError(f"implementation {name!r} is {record.status}: {record.reason}")
    return record


def _record(name: str) -> ImplRecord:
    records = {record.name: record for record in attnplug.list_impls()}
    if not isinstance(name, str) or name not in records:
        check_name(name, "name")
    return records[name]


def run_check(check: Check, subject: Subject) -> Result:
    """Run one check and say what became of it."""
    start = time.perf_counter()
    devices = [torch.device(subject.device)] if subject.device.startswith("cuda") else []
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            status, reason = _outcome(check, subject)
    except CheckFailure as failure:
        status, reason = FAILED, str(failure)
    except Exception as error:  # whatever a kernel raises is the kernel's failure, and the next check goes on
        status, reason = FAILED, f"raised {told(error)}"
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
    if lacking := subject.lacking(check.features):
        return DECLINED, "; ".join(lacking)
    try:
        check.function(subject)
    except Declined as declined:
        if str(declined):
            return DECLINED, str(declined)
    if subject.ran:
        return PASSED, ""
    if not subject.declined:
        return NOT_APPLICABLE, subject.uncovered[0] if subject.uncovered else "asks for nothing that is declared"
    if check.may_decline or subject.piece[1] > 1:  # of the pieces together `joined` tells
        return DECLINED, subject.declined[0]
    return FAILED, _declines_all(check, subject.declined[0])


def _declines_all(check: Check, reason: str) -> str:
    declared = ", ".join(feature.name for feature in check.features) or "its dtypes and head sizes"
    return f"declares {declared} but declines every call that asks for it: {reason}"


def joined(check: Check, pieces: Sequence[Result]) -> Result:
    """Return what became of a check of which these are the pieces."""
    if len(pieces) == 1:
        return pieces[0]
    reasons = {status: [each.reason for each in pieces if each.status == status] for status in STATUSES}
    status = next(status for status in (FAILED, PASSED, DECLINED, NOT_APPLICABLE) if reasons[status])
    reason = "\n".join(dict.fromkeys(reasons[status])) if status == FAILED else reasons[status][0]
    if status == DECLINED and not check.may_decline:
        status, reason = FAILED, _declines_all(check, reason)
    declined = tuple(call for each in pieces for call in each.declined)
    return replace(pieces[0], status=status, reason=reason, declined=declined, seconds=sum(p.seconds for p in pieces))


def _not_applicable(check: Check, subject: Subject) -> str:
    missing = [feature.name for feature in check.features if not subject.has(feature)]
    if missing:
        return f"does not declare {', '.join(missing)}"
    if check.dtypes in DTYPES and check.dtypes != subject.dtype:
        declared = Subject(subject.record, subject.device, check.dtypes, subject.full).parts
        return f"is made for {check.dtypes} alone" if declared else f"does not declare {check.dtypes}"
    if check.full and not subject.full:
        return "part of a full run only"
    if check.gradients and not subject.gradients:
        return "has no backward"
    return ""
