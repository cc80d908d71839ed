"""Decisions that are kept, each under all that it depends on: who decides, and the facts of the call."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnplug._call.autocast import any_autocast
from attnplug._call.facts import CallFacts, Layout
from attnplug._call.kinds import sizes_of
from attnplug._call.prepare import default_scale
from attnplug._call.requirements import needs_grad
from attnplug._dispatch.measured import applies, tell, tree_of
from attnplug._dispatch.ranges import in_range, is_profiled
from attnplug._dispatch.recording import unfused_warnings_wanted, warn_unfused
from attnplug._dispatch.resolver import Decision, resolve
from attnplug._dispatch.watched import among_watchers
from attnplug._errors import KernelError
from attnplug._params import params_of
from attnplug._registry.registry import BUILTIN, Registry
from attnplug._run.autograd import record_repeated, run
from attnplug._run.contract import KernelCall, Order, Result, checked_forward, declares, in_kernel, tensors_of
from attnplug._run.operator import is_watched, operator_of
from attnplug._run.repeated import Repeated
from attnplug._run.transforms import is_transformed, run_transformed
from attnplug._selection.selection import current_selection
from attnplug._selection.state import process, start, thread, when_started
from attnplug._selection.trees import Tree, walked
from attnplug._selection.watching import decided
from attnplug._types import Feature, SDPAParams, SDPBackend

KEPT = 4096
plans: dict[Hashable, Any] = {}
is_deterministic = torch._C._get_deterministic_algorithms
count_modes = torch._C._len_torch_dispatch_stack


def with_four_dimensions(mask: Tensor) -> Tensor:
    """Return a mask of fewer dimensions as a view of four, and any other as it is."""
    missing = 4 - mask.dim()
    if missing <= 0 or mask.is_nested or mask.layout is not torch.strided:
        return mask
    return mask.view(*(1,) * missing, *mask.shape)


class Plan:
    """A decision, and how to carry it out.

    Attributes:
        decision: what was chosen.
        scale: the default, which depends on the head size alone.
        grad: whether autograd records the call.
        unfused: whether a MATH implementation runs because others could not.
        simple: whether nothing has to be done around the kernel: no autograd, no check, no warning.
        plain: the kernel's `plain`, if all is simple, or what it prepared, which takes the tensors that there are,
            in their `Order`, where they are packed sequences; see `_run.repeated`.
        checked: whether there is nothing around the kernel but a check of what it returns.
    """

    def __init__(self, decision: Decision, facts: CallFacts, scale: float) -> None:
        self.decision, self.scale = decision, scale
        self.grad = needs_grad(facts)
        self.unfused = decision.backend is SDPBackend.MATH and bool(decision.passed_over)
        self.simple = not self.unfused and _is_simple(decision, self.grad, facts)
        kernel = decision.kernel
        self.plain: Callable[..., Result] | None = kernel.plain if self.simple else None
        self._forward: Callable[[SDPAParams], Result] = kernel.forward  # of one that is simple: it saves nothing
        self.checked = not (self.grad or self.unfused or decision.entry.distribution == BUILTIN)

    def __copy__(self) -> Plan:
        """Return a shallow copy, in a third of the time that one takes otherwise."""
        plan = object.__new__(type(self))
        plan.__dict__.update(self.__dict__)
        return plan

    def run(self, params: SDPAParams) -> Result:
        """Run the chosen kernel; returns `out` and `lse`."""
        if thread.state.watched:
            return among_watchers(self.decision, params, self._profiled)(params)
        return self._profiled(params)

    def _profiled(self, params: SDPAParams) -> Result:
        return in_range(self.decision.name, params, self.carry_out) if is_profiled() else self.carry_out(params)

    def run_as_given(self, params: SDPAParams) -> Result:
        """Run a call that was recognised, whose record was just built, with the user's mask and scale."""
        self.complete(params)
        if params.is_varlen and self.plain is not None and not is_profiled():
            watched, run = thread.state.watched, self._run_plain
            return among_watchers(self.decision, params, run)(params) if watched else run(params)
        if self.checked and not (
            thread.state.watched or is_profiled() or is_transformed() or any_autocast() or is_watched(params.query)
        ):
            out, lse, *_ = checked_forward(self.decision.entry, params)
            return out, lse
        return self.run(params)

    def complete(self, params: SDPAParams) -> None:
        """Give a record that was just built the scale and the mask that kernels get."""
        if params.scale is None:
            params.__dict__["scale"] = self.scale
        if params.attn_mask is not None:
            params.__dict__["attn_mask"] = with_four_dimensions(params.attn_mask)

    def watched_plain(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
        return_lse: bool,
    ) -> Result:
        """Run the kernel's `plain` among those who watch; most of them want to be told, and no more."""
        fields = {
            "query": query,
            "key": key,
            "value": value,
            "attn_mask": None if mask is None else with_four_dimensions(mask),
            "dropout": dropout,
            "is_causal": is_causal,
            "enable_gqa": enable_gqa,
            "scale": self.scale if scale is None else scale,
            "return_lse": return_lse,
        }
        params, as_it_is = params_of(fields), self._run_plain
        run = among_watchers(self.decision, params, as_it_is)
        if run is as_it_is:
            return self.plain(query, key, value, mask, dropout, is_causal, scale, enable_gqa)  # type: ignore[misc]  # only called where there is one
        return run(params)

    def _run_plain(self, params: SDPAParams) -> Result:
        if params.is_varlen:
            return self.plain(*Order.of(params).own(tensors_of(params)))  # type: ignore[misc]  # as above
        given = params.query, params.key, params.value, params.attn_mask, params.dropout, params.is_causal
        return self.plain(*given, params.scale, params.enable_gqa)  # type: ignore[misc]  # as above

    def carry_out(self, params: SDPAParams) -> Result:
        """Run the kernel, with what it needs around it, unseen by those who watch calls."""
        if self.simple and not any_autocast():
            return self._forward(params)
        if self.unfused and unfused_warnings_wanted():
            warn_unfused(self.decision)
        entry, kernel = self.decision.entry, self.decision.kernel
        if is_transformed():
            return run_transformed(entry, params)
        if not kernel.composite and is_watched(params.query) and not params.query.is_nested:
            return operator_of(entry).run(params)
        return run(entry, params, self.grad)

    def repeated(self, params: SDPAParams) -> Plan:
        """Return the plan for calls that differ from this one in nothing but where their tensors lie in memory.

        The call asks for nothing beyond PyTorch's arguments and an lse, or is one of packed sequences.

        Raises:
            KernelError: the kernel prepared something that cannot be called.
        """
        kernel = self.decision.kernel
        prepare = kernel.prepare_packed if params.is_varlen else kernel.prepare
        opaque = not (self.unfused or self.decision.entry.distribution == BUILTIN)
        can_differentiate = not self.grad or kernel.backward is not None
        fits = self.simple or (opaque and can_differentiate and params.attn_mask is None)
        if prepare is None or not fits:
            return self
        run = in_kernel(prepare, params)
        if run is None:
            return self
        if not callable(run):
            name, got = self.decision.name, type(run).__name__
            role = "prepare_packed" if params.is_varlen else "prepare"
            raise KernelError(f"implementation {name!r}: {role} must return a function or None, got {got}")
        plan = copy(self)
        plan.plain = _simply_prepared(self, run) if self.simple else _prepared(self, params, run)
        return plan


def _prepared(plan: Plan, params: SDPAParams, run: Callable[..., Any]) -> Callable[..., Result]:
    """Return a `plain` that runs what a kernel prepared for calls that repeat one.

    The comparison of their tensors does not see levels of forward-mode derivatives, nor PyTorch's own dispatch modes
    (fake tensors, and `make_fx`), which must see an operator.
    """
    repeated = Repeated(KernelCall.of(plan.decision.entry, params), params, run)

    def packed(*tensors: Tensor) -> Result:
        if forward_ad._current_level >= 0 or count_modes() > 0:
            return plan.carry_out(repeated.params(*tensors))
        if plan.grad:
            return record_repeated(repeated, *tensors)
        return repeated.forward(*tensors)[:2]

    def plain(  # as above, and without the time that stars take
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: None,
        dropout: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Result:
        if forward_ad._current_level >= 0 or count_modes() > 0:
            return plan.carry_out(repeated.params(query, key, value))
        if plan.grad:
            return record_repeated(repeated, query, key, value)
        if repeated.is_checked and not process.is_patched:  # `in_kernel` does no more
            returned = repeated.run(query, key, value)
            return plan.carry_out(repeated.params(query, key, value)) if returned is None else returned[:2]
        return repeated.forward(query, key, value)[:2]

    return packed if params.is_varlen else plain


def _simply_prepared(plan: Plan, run: Callable[..., Any]) -> Callable[..., Result] | None:
    """Return the same for a kernel with nothing around it; None where it has no `plain` to run else."""
    plain = plan.plain
    if plain is None:
        return None
    return lambda query, key, value, mask, *others: (
        run(query, key, value, mask) or plain(query, key, value, mask, *others)
    )


BY_LAYOUT = object()
"""Kept in a plan's place under facts that do not decide alone: the plans are kept under facts with a layout."""


class ByChoice:
    """Kept in a plan's place where measured choices decide: the plans are kept under the choice for the sizes."""

    plain = None

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.plans: dict[str | None, Any] = {}

    def find(self, params: SDPAParams) -> Any:
        """Return what is kept under the choice for the sizes of a call."""
        return self.plans.get(walked(self.tree, sizes_of(params)))


def find(impl: str | None, facts: CallFacts, params: SDPAParams) -> Plan | None:
    """Return the plan that is kept for a call, if there is one. 0.5 us."""
    who = who_decides(impl)
    plan: Any = plans.get((who, facts))
    if type(plan) is ByChoice:
        plan = plan.find(params)
    if plan is BY_LAYOUT:
        plan = plans.get((who, facts._replace(layout=Layout.of(params))))
    return plan


def make(impl: str | None, facts: CallFacts, params: SDPAParams, keep: bool = True) -> Plan:
    """Decide about a checked call in the form that kernels know, and keep the decision.

    Raises:
        NoImplementationError: nothing that is allowed supports the call.
        UnknownImplementationError: `impl` names no implementation.
    """
    registry = start()
    who = who_decides(impl)  # as it is before kernels are asked: what changes meanwhile must not find this plan
    key: Any = who, facts
    choices, choice = _choices(impl, facts, params, key if keep else None)
    decision = resolve(registry, current_selection(impl, choice), facts, params)
    decided(decision.name, decision.backend)
    plan = Plan(decision, facts, 0.0 if params.query.is_nested else default_scale(params.query))
    if keep:
        if len(plans) >= KEPT:
            plans.clear()
        place: dict[Any, Any] = plans
        if choices is not None:
            place, key = choices.plans, choice
        if decision.shape_dependent:
            place[key] = BY_LAYOUT
            place, key = plans, (who, facts._replace(layout=Layout.of(params)))
        place[key] = plan
    return plan


def _choices(
    impl: str | None, facts: CallFacts, params: SDPAParams, key: Hashable
) -> tuple[ByChoice | None, str | None]:
    """Return where plans are kept by choice, and the measured choice for a call; None where nothing is measured.

    `key` is None for a decision that is not kept.
    """
    if not applies(impl):
        return None, None
    tree = None if params.query.is_nested else tree_of(facts)
    choice = None if tree is None else walked(tree, sizes_of(params))
    if choice is None:
        tell(facts, params)
    if tree is None or key is None:
        return None, choice
    kept = plans.get(key)
    if type(kept) is not ByChoice:
        kept = plans[key] = ByChoice(tree)
    return kept, choice


def _forget(registry: Registry) -> None:
    """Forget every decision: the registry has changed, and what it let go must not be kept alive here."""
    plans.clear()


when_started(lambda registry: registry.listeners.append(_forget))


def who_decides(impl: str | None) -> tuple[Hashable, ...]:
    """Return all that a decision depends on besides the call itself."""
    registry = process.registry or start()
    return thread.state.scope, impl, process.activation, registry.generation, is_deterministic()


def _is_simple(decision: Decision, grad: bool, facts: CallFacts) -> bool:
    """Whether forward is all that has to run. Only built-in kernels qualify: their results are not checked."""
    entry, kernel = decision.entry, decision.kernel
    ours = entry.distribution == BUILTIN and kernel.composite and kernel.backward is None
    refuses_lse_gradient = grad and facts.extensions is not None and not declares(entry, Feature.LSE_GRADIENT)
    return ours and not refuses_lse_gradient
