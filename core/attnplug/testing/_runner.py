"""Which checks run for an implementation, and where: in this process, or in workers."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import torch

from attnplug._arguments import as_float, as_int, as_list
from attnplug._call.device import as_device
from attnplug._errors import did_you_mean
from attnplug._types import ImplRecord
from attnplug.testing._checks import Check
from attnplug.testing._pool import run_all
from attnplug.testing._report import Report, Result
from attnplug.testing._running import find, joined, run_check
from attnplug.testing._subject import DTYPES, Subject
from attnplug.testing._tasks import Task
from attnplug.testing.checks import all_checks

LEVELS = ("quick", "full")
LOADING = "check_kernel_loads"
MOST_WORKERS, TIMEOUT = 8, 300.0

Planned = list[tuple[Check, Subject]]


def check_impl(
    name: str,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    level: str = "quick",
    checks: Collection[str] | None = None,
    on_result: Callable[[Result], None] | None = None,
    workers: int | None = None,
    timeout: float = TIMEOUT,
) -> Report:
    """Check an implementation against everything that its capabilities promise.

    On a GPU each check runs in one of several worker processes. A kernel that faults there ends the CUDA context
    of its process; that check has then failed, with the driver's message, and the others continue in a
    fresh process. In this process, the default on a CPU, a kernel's crash ends your program.

    Args:
        name: of a registered implementation.
        device: such as `cpu` or `cuda`; by default a GPU if there is one that the implementation runs on.
        dtype: the dtype to check; by default each that is declared.
        level: `quick`, seconds for a fast kernel, or `full`: every dtype in every check, and long sequences.
        checks: the names of the checks to run; by default all.
        on_result: called with each result as it is found.
        workers: how many processes; 0 checks in this one. By default 0 on a CPU, else as many as there are cores, at
            most 8; and 0 for an implementation that was registered by a program and cannot be sent to another process.
        timeout: seconds that a check may take in a worker; one that takes longer has failed, and its process is ended.

    Raises:
        UnknownImplementationError: there is no implementation of this name.
        ValueError: it is not available here, does not run on `device` or for `dtype`; there is no such level, or
            no such check; or `workers` are asked for and its kernel cannot be sent to one.
        RuntimeError: a worker cannot be started.

    Examples:
        >>> from attnplug.testing import check_impl
        >>> report = check_impl("torch", dtype="float32")  # doctest: +SKIP
        >>> report.passed  # doctest: +SKIP
        True
    """
    told = None if on_result is None else lambda name, result: on_result(result)
    (report,) = check_impls(
        [name],
        device=device,
        dtype=dtype,
        level=level,
        checks=checks,
        on_result=told,
        workers=workers,
        timeout=timeout,
    )
    return report


def check_impls(
    names: Sequence[str],
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    level: str = "quick",
    checks: Collection[str] | None = None,
    on_result: Callable[[str, Result], None] | None = None,
    workers: int | None = None,
    timeout: float = TIMEOUT,
) -> list[Report]:
    """Check several implementations, in the same workers.

    Args:
        names: of registered implementations.
        device: as for `check_impl`.
        dtype: as for `check_impl`.
        level: as for `check_impl`.
        checks: as for `check_impl`.
        on_result: called with the implementation's name and each result as it is found.
        workers: as for `check_impl`.
        timeout: as for `check_impl`.

    Returns:
        A report for each, in the order of `names`.

    Raises:
        UnknownImplementationError, ValueError, RuntimeError: as `check_impl` does.
    """
    if checks is not None:
        checks = as_list("checks", checks, "the names of checks")
        _assert_known(checks)
    check_workers(workers, timeout)
    names = as_list("names", names, "the names of implementations")
    plans: dict[str, Planned] = {}
    for name in names:
        planned = list(plan(find(name), device, dtype, level))
        plans[name] = [each for each in planned if checks is None or each[0].name in checks]
    everything = [(name, *each) for name, planned in plans.items() for each in planned]

    def found(position: int, result: Result) -> None:
        if on_result is not None:
            on_result(everything[position][0], result)

    results: dict[str, list[Result]] = {name: [] for name in names}
    made = _run([each[1:] for each in everything], workers, timeout, found)
    for (name, *_), result in zip(everything, made, strict=True):
        results[name].append(result)
    return [Report(name, _device(find(name), device), level, tuple(results[name])) for name in names]


def _run(planned: Planned, workers: int | None, timeout: float, found: Callable[[int, Result], None]) -> list[Result]:
    """Make the checks in their places."""
    pieces = [
        (position, (number, count))
        for position, (check, subject) in enumerate(planned)
        for count in [check.pieces if subject.full else 1]
        for number in range(count)
    ]
    try:
        tasks = [_task(*planned[position], piece) for position, piece in pieces] if workers != 0 else []
    except ValueError:
        if workers is not None:
            raise
        workers = 0
    if workers is None:
        on_cpu = all(subject.device.startswith("cpu") for _, subject in planned)
        workers = 0 if on_cpu else min(MOST_WORKERS, os.cpu_count() or 1)
    if workers:
        return _in_pieces(planned, [position for position, _ in pieces], tasks, workers, timeout, found)
    results = []
    for position, (check, subject) in enumerate(planned):
        results.append(run_check(check, subject))
        found(position, results[-1])
    return results


def _task(check: Check, subject: Subject, piece: tuple[int, int]) -> Task:
    return Task.of(check, replace(subject, piece=piece))


def _in_pieces(
    planned: Planned,
    positions: list[int],
    tasks: list[Task],
    workers: int,
    timeout: float,
    found: Callable[[int, Result], None],
) -> list[Result]:
    """Make the checks in workers, which share the pieces of one; a check is found when its last piece is."""
    ended: dict[int, list[Result]] = {}
    counts = Counter(positions)
    results: dict[int, Result] = {}

    def piece_found(number: int, result: Result) -> None:
        position = positions[number]
        pieces = ended.setdefault(position, [])
        pieces.append(result)
        if len(pieces) == counts[position]:
            results[position] = joined(planned[position][0], pieces)
            found(position, results[position])

    run_all(tasks, workers, timeout, piece_found)
    return [results[position] for position in range(len(planned))]


def _assert_known(checks: Collection[str]) -> None:
    known = {check.name for check in all_checks()}
    for name in checks:
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"checks: {name!r} is not a check{did_you_mean(str(name), known)}")


def check_workers(workers: int | None = None, timeout: float = TIMEOUT) -> None:
    """Raise TypeError or ValueError unless these are a number of workers and the seconds that they are given."""
    if workers is not None and as_int("workers", workers, "an integer or None") < 0:
        raise ValueError(f"workers: expected a number from 0 on, got {workers!r}")
    if workers is not None and workers > (most := max(MOST_WORKERS, os.cpu_count() or 1)):
        raise ValueError(f"workers: expected at most {most}, got {workers!r}; each is a process with its own PyTorch")
    if not as_float("timeout", timeout, "seconds") > 0:
        raise ValueError(f"timeout: expected seconds above 0, got {timeout!r}")


def plan(
    record: ImplRecord, device: str | None, dtype: str | torch.dtype | None, level: str
) -> Iterator[tuple[Check, Subject]]:
    """Yield each check with the subject that it shall run for; of a kernel that cannot be loaded only that one."""
    if not isinstance(level, str) or level not in LEVELS:
        raise ValueError(f"level: expected one of {', '.join(LEVELS)}, got {level!r}")
    device = _device(record, device)
    dtypes = _dtypes(record, device, dtype)
    loads = record.status != "broken"
    for check in all_checks():
        if loads or check.name == LOADING:
            for each in check.dtypes_of(dtypes, level):
                yield check, Subject(record, device, each, level == "full")


def _device(record: ImplRecord, device: str | None) -> str:
    declared = record.capabilities.devices
    if device is None:
        for kind in ("cuda", *sorted(declared or ()), "cpu"):
            if (declared is None or kind in declared) and (kind != "cuda" or torch.cuda.is_available()):
                return kind
        return "cpu"
    kind = as_device("device", device).type
    if declared is not None and kind not in declared:
        raise ValueError(f"device: {record.name!r} runs on {', '.join(sorted(declared))}, got {device!r}")
    try:
        torch.zeros(1, device=device).item()  # which the meta device has not
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device: {device!r} cannot be used here: {error}") from error
    return str(device)


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
