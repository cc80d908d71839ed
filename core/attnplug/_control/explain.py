"""Why this one, and why not the others, without running anything."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from attnplug._api.dense import scaled_dot_product_attention
from attnplug._api.varlen import varlen_attn
from attnplug._call.device import described
from attnplug._call.facts import CallFacts, nested_facts
from attnplug._call.prepare import is_empty, prepare_dense, prepare_varlen
from attnplug._call.validate import is_sharded
from attnplug._dispatch import traced
from attnplug._dispatch.measured import applies, because, choice_of
from attnplug._dispatch.resolver import Answer, explain_all, verdict_of
from attnplug._run.contract import DIFFERENTIABLE
from attnplug._run.sharded import described_share, share_of
from attnplug._selection.selection import current_selection
from attnplug._selection.state import start, start_outside
from attnplug._tables import WIDTH, html_table, table, wrap
from attnplug._types import CausalVariant, SDPAParams, Verdict, family


@dataclass(frozen=True)
class Explanation:
    """What would run, and a verdict for every implementation; `str()` is a table, 80 columns wide.

    Attributes:
        chosen: the implementation that would run; None where nothing that is allowed supports the call, and
            where the call is empty.
        candidates: a verdict for every implementation, the chosen one first.
        empty: whether some size is zero, so that the call returns what the formulas say and no kernel runs.
        nearest: where nothing would run, the implementation that comes closest, with its reasons; where one of the
            MATH family would, the fused one that does. It may be one that is not installed. None elsewhere.
        remedy: what would let `nearest` run, a command or an argument of the call; empty if neither does.
        measured: while measured choices are in use, what was measured for the call, or why no choice holds for it.
    """

    chosen: str | None
    candidates: tuple[Verdict, ...]
    empty: bool = False
    nearest: Verdict | None = None
    remedy: str = ""
    measured: str = ""

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return name, family, answer, and reasons and notes of each implementation, for a table."""
        return [
            (
                verdict.name,
                family(verdict.backend),
                "runs" if verdict.name == self.chosen else "could" if verdict.accepted else "no",
                "; ".join(verdict.reasons + verdict.notes),
            )
            for verdict in self.candidates
        ]

    def advice(self) -> str:
        """Return the nearest miss and what would let it run, in one line; empty where nothing better exists."""
        if self.nearest is None:
            return ""
        reasons = "; ".join(self.nearest.reasons)
        way = f". Remedy: {self.remedy}" if self.remedy and self.remedy not in reasons else ""
        return f"Nearest miss: {self.nearest.name}: {reasons}{way}"

    def __str__(self) -> str:
        lines = [table(HEADERS, self.rows(), WIDTH)]
        lines += ["\n".join(wrap(text, WIDTH)) for text in (self.advice(), self.measured) if text]
        return "\n\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        strong = [number for number, verdict in enumerate(self.candidates) if verdict.name == self.chosen]
        return html_table(HEADERS, self.rows(), strong=strong, caption=self.advice() or self.measured)


HEADERS = ("implementation", "family", "", "reasons")
_EMPTY = ("is not asked: the call is empty, and no kernel runs",)
_DENSE = inspect.signature(scaled_dot_product_attention)
_VARLEN = inspect.signature(varlen_attn)
_VARLEN_ALONE = tuple(name for name in _VARLEN.parameters if name not in _DENSE.parameters)


def explain(
    query: Any,
    key: Any,
    value: Any,
    *args: Any,
    impl: str | None = None,
    compute_capability: tuple[int, int] | None = None,
    **kwargs: Any,
) -> Explanation:
    """Explain which implementation would run a call, and why each of the others would not.

    Takes the arguments of `scaled_dot_product_attention`, or, if the call has `cu_seq_q`, those of
    `varlen_attn`. Nothing runs, but kernels whose `supports` has to be called are imported.

    Args:
        query: as for the call. May be a fake tensor, even on a device that this machine does not have.
        key: likewise.
        value: likewise.
        *args: the rest of the call, by position.
        **kwargs: the rest of the call, by name.
        impl: as `impl=` of the call.
        compute_capability: answer for an NVIDIA GPU of this compute capability, such as `(9, 0)`, instead of
            this machine's; everything but the GPU is as installed on this machine.

    Raises:
        TypeError, ValueError: what the call itself would raise for its arguments; `compute_capability` is not one,
            or is given for a query that is on no CUDA device.
        UnknownImplementationError: `impl` names no implementation.

    Examples:
        >>> import torch, attnplug
        >>> query = torch.randn(1, 2, 4, 8)
        >>> attnplug.explain(query, query, query, softcap=30.0, impl="aten_flash").chosen is None
        True
    """
    return traced.or_eagerly(_explain, (query, key, value, *args), kwargs, impl, compute_capability)


def _params_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> SDPAParams:
    signature = _VARLEN if _is_varlen(args[3:], kwargs) else _DENSE
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"explain() {error.args[0]}") from None  # Dynamo keeps `args` as constants, and not `str`
    bound.apply_defaults()
    given = bound.arguments
    del given["impl"]
    given["dropout"] = given.pop("dropout_p")
    if signature is _VARLEN:
        given["causal_variant"] = CausalVariant.LOWER_RIGHT
    return SDPAParams(**given)


def _explain(
    args: tuple[Any, ...], kwargs: dict[str, Any], impl: str | None, compute_capability: tuple[int, int] | None
) -> Explanation:
    params = _params_of(args, kwargs)
    if is_compiling():
        return _traced(params, impl, compute_capability)
    params = _prepared(params)
    registry = start()
    with described(compute_capability, params.query.device):
        if not params.query.is_nested and is_empty(params):
            return Explanation(
                None, tuple(Verdict(entry.name, entry.spec.backend, False, _EMPTY) for entry in registry), empty=True
            )
        facts = _facts(params)
        choice, measured = _measured(impl, facts, params) if compute_capability is None else (None, "")
        answer = explain_all(registry, current_selection(impl, choice), facts, params)
    found = replace(_explanation(answer), measured=measured)
    if choice is not None and choice == found.chosen:  # measured, so nobody faster is missed
        found = replace(found, nearest=None, remedy="")
    return found


def _is_varlen(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether these are the arguments of `varlen_attn`, which has integers, `cu_seq_q`, where the other has a mask."""
    fourth = args[0] if args else None
    by_position = isinstance(fourth, Tensor) and not (fourth.is_floating_point() or fourth.dtype is torch.bool)
    return by_position or any(name in kwargs for name in _VARLEN_ALONE)


def _measured(impl: str | None, facts: CallFacts, params: SDPAParams) -> tuple[str | None, str]:
    """Return the measured choice for a call, and what is to be said of it; nothing where another order is named."""
    if not applies(impl):
        return None, ""
    return None if params.query.is_nested else choice_of(facts, params), because(facts, params)


def can_use_impl(name: str, params: SDPAParams, *, compute_capability: tuple[int, int] | None = None) -> Verdict:
    """Return whether an implementation supports a call, whatever is selected; truthy if so.

    Args:
        name: of the implementation.
        params: the call.
        compute_capability: as in `explain`: answer for a GPU of this compute capability.

    Raises:
        UnknownImplementationError: no implementation has this name.
        TypeError, ValueError: `params` is not an `SDPAParams`, or describes no valid call; `compute_capability` is
            not one, or is given for a query that is on no CUDA device.
    """
    return traced.or_eagerly(_can_use, name, params, compute_capability)


def _can_use(name: str, params: SDPAParams, compute_capability: tuple[int, int] | None) -> Verdict:
    if not isinstance(params, SDPAParams):
        raise TypeError(f"params: expected SDPAParams, got {type(params).__name__}")
    if is_compiling():
        found = _traced(params, name, compute_capability)
        verdict = next(verdict for verdict in found.candidates if verdict.name == name)
        accepted = found.chosen == name
        return replace(verdict, accepted=accepted, reasons=() if accepted else verdict.reasons)
    entry = start().get(name, "name")
    prepared = _prepared(params)
    if not prepared.query.is_nested and is_empty(prepared):
        return Verdict(entry.name, entry.spec.backend, False, _EMPTY)
    with described(compute_capability, prepared.query.device):
        return verdict_of(entry, _facts(prepared), prepared)


def _prepared(params: SDPAParams) -> SDPAParams:
    """Check and normalise a call that will not be differentiated, so that autograd records nothing.

    It would look for the device of each view that it records, and PyTorch ends the process where there is
    none, as for a fake CUDA tensor on a machine without CUDA.
    """
    with torch.no_grad():
        prepared = prepare_varlen(params) if params.is_varlen else prepare_dense(params)[0]
    wanting: dict[str, Any] = {}
    for name in DIFFERENTIABLE:
        given, view = getattr(params, name), getattr(prepared, name)
        if isinstance(view, Tensor) and given.requires_grad and not view.requires_grad:
            wanting[name] = view.detach().requires_grad_()
    prepared = replace(prepared, **wanting)
    return described_share(prepared) if is_sharded(prepared.query) else prepared


def _traced(params: SDPAParams, impl: str | None, compute_capability: tuple[int, int] | None) -> Explanation:
    """Return an explanation in a trace, of constants; a change of selection or registry traces again."""
    if compute_capability is not None:
        raise ValueError(
            "compute_capability: cannot be given under torch.compile(fullgraph=True); call explain outside of it"
        )
    start_outside()
    prepared = prepare_varlen(params) if params.is_varlen else prepare_dense(params)[0]
    if is_sharded(prepared.query):
        prepared = share_of(prepared)
    answer = traced.explained(prepared, impl)
    if is_empty(prepared):
        empty = [Verdict(verdict.name, verdict.backend, False, _EMPTY) for verdict in answer.verdicts]
        return Explanation(None, tuple(empty), True)
    return _explanation(answer)


def _explanation(answer: Answer) -> Explanation:
    return Explanation(answer.chosen, answer.verdicts, nearest=answer.nearest, remedy=answer.remedy)


def _facts(prepared: SDPAParams) -> CallFacts:
    facts = nested_facts(prepared) if prepared.query.is_nested else CallFacts.of(prepared)
    assert facts is not None, prepared
    return facts
