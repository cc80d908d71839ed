"""Implementations, a call and a selection to a decision: one implementation, or every reason why none."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from attnplug._call.device import name_of
from attnplug._call.facts import CallFacts
from attnplug._call.requirements import features, lacking, needs_grad
from attnplug._errors import FallbackWarning, NoImplementationError
from attnplug._messages import warn
from attnplug._registry.catalogue import KNOWN
from attnplug._registry.kernel import Kernel
from attnplug._registry.registry import Entry, Registry
from attnplug._selection.selection import Selection
from attnplug._selection.state import process, thread
from attnplug._selection.watching import RecordedCall
from attnplug._types import SDPAParams, SDPBackend, Verdict


@dataclass(frozen=True)
class Decision:
    """The implementation chosen for a call, and what was asked before it."""

    entry: Entry
    device: str  # of the call, such as `cuda:0`
    passed_over: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shape_dependent: bool = False
    """Whether any kernel asked looked at lengths, so that the decision holds for this shape alone."""

    told: dict[Hashable, RecordedCall] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def name(self) -> str:
        return self.entry.name

    @cached_property
    def kernel(self) -> Kernel:
        return self.entry.kernel

    @cached_property
    def backend(self) -> SDPBackend | None:
        return self.entry.spec.backend

    def call(self, params: SDPAParams) -> RecordedCall:
        """Return what those who watch are told of a call that the chosen kernel runs; built once for all like it."""
        family, module = self.kernel.family, thread.state.module
        backend = self.backend if family is None else family(params)
        call = self.told.get((backend, module))
        if call is None:
            call = RecordedCall(self.name, backend, self.passed_over, self.device, module)
            self.told[backend, module] = call
        return call


def resolve(registry: Registry, selection: Selection, call: CallFacts, params: SDPAParams) -> Decision:
    """Choose the implementation that runs a call; `params`, which has its facts, is for the kernels' `supports`.

    Raises:
        NoImplementationError: no allowed candidate supports the call; lists all reasons of each.
        UnknownImplementationError: `impl=` names none.
    """
    refused: dict[str, tuple[str, ...]] = {}
    shape_dependent = False
    for entry in selection.candidates(registry):
        reasons = refusals(entry, call, params)
        shape_dependent |= _looks_at_shape(entry)
        if not reasons:
            _report_fallback(selection, refused, entry.name)
            return Decision(entry, name_of(call.device), refused, shape_dependent)
        refused[entry.name] = reasons
    raise NoImplementationError(refused, selection.exact, _way_out(registry, selection, call))


def _way_out(registry: Registry, selection: Selection, call: CallFacts) -> str:
    """Return which of attnplug's own implementations would take the call if it were there, and what keeps it out."""
    return "\n".join(
        f"{verdict.name!r}, which takes such calls, {verdict.reasons[0]}"
        for verdict in _absent(registry, selection, call)
    )


def _absent(registry: Registry, selection: Selection, call: CallFacts) -> list[Verdict]:
    """Return a verdict for each of attnplug's own implementations that would take the call if it were there."""
    absent = registry.absent()
    return [
        Verdict(name, known.spec.backend, False, (absent[name],))
        for name, known in KNOWN.items()
        if name in absent
        and known.spec is not None
        and selection.allows(known.spec)
        and not lacking(known.spec.capabilities, call)
    ]


def refusals(entry: Entry, call: CallFacts, params: SDPAParams) -> tuple[str, ...]:
    """Return each reason why `entry` does not take the call; none means that it does.

    The kernel is imported only when everything that can be said without it speaks for it.
    """
    reasons = lacking(entry.spec.capabilities, call)
    if missing := entry.missing():
        reasons += (missing,)
    if reasons:
        return reasons
    kernel = entry.load()
    if kernel is None:
        return (f"is broken: {entry.broken}" if entry.broken else "is still being imported",)
    if needs_grad(call) and not kernel.differentiable:
        reasons += ("has no backward, and a gradient is needed",)
    if kernel.register_fn is not None and process.activation != entry.name:
        reasons += (
            f"overrides PyTorch's flash operator, so it runs only after activate_flash_attention_impl({entry.name!r})",
        )
    return reasons + kernel.missing(features(call), call.device, call.dtype) + kernel.refusals(params)


def verdict_of(entry: Entry, call: CallFacts, params: SDPAParams) -> Verdict:
    """Return whether `entry` takes the call, why not, and what its kernel says of a call that it takes."""
    reasons = refusals(entry, call, params)
    kernel = None if reasons else entry.load()
    notes = () if kernel is None else kernel.remarks(params)
    return Verdict(entry.name, entry.spec.backend, not reasons, reasons, notes)


class Answer(NamedTuple):
    """What `resolve` would choose, and a verdict for every implementation, chosen one first.

    `nearest` is the implementation that comes closest to taking the call, where none does or where one of the MATH
    family runs for want of a fused one; `remedy` is what would let it.
    """

    chosen: str | None
    verdicts: tuple[Verdict, ...]
    nearest: Verdict | None = None
    remedy: str = ""


def explain_all(registry: Registry, selection: Selection, call: CallFacts, params: SDPAParams) -> Answer:
    """Return what would run a call, and why not the others."""
    candidates = selection.candidates(registry)
    chosen: str | None = None
    verdicts = []
    for entry in candidates:
        verdict = verdict_of(entry, call, params)
        if verdict and chosen is None:
            chosen = entry.name
        elif verdict:
            verdict = replace(verdict, reasons=(f"{chosen} comes first",))
        verdicts.append(verdict)
    for entry in registry:
        if entry not in candidates:
            reasons = (selection.exclusion(entry), *refusals(entry, call, params))
            verdicts.append(Verdict(entry.name, entry.spec.backend, False, reasons))
    verdicts.sort(key=lambda verdict: verdict.name != chosen)
    return Answer(chosen, tuple(verdicts), *_nearest(registry, selection, call, verdicts, chosen))


def _nearest(
    registry: Registry, selection: Selection, call: CallFacts, verdicts: list[Verdict], chosen: str | None
) -> tuple[Verdict | None, str]:
    """Return the implementation that comes closest to taking a call that nothing fused takes, and what would let it."""
    if chosen is not None and verdicts[0].backend is not SDPBackend.MATH:
        return None, ""
    refused = [verdict for verdict in verdicts if not verdict.accepted]
    absent = _absent(registry, selection, call)
    if chosen is None:
        excluded = [each for each in refused if each.reasons == (selection.exclusion(registry.get(each.name)),)]
        if excluded:
            return excluded[0], f"impl={excluded[0].name!r}"
    else:
        behind = next((each for each in verdicts if each.accepted and _is_fused(each)), None)
        if behind is not None:
            return behind, f"impl={behind.name!r}"
        refused = [each for each in refused if _is_fused(each) and selection.allows(registry.get(each.name).spec)]
        absent = [each for each in absent if _is_fused(each)]
    if absent:
        return absent[0], registry.remedy(absent[0].name)
    nearest = min(refused, key=lambda verdict: len(verdict.reasons), default=None)
    if nearest is None:
        return None, ""
    entry = registry.get(nearest.name)
    return nearest, entry.record().remedy if nearest.reasons == (entry.missing(),) or entry.broken else ""


def _is_fused(verdict: Verdict) -> bool:
    return verdict.backend is not SDPBackend.MATH


def _looks_at_shape(entry: Entry) -> bool:
    return entry.loaded is not None and entry.loaded.shape_dependent


_REPORTED = 1024
"""How many are remembered: a reason may hold a size, of which a program that serves sees ever new ones."""
_reported: set[tuple[str, tuple[str, ...]]] = set()


def _report_fallback(selection: Selection, refused: Mapping[str, tuple[str, ...]], chosen: str) -> None:
    """Say once per implementation and reasons that a preferred implementation was passed over."""
    for name in selection.wanted:
        if name in refused and (name, refused[name]) not in _reported:
            if len(_reported) >= _REPORTED:
                _reported.clear()
            _reported.add((name, refused[name]))
            reasons = "; ".join(refused[name])
            warn(FallbackWarning(f"{name!r} is preferred but {reasons}; {chosen!r} runs instead"))
