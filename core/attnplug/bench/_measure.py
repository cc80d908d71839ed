"""One case: who takes it, who is right, and then all of them in turns.

Candidates alternate from sample to sample, so that whatever the machine does meanwhile hits all alike. A
candidate that raises is a record with its reason, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import attnplug
from attnplug.bench._cases import Case
from attnplug.bench._ceilings import Ceiling
from attnplug.bench._clocks import Clock
from attnplug.bench._correct import Reference
from attnplug.bench._inputs import Problem, make
from attnplug.bench._memory import is_out_of_memory, memory_limit, peak_bytes
from attnplug.bench._records import DECLINED, FAILED, RAN, Record, Timing

CACHES = ("warm", "cold")
_MOST, _LEAST = 30, 3  # samples
_CALLS = 50  # in a sample, at most
_TICK = 1e-9
_SHOWN = 400  # characters of a reason

Notify = Callable[[str], None]


@dataclass
class _Series:
    """The samples of one implementation for one direction and one state of the caches.

    Attributes:
        prepare: returns the call to be timed; itself it is not timed.
        calls: in a sample.
        wanted: how many samples to take.
    """

    impl: str
    name: str
    cold: bool
    prepare: Callable[[], Callable[[], Any]]
    calls: int = 1
    wanted: int = _LEAST
    seconds: list[float] = field(default_factory=list)

    def calibrate(self, clock: Clock, budget: float) -> None:
        """Choose calls and samples so that they take about `budget` seconds; the kernel has run before."""
        start = time.perf_counter()
        each = max(self.sample(clock), _TICK)
        cost = time.perf_counter() - start  # with the emptying of caches, and the forward before a backward
        if not self.cold:
            self.calls = min(_CALLS, max(1, round(budget / _MOST / each)))
            cost += each * (self.calls - 1)
        self.wanted = min(_MOST, max(_LEAST, round(budget / cost)))

    def sample(self, clock: Clock) -> float:
        """Return the seconds of one call."""
        call = self.prepare()
        return clock.cold(call) if self.cold else clock.warm(call, self.calls)

    def due(self, turn: int, turns: int) -> bool:
        """Whether a sample is due in this turn, so that all are spread evenly over the turns."""
        return (turn + 1) * self.wanted // turns > turn * self.wanted // turns


def measure_case(
    case: Case,
    impls: Sequence[str],
    clock: Clock,
    *,
    ceiling: Ceiling | None = None,
    caches: Sequence[str],
    seconds: float,
    notify: Notify,
    weigh: bool = True,
) -> list[Record]:
    """Measure implementations on one case.

    Args:
        case: the problem.
        impls: names, in the order of the records.
        clock: of the case's device.
        ceiling: what the machine can do, to be kept in the records.
        caches: `warm`, `cold` or both.
        seconds: how long to measure each implementation, for each direction and state of the caches.
        notify: called with what is done next.
        weigh: whether to measure memory too.
    """
    with memory_limit(torch.device(case.device)):
        try:
            problem = make(case)
            reference = Reference(problem)
        except Exception as error:  # nobody can run it: too large, or a GPU in trouble
            return [Record(case, impl, FAILED, f"inputs and reference: {described(error)}") for impl in impls]
        records = {}
        for impl in impls:
            notify(f"{case.name}: {impl}")
            records[impl] = replace(_tried(problem, reference, impl, weigh), ceiling=ceiling)
            _release(case)
        ran = [impl for impl in impls if records[impl].status == RAN]
        series = [one for impl in ran for one in _series(problem, impl, caches)]
        notify(f"{case.name}: {len(ran)} in turns")
        failures = _take_turns(series, clock, seconds)
    for one in series:
        if one.impl not in failures:
            found: dict[str, Any] = {one.name: Timing.of(one.seconds, one.calls)}
            records[one.impl] = replace(records[one.impl], **found)
    for impl, reason in failures.items():
        records[impl] = replace(records[impl], status=FAILED, reason=reason, correct=None, memory=None)
    return list(records.values())


def _tried(problem: Problem, reference: Reference, impl: str, weigh: bool) -> Record:
    """Ask an implementation whether it takes the call, hold its result against the reference, weigh its memory."""
    case = problem.case
    try:
        verdict = attnplug.can_use_impl(impl, problem.params())
        if not verdict:
            return Record(case, impl, DECLINED, "; ".join(verdict.reasons))
        mistake = reference.mistake(impl)
        memory = peak_bytes(lambda: problem.both(impl), torch.device(case.device)) if weigh else None
    except Exception as error:  # whatever a kernel raises is its own row
        return Record(case, impl, FAILED, described(error))
    return Record(case, impl, RAN, mistake[:_SHOWN], not mistake, memory=memory)


def _series(problem: Problem, impl: str, caches: Sequence[str]) -> Iterator[_Series]:
    for cache in caches:
        suffix, cold = ("_cold", True) if cache == "cold" else ("", False)
        yield _Series(impl, f"forward{suffix}", cold, lambda: problem.timed_forward(impl))
        if problem.case.backward:
            yield _Series(impl, f"backward{suffix}", cold, lambda: problem.timed_backward(impl))


def _take_turns(series: Sequence[_Series], clock: Clock, seconds: float) -> dict[str, str]:
    """Fill the series, in turns whose order reverses; return the reason of each implementation that failed."""
    failures: dict[str, str] = {}

    def attempt(one: _Series, step: Callable[..., Any], *arguments: Any) -> Any:
        if one.impl not in failures:
            try:
                return step(*arguments)
            except Exception as error:  # as in `_tried`
                failures[one.impl] = described(error)
        return None

    for one in series:
        attempt(one, one.calibrate, clock, seconds)
    turns = max((one.wanted for one in series), default=0)
    for turn in range(turns):
        for one in series if turn % 2 else reversed(series):
            if one.due(turn, turns):
                taken = attempt(one, one.sample, clock)
                if taken is not None:
                    one.seconds.append(taken)
    return failures


def _release(case: Case) -> None:
    """Give back to the GPU what PyTorch keeps for later: the next candidate may want it in other pieces."""
    if torch.device(case.device).type == "cuda":
        torch.cuda.empty_cache()


def described(error: BaseException) -> str:
    """Return an exception in one line; running out of memory in plain words first."""
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        return f"out of memory: {text}"[:_SHOWN]
    return f"{type(error).__name__}: {text}"[:_SHOWN]
