"""A whole run: every case, the machine's ceilings, and what is kept when it is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone

import attnplug
from attnplug._arguments import as_float, as_list, expect
from attnplug._control.registration import check_name
from attnplug.bench._cases import Case
from attnplug.bench._ceilings import Ceiling, measure_ceiling
from attnplug.bench._clocks import Clock, clock_for
from attnplug.bench._environment import environment
from attnplug.bench._errors import BenchError
from attnplug.bench._measure import CACHES, measure_case
from attnplug.bench._noise import Watch
from attnplug.bench._records import Record, ranked
from attnplug.bench._report import Report
from attnplug.bench._sets import case_set

SECONDS = 0.15
Progress = Callable[[str, int, int], None]


def run(
    cases: str | Case | Iterable[Case],
    impls: Iterable[str] | None = None,
    *,
    baseline: str = "torch",
    caches: Sequence[str] = CACHES,
    seconds: float = SECONDS,
    tiny: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Measure implementations on cases: times, memory, and whether the results are right.

    An interruption (Ctrl-C, `KeyboardInterrupt`) ends the run and keeps the cases that are complete: the names of
    the others are in the report's `missing`. An implementation that raises is a record with its reason.

    Args:
        cases: one or more cases, or the name of a set.
        impls: names of implementations; by default all that there are.
        baseline: the one that ratios are to, measured even if it is not among `impls`.
        caches: `warm`, `cold`, or both.
        seconds: how long to measure each implementation on each case, for each direction and state of the caches.
        tiny: shrink every case, to see that everything runs. Such times mean nothing, so none is called the fastest.
        progress: called with what is done next, how many steps are done, and how many there are.

    Raises:
        UnknownImplementationError: `impls` or `baseline` name no implementation.
        BenchError: there is no such set, device or state of the caches, or there are no cases.

    Examples:
        >>> from attnplug.bench import Case, run
        >>> report = run(Case(heads=2, queries=16, head_size=8), impls=["torch", "aten_math"], seconds=0.01)
        >>> [(record.impl, record.correct) for record in report]
        [('torch', True), ('aten_math', True)]
    """
    names = _impls(impls, baseline)
    caches = _caches(caches)
    _check(seconds, tiny)
    cases = _cases(cases, tiny)
    clocks = {device: clock_for(device) for device in dict.fromkeys(case.device for case in cases)}
    kinds = list(dict.fromkeys((case.device, case.dtype) for case in cases))
    steps = Steps(progress, len(kinds) + len(cases) * (len(names) + 1))
    ceilings: dict[tuple[str, str], Ceiling] = {}
    records: list[Record] = []
    watch = Watch(clocks)
    try:
        for device, dtype in kinds:
            steps.next(f"what {device} can do with {dtype}")
            ceilings[device, dtype] = _ceiling(device, dtype, clocks[device])
        for number, case in enumerate(cases):
            steps.at(len(kinds) + number * (len(names) + 1))
            watch.look(case.device)
            records += measure_case(
                case,
                names,
                clocks[case.device],
                ceiling=ceilings[case.device, case.dtype],
                caches=caches,
                seconds=seconds,
                notify=steps.next,
            )
            watch.look(case.device)
    except KeyboardInterrupt:
        pass  # what is complete is worth keeping; the report says what is missing
    complete = {record.case for record in records}
    return Report(
        records=tuple(ranked(records, baseline, crown=not tiny)),
        environment=environment({case.device for case in cases}),
        ceilings=tuple(ceilings.values()),
        baseline=baseline,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        settings={"caches": caches, "seconds": seconds, "tiny": tiny},
        noise=watch.found(),
        missing=tuple(case.name for case in cases if case not in complete),
    )


def _ceiling(device: str, dtype: str, clock: Clock) -> Ceiling:
    try:
        return measure_ceiling(device, dtype, clock)
    except RuntimeError as error:
        raise BenchError(f"device: {device!r} cannot multiply {dtype} matrices: {error}") from error


class Steps:
    """Counts steps for a progress display."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def at(self, done: int) -> None:
        self._done = done

    def next(self, step: str) -> None:
        if self._progress is not None:
            self._progress(step, self._done, self._total)
        self._done += 1


def _cases(cases: str | Case | Iterable[Case], tiny: bool) -> list[Case]:
    if isinstance(cases, str):
        cases = case_set(cases)
    cases = [cases] if isinstance(cases, Case) else as_list("cases", cases, "cases or the name of a set")
    for case in cases:
        if not isinstance(case, Case):
            raise BenchError(f"cases: expected cases or the name of a set, got {case!r}")
    if not cases:
        raise BenchError("cases: there are none")
    return list(dict.fromkeys(case.shrunk() if tiny else case for case in cases))


def _caches(caches: Sequence[str]) -> list[str]:
    states = as_list("caches", caches, f"some of {CACHES}")
    if not states or not all(state in CACHES for state in states):
        raise BenchError(f"caches: expected some of {CACHES}, got {states!r}")
    return states


def _check(seconds: float, tiny: bool) -> None:
    expect("tiny", tiny, bool, "a bool")
    if not as_float("seconds", seconds, "a time") > 0:
        raise BenchError(f"seconds: expected a time above 0, got {seconds!r}")


def _impls(impls: Iterable[str] | None, baseline: str) -> list[str]:
    known = attnplug.list_flash_attention_impls()
    ordered = [record.name for record in attnplug.list_impls() if record.name in known]
    names = ordered if impls is None else [impls] if isinstance(impls, str) else as_list("impls", impls, "names")
    for name in names:
        check_name(name, "impls")
    names = list(dict.fromkeys(names))
    check_name(baseline, "baseline")
    return names if baseline in names else [baseline, *names]
