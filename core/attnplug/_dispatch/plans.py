"""Decisions that are kept, each under all that it depends on: who decides, and the facts of the call."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnplug._call.facts import CallFacts, Layout
from attnplug._call.prepare import default_scale
from attnplug._call.requirements import needs_grad
from attnplug._dispatch.recording import observe, unfused_warnings_wanted, warn_unfused
from attnplug._dispatch.resolver import Decision, resolve
from attnplug._registry.registry import BUILTIN, Registry
from attnplug._run.autograd import run
from attnplug._run.contract import declares
from attnplug._run.operator import is_watched, operator_of
from attnplug._run.transforms import is_transformed, run_transformed
from attnplug._selection.selection import current_selection
from attnplug._selection.state import process, start, thread, when_started
from attnplug._types import Feature, SDPAParams, SDPBackend

Result = tuple[Tensor, Tensor | None]

KEPT = 4096
_BY_LAYOUT = object()
_plans: dict[Hashable, Any] = {}
_is_deterministic = torch._C._get_deterministic_algorithms


@dataclass(slots=True)
class Plan:
    """A decision, and how to carry it out."""

    decision: Decision
    scale: float  # the default, which depends on the head size alone
    grad: bool
    unfused: bool  # whether a MATH implementation runs because others could not
    direct: Callable[[SDPAParams], Any] | None = None
    """The kernel's forward, if nothing has to be done around it: no autograd, no check, no warning."""

    def run(self, params: SDPAParams) -> Result:
        """Run the chosen kernel; returns `out` and `lse`."""
        if thread.state.recordings or process.trace:
            observe(self.decision, params)
        if self.direct is not None:
            return self.direct(params)  # type: ignore[no-any-return]
        if self.unfused and unfused_warnings_wanted():
            warn_unfused(self.decision)
        entry, kernel = self.decision.entry, self.decision.kernel
        if not kernel.composite and is_watched(params.query) and not params.query.is_nested:
            return operator_of(entry).run(params)
        if is_transformed():
            return run_transformed(entry, params)
        return run(entry, params, self.grad)


def find(impl: str | None, facts: CallFacts, params: SDPAParams) -> Plan | None:
    """Return the plan that is kept for a call, if there is one. 0.8 us."""
    key = _key(impl, facts)
    plan = _plans.get(key)
    if plan is _BY_LAYOUT:
        plan = _plans.get((*key[:-1], facts._replace(layout=Layout.of(params))))
    return plan


def make(impl: str | None, facts: CallFacts, params: SDPAParams, keep: bool = True) -> Plan:
    """Decide about a checked call in the form that kernels know, and keep the decision.

    Raises:
        NoImplementationError: nothing that is allowed supports the call.
        UnknownImplementationError: `impl` names no implementation.
    """
    registry = start()
    key = _key(impl, facts)  # as it is before kernels are asked: what changes meanwhile must not find this plan
    decision = resolve(registry, current_selection(impl), facts, params)
    unfused = decision.backend is SDPBackend.MATH and bool(decision.passed_over)
    scale = 0.0 if params.query.is_nested else default_scale(params.query)
    plan = Plan(decision, scale, needs_grad(facts), unfused)
    if _is_simple(plan, facts):
        plan.direct = decision.kernel.forward
    if keep:
        if len(_plans) >= KEPT:
            _plans.clear()
        if decision.shape_dependent:
            _plans[key] = _BY_LAYOUT
            key = (*key[:-1], facts._replace(layout=Layout.of(params)))
        _plans[key] = plan
    return plan


def _forget(registry: Registry) -> None:
    """Forget every decision: the registry has changed, and what it let go must not be kept alive here."""
    _plans.clear()


when_started(lambda registry: registry.listeners.append(_forget))


def _key(impl: str | None, facts: CallFacts) -> tuple[Hashable, ...]:
    registry = process.registry
    generation = -1 if registry is None else registry.generation
    return (thread.state.scope, impl, process.activation, generation, _is_deterministic(), facts)


def _is_simple(plan: Plan, facts: CallFacts) -> bool:
    """Whether nothing has to be done around the kernel's forward. The built-in ones are taken at their word."""
    entry, kernel = plan.decision.entry, plan.decision.kernel
    ours = entry.distribution == BUILTIN and kernel.composite and kernel.backward is None
    wants_lse = facts.extensions is not None and facts.extensions.return_lse
    return ours and not plan.unfused and not (plan.grad and wants_lse and not declares(entry, Feature.LSE_GRADIENT))
