"""From cases to choices: what is measured, and which of the right results is the fastest beyond noise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import torch

from attnplug._arguments import as_dict, as_float, as_list, expect
from attnplug._call.facts import CallFacts
from attnplug._call.kinds import kind_of
from attnplug._call.machine import device_identity, plugin_versions, runtime_versions
from attnplug._control.registration import check_name
from attnplug._errors import ChoicesWarning
from attnplug._messages import warn
from attnplug._registry.registry import DEFAULT
from attnplug._selection.choice_tables import Choice, Kind, Table
from attnplug._selection.choices import Choices
from attnplug._selection.selection import runs_only_where_named
from attnplug._selection.state import start
from attnplug.bench import BenchError, Case, Cases, Record, Report, case_set
from attnplug.bench._clocks import clock_for
from attnplug.bench._inputs import empty_params
from attnplug.bench._measure import measure_case
from attnplug.bench._noise import Watch
from attnplug.bench._records import RAN, ranked
from attnplug.bench._run import SECONDS, Progress, Steps
from attnplug.tuning._machine import busy


def tune(
    cases: str | Case | Iterable[Case],
    impls: str | Iterable[str] | None = None,
    *,
    seconds: float = SECONDS,
    progress: Progress | None = None,
) -> Choices:
    """Measure every implementation on the cases, and choose the fastest for each kind of call.

    Candidates alternate, as in `attnplug.bench.run`. What counts is the time of forward and, where a case has backward,
    of backward. Only an implementation whose result in this very measurement is right can be chosen, and within the
    noise (where the ranges from the 20th to the 80th percentile meet) the earlier one in the default order stays. Of
    several cases of one kind, that which was called most is measured, and of these the largest.

    An interruption (Ctrl-C, `KeyboardInterrupt`) ends the measurement and keeps the kinds that are complete.

    Args:
        cases: what `capture()` collected, cases, or the name of a set of `attnplug.bench`.
        impls: names of the candidates, beside `torch`; by default all but those that run only where they are named,
            such as quantized ones, whose results are right only within 5 %.
        seconds: how long to measure each implementation on each kind, for each direction.
        progress: called with what is done next, how many steps are done, and how many there are.

    Returns:
        Choices; `str()` is a table, `save()` writes them to a file, `use_choices` applies them.

    Warns:
        ChoicesWarning: the machine is busy with other programs.

    Raises:
        UnknownImplementationError: `impls` name no implementation.
        BenchError: there is no such set or device, or there are no cases.

    Examples:
        >>> import attnplug
        >>> from attnplug.bench import Case
        >>> choices = attnplug.tune([Case(heads=2, queries=16, head_size=8)], ["torch", "aten_math"], seconds=0.01)
        >>> [str(choice.kind) for choice in choices]
        ['float32 D8, B·H ≤2, S ≤16']
    """
    counts, names = _counted(cases), _candidates(impls)
    if not as_float("seconds", seconds, "a time") > 0:
        raise BenchError(f"seconds: expected a time above 0, got {seconds!r}")
    clocks = {device: clock_for(device) for device in dict.fromkeys(case.device for case in counts)}
    if reason := busy(clocks):
        warn(ChoicesWarning(f"{reason}; measured times are unreliable, so fewer choices are made"))
    kinds = _representatives(counts)
    steps = Steps(progress, len(kinds) * (len(names) + 1))
    records: list[Record] = []
    watch = Watch(clocks)
    try:
        for number, case in enumerate(kinds.values()):
            steps.at(number * (len(names) + 1))
            clock = clocks[case.device]
            watch.look(case.device)
            records += measure_case(
                case, names, clock, caches=("warm",), seconds=seconds, notify=steps.next, weigh=False
            )
    except KeyboardInterrupt:
        pass  # what is complete is worth keeping; the notes say what is missing
    choices = choices_from(records, counts)
    notes = [f"While it was measured, {noise}." for noise in [watch.found()] if noise.loud]
    complete = {record.case for record in records}
    if missing := [case.name for case in kinds.values() if case not in complete]:
        notes.append(f"Interrupted: not measured are {', '.join(missing)}.")
    return replace(choices, notes=(*choices.notes, *notes))


def choices_from(report: Report | Sequence[Record], counts: Mapping[Case, int] | None = None) -> Choices:
    """Return the choices that follow from what was measured on this machine.

    Args:
        report: of `attnplug.bench.run`, or records.
        counts: how often a program calls each case.

    Examples:
        >>> from attnplug.bench import Case, Record, Timing
        >>> from attnplug.tuning import choices_from
        >>> case = Case(heads=2, queries=16, head_size=8)
        >>> found = {"torch": 2e-6, "aten_math": 1e-6}
        >>> records = [Record(case, impl, "ran", "", True, Timing(t, t, t, 9)) for impl, t in found.items()]
        >>> [(choice.impl, choice.gain) for choice in choices_from(records)]
        [('aten_math', 2.0)]
    """
    records = as_list("report", report, "a Report or records")
    for record in records:
        expect("report", record, Record, "a Report or records")
    if not isinstance(report, Report):
        records = ranked(records, DEFAULT)
    counted: dict[Any, int] = {} if counts is None else as_dict("counts", counts, "how often each case is called")
    for case in counted:
        expect("counts", case, Case, "cases as keys")
    order = {name: place for place, name in enumerate(_default_order())}
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    chosen: dict[tuple[str, Kind], Choice] = {}
    for case in dict.fromkeys(record.case for record in records):
        measured = sorted((one for one in records if one.case == case), key=lambda one: order.get(one.impl, len(order)))
        choice = _choice(kind_of_case(case), measured, created)
        if choice is not None:
            chosen.setdefault((case.device, choice.kind), choice)
    notes = [*_notes(records), *_shares(chosen, counted)]
    return Choices(_tables(chosen, {record.impl for record in records}), tuple(notes))


def _choice(kind: Kind, records: Sequence[Record], created: str) -> Choice | None:
    """Return the choice among records of one case in the default order; None if nothing was right."""
    ran = [(record, record.total) for record in records if record.status == RAN and record.total is not None]
    for record, total in ran:
        if record.fastest:  # right, and no other that is right is faster beyond noise
            default, seconds = ran[0][0].impl, ran[0][1].median
            return Choice(kind, record.impl, default, total.median, seconds, created)
    return None


def kind_of_case(case: Case) -> Kind:
    """Return the kind of call that a case is."""
    with torch.enable_grad():
        params = empty_params(case)
        facts = CallFacts.of(params)
        assert facts is not None, case
        return kind_of(facts, params)


def _representatives(counts: Mapping[Case, int]) -> dict[tuple[str, Kind], Case]:
    """Return the case to be measured for each kind of call on each device."""
    found: dict[tuple[str, Kind], Case] = {}
    for case in counts:
        key = (case.device, kind_of_case(case))
        known = found.get(key)
        if known is None or (counts[case], case.forward_flops) > (counts[known], known.forward_flops):
            found[key] = case
    return found


def _tables(chosen: Mapping[tuple[str, Kind], Choice], impls: set[str]) -> tuple[Table, ...]:
    registry = start()
    origins = {entry.distribution for entry in registry if entry.name in impls}
    versions = runtime_versions() | {
        name: version for name, version in sorted(plugin_versions(registry).items()) if name in origins
    }
    tables = []
    for device in dict.fromkeys(device for device, _ in chosen):
        identity = device_identity(_with_index(device))
        assert identity is not None, device  # it was measured
        choices = tuple(choice for (where, _), choice in chosen.items() if where == device)
        tables.append(Table(*identity, versions, choices))
    together = Choices()
    for one in tables:  # two equal GPUs have one table
        together |= Choices((one,))
    return together.tables


def _with_index(device: str) -> torch.device:
    found = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found


def _notes(records: Sequence[Record]) -> list[str]:
    """Return what is worth knowing of a measurement, in sentences."""
    notes = [
        f"WRONG, so not chosen: {record.impl} for {record.case.name}: {record.reason}"
        for record in records
        if record.correct is False
    ]
    nothing = [
        case.name
        for case in dict.fromkeys(record.case for record in records)
        if not any(record.correct for record in records if record.case == case)
    ]
    if nothing:
        notes.append(f"Nothing was right for {', '.join(nothing)}: the default order stays.")
    return notes


def _shares(chosen: Mapping[tuple[str, Kind], Choice], counts: Mapping[Case, int]) -> list[str]:
    """Return how long all calls together took and take, by the measurements."""
    before = after = 0.0
    for case, count in counts.items():
        choice = chosen.get((case.device, kind_of_case(case)))
        if choice is not None:
            before, after = before + count * choice.default_seconds, after + count * choice.seconds
    if not after or before == after:
        return []
    return [f"All these calls together: {before * 1e3:.3g} ms by default, {after * 1e3:.3g} ms so chosen."]


def _counted(cases: str | Case | Iterable[Case]) -> dict[Case, int]:
    if isinstance(cases, str):
        cases = case_set(cases)
    if isinstance(cases, Cases):
        counts = dict(cases)
    else:
        listed = [cases] if isinstance(cases, Case) else as_list("cases", cases, "cases or the name of a set")
        for case in listed:
            if not isinstance(case, Case):
                raise BenchError(f"cases: expected cases or the name of a set, got {case!r}")
        counts = dict(Cases(listed))
    if not counts:
        raise BenchError("cases: there are none; capture() collects those that a program calls")
    return counts


def _candidates(impls: str | Iterable[str] | None) -> list[str]:
    """Return the names of the candidates in the default order, `torch` among them: what is now must be measured."""
    order = _default_order()
    if impls is None:
        return [entry.name for entry in start() if not runs_only_where_named(entry.spec)]
    names = [impls] if isinstance(impls, str) else as_list("impls", impls, "names")
    for name in names:
        check_name(name, "impls")
    return [name for name in order if name in names or name == DEFAULT]


def _default_order() -> list[str]:
    return [entry.name for entry in start()]
