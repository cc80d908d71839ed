"""The path of one call under `torch.compile` and `torch.export`.

The resolver runs outside the graph, as a constant: all that it depends on is either an argument that the
trace specialises on, or state that it guards (this thread's scope, the registry's generation). So the
graph holds the chosen kernel alone, and a change of selection is a guard that fails, never a stale choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from operator import index  # under a trace it makes a symbolic size a constant, with a guard
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.compiler import is_dynamo_compiling
from torch.utils._python_dispatch import _disable_current_modes

from attnplug._call.autocast import no_autocast
from attnplug._call.facts import CallFacts, Extensions, Layout, TensorFacts, example
from attnplug._call.kinds import sizes_of
from attnplug._call.prepare import empty, is_empty, own_terms, prepare_dense, prepare_varlen
from attnplug._dispatch.measured import applies, tell_of_problem, tree_of_trace
from attnplug._dispatch.recording import unfused_warnings_wanted, warn_unfused
from attnplug._dispatch.resolver import Answer, Decision, explain_all, resolve
from attnplug._dispatch.watched import as_constants, show, tell
from attnplug._errors import AttnplugError, PluginWarning
from attnplug._messages import warn
from attnplug._registry.registry import BUILTIN
from attnplug._run.constant_lse import constant_lse, refusal, without_gradient
from attnplug._run.contract import Result, check_outputs, unrouted
from attnplug._run.operator import arguments_of, operator_of
from attnplug._run.transforms import is_mapped_alone, is_transformed
from attnplug._selection.selection import Selection, check_kind
from attnplug._selection.state import process, start, start_outside, thread
from attnplug._selection.watching import decided
from attnplug._tracing import constant_in_traces, is_exporting
from attnplug._types import SDPAParams, SDPBackend, Verdict

BUILT_IN, COMPOSITE, OPERATOR = "built in", "composite", "operator"
"""How a kernel is traced: through what is made of PyTorch's operators, ours or a plugin's, or as one operator."""


class _Chosen:
    """What was chosen so far, by attribute: adding one does not touch the guards on another."""

    constant_lse: Any


_composite = _Chosen()
_operators = _Chosen()


@constant_in_traces
def _attribute(name: str) -> str:
    """Return the attribute under which an implementation is kept: `class` is a name, and `a.b`, but no attribute."""
    return "of_" + re.sub(r"\W", lambda found: f"_{ord(found[0]):x}_", name)


def or_eagerly(run: Callable[..., Any], *arguments: Any) -> Any:
    """Trace a call; of one that raises an error the graph breaks, and the eager call raises it.

    Where an error leaves a trace, Dynamo runs the code with which the trace began eagerly ever after, also once the
    mistake is mended. Under `fullgraph` the message of the break is that of the error.
    """
    returned, mistake = _attempt(run, *arguments)
    if mistake is not None:
        torch._dynamo.graph_break(msg=mistake)
        returned = _eagerly(run, *arguments)
    return returned


def _attempt(run: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """Return what a call returns, or what it says is wrong.

    A function of its own: where a graph breaks in a `try`, Dynamo runs the function that has it eagerly.
    """
    try:
        return run(*arguments), None
    except Exception as error:
        if not is_dynamo_compiling():  # the call was run, as the graph broke in its kernel: its error is no mistake
            raise
        said = error.args[0] if error.args else ""  # PyTorch 2.11 cannot trace `str` of a class of ours
        return None, f"{type(error).__name__}: {said}"


@_disable_dynamo  # imports Dynamo when it is called: a trace has
def _eagerly(run: Callable[..., Any], *arguments: Any) -> Any:
    return run(*arguments)


def dense(params: SDPAParams, impl: str | None) -> Result:
    """Trace one dense call."""
    start_outside()
    given = own_terms(params)
    prepared, rows = prepare_dense(params)
    if is_empty(prepared):
        out, lse = empty(prepared)
    else:
        name, kind, refused, saves, call = _chosen(prepared, impl)
        if kind != OPERATOR and getattr(_composite, _attribute(name)).any_form:
            out, lse = _forward(given, name, kind)[:2]
            show(call, given, out, lse)
            return out, lse
        with no_autocast(prepared.query):
            out, lse = _run(prepared, name, kind, refused, saves)
        show(call, prepared, out, lse)
    if rows != prepared.query.shape[:-1]:
        out, lse = out.reshape(*rows, out.shape[-1]), lse if lse is None else lse.reshape(rows)
    return out, lse


def varlen(params: SDPAParams, impl: str | None) -> Result:
    """Trace one variable-length call."""
    start_outside()
    prepared = prepare_varlen(params)
    if is_empty(prepared):
        return empty(prepared)
    name, kind, refused, saves, call = _chosen(prepared, impl)
    with no_autocast(prepared.query):
        out, lse = _run(prepared, name, kind, refused, saves)
    show(call, prepared, out, lse)
    return out, lse


def _chosen(params: SDPAParams, impl: str | None) -> tuple[str, str, str, str, tuple[str, ...]]:
    """Return, as constants, the name of the chosen implementation, how it is traced, and what to say.

    That is what to say where someone asks for a gradient through lse, then a digest of what forward returns, and what
    is told of the call.
    """
    decisive = _decisive(params, impl)
    name, kind, refused, saves, error = _choose(*decisive)
    if error:
        raise AttnplugError(error)  # of which `or_eagerly` needs the text
    call: tuple[str, ...] = ()
    if thread.state.watched and not is_exporting():  # a graph of its own, which tells; others pay nothing
        call = _described(*decisive)
        tell(call)
    return name, kind, refused, saves, call


def _decisive(params: SDPAParams, impl: str | None) -> tuple[Any, ...]:
    """Return, as constants, all that a decision depends on: who decides, and the facts of the call."""
    check_kind(impl)
    if params.query.is_nested:  # constants cannot tell all that this decision depends on
        raise AttnplugError("for nested tensors the implementation is chosen outside the graph")
    registry = process.registry
    assert registry is not None
    facts = _constant(_facts_of_checked(params))
    generation = index(registry.generation)
    choice = _measured(params, facts, generation) if applies(impl) else None
    selected = (thread.state.scope, impl, process.activation, generation, choice)
    if _shape_matters(*selected, facts):
        facts = (*facts[:-1], _constant(Layout.of(params)))
    return (*selected, facts)


def _facts_of_checked(params: SDPAParams) -> CallFacts | None:
    """Return the facts of a call whose mask is known to be right: sizes that depend on data cannot be compared."""
    mask = params.attn_mask
    facts = CallFacts.of(params if mask is None else replace(params, attn_mask=None))
    if facts is None or mask is None:
        return facts
    return facts._replace(mask=TensorFacts(mask.dtype, torch.is_grad_enabled() and mask.requires_grad))


def _measured(params: SDPAParams, facts: Any, generation: int) -> str | None:
    """Return, as a constant, the measured choice for a call, with a guard for each size that it depends on.

    An exported program has one choice for all lengths that its dimensions may have, so there it may not depend on them.
    """
    tree = _tree(facts, generation)
    for size in sizes_of(params):
        if not isinstance(tree, tuple):
            break
        if is_exporting() and isinstance(size, torch.SymInt):
            return None
        for bound, branch in tree:
            if _constant(size <= bound):
                tree = branch
                break
        else:
            return None
    return tree


@constant_in_traces
def _tree(items: Any, generation: int) -> Any:
    facts = _facts(items)
    tell_of_problem(facts)
    return tree_of_trace(facts)


def _run(params: SDPAParams, name: str, kind: str, refused: str, saves: str) -> Result:
    if kind == OPERATOR:
        out, lse, _ = getattr(_operators, _attribute(name))(*arguments_of(params), saves)
    else:
        returned = _forward(params, name, kind)
        check_outputs(name, params, returned)
        out, lse = returned[:2]
    if not params.return_lse:
        return out, None
    return out, without_gradient(_operators.constant_lse, refused, params, lse)


def _forward(params: SDPAParams, name: str, kind: str) -> Any:
    forward = getattr(_composite, _attribute(name)).forward
    return unrouted(forward, params) if kind != BUILT_IN and _is_patched() else forward(params)


@constant_in_traces
def _is_patched() -> bool:
    """Whether PyTorch's function is replaced, without a guard: a kernel made of it has one on its name already."""
    return process.is_patched


def _constant(value: Any) -> Any:
    """Return facts as plain tuples of constants; a size that is symbolic becomes a number, with a guard."""
    if isinstance(value, tuple):
        return tuple(_constant(item) for item in value)
    if value is None or value is True or value is False or isinstance(value, (torch.dtype, torch.device)):
        return value
    if isinstance(value, (bool, torch.SymBool)):  # Dynamo takes a symbolic one for a bool
        from torch.fx.experimental.symbolic_shapes import guard_or_false  # a trace has imported it; eager code need not

        return guard_or_false(value)  # where it depends on data, nothing is known
    return index(value)


def _facts(items: tuple[Any, ...]) -> CallFacts:
    """Return the facts whose constants `items` are."""
    *sizes, mask, extensions, layout = items
    if extensions is not None:
        variant, window, softcap, sinks, *others = extensions
        extensions = Extensions(variant, window, softcap, None if sinks is None else TensorFacts(*sinks), *others)
    return CallFacts._make(
        (
            *sizes,
            None if mask is None else TensorFacts(*mask),
            extensions,
            None if layout is None else Layout(*layout),
        )
    )


def _resolved(
    scope: Any, impl: str | None, activation: str | None, choice: str | None, items: tuple[Any, ...]
) -> Decision:
    """Decide as an eager call with these facts would, on fake tensors that have them."""
    facts = _facts(items)
    with _disable_current_modes(), FakeTensorMode():
        params = example(facts)
        with torch.enable_grad():
            return resolve(start(), Selection(impl, scope, activation, process.preferred, choice), facts, params)


@constant_in_traces
def _described(
    scope: Any, impl: str | None, activation: str | None, generation: int, choice: str | None, items: Any
) -> tuple[str, ...]:
    """Return what is said of a decision, as an operator can be told it."""
    return as_constants(_resolved(scope, impl, activation, choice, items))


def explained(params: SDPAParams, impl: str | None) -> Answer:
    """Return, in a trace, what would be chosen for a checked call, and a verdict for every implementation."""
    found = _explained(*_decisive(params, impl))
    if isinstance(found, str):
        raise AttnplugError(found)  # of which `or_eagerly` needs the text
    chosen, verdicts, nearest, remedy = found
    return Answer(
        chosen, tuple([Verdict(*each) for each in verdicts]), None if nearest is None else Verdict(*nearest), remedy
    )


@constant_in_traces
def _explained(
    scope: Any, impl: str | None, activation: str | None, generation: int, choice: str | None, items: Any
) -> tuple[Any, ...] | str:
    """Return what `Answer` is made of; or what is wrong."""
    facts, selection = _facts(items), Selection(impl, scope, activation, process.preferred, choice)
    with _disable_current_modes(), FakeTensorMode():
        params = example(facts)
        with torch.enable_grad():
            try:
                answer = explain_all(start(), selection, facts, params)
            except AttnplugError as error:
                return str(error)
    nearest = None if answer.nearest is None else _items(answer.nearest)
    return answer.chosen, tuple(map(_items, answer.verdicts)), nearest, answer.remedy


def _items(verdict: Verdict) -> tuple[Any, ...]:
    return verdict.name, verdict.backend, verdict.accepted, verdict.reasons, verdict.notes


@constant_in_traces
def _shape_matters(
    scope: Any, impl: str | None, activation: str | None, generation: int, choice: str | None, items: Any
) -> bool:
    try:
        return _resolved(scope, impl, activation, choice, items).shape_dependent
    except AttnplugError:
        return True  # another shape may do, and if not then `_choose` says so


@constant_in_traces
def _choose(
    scope: Any, impl: str | None, activation: str | None, generation: int, choice: str | None, items: Any
) -> tuple[str, str, str, str, str]:
    """Return the name under which the chosen kernel is kept, how it is traced, and what to say.

    That is what to say where someone asks for a gradient through lse, then a digest of what forward returns, and what
    went wrong.
    """
    try:
        decision = _resolved(scope, impl, activation, choice, items)
    except AttnplugError as error:
        return "", "", "", "", str(error)
    _operators.constant_lse = constant_lse()
    # An exported program runs without attnplug.
    refused = "" if is_exporting() else refusal(decision.entry)
    decided(decision.name, decision.backend)
    if decision.backend is SDPBackend.MATH and decision.passed_over and unfused_warnings_wanted():
        warn_unfused(decision)
    if decision.kernel.composite:
        setattr(_composite, _attribute(decision.name), decision.kernel)
    elif is_transformed() and not is_mapped_alone():
        return (
            "",
            "",
            "",
            "",
            f"implementation {decision.name!r} cannot be seen through by transforms of torch.func, other than vmap, "
            f"inside torch.compile; leave the transformed function uncompiled, or use an implementation made of "
            f"PyTorch operators, for example inside sdpa_kernel(SDPBackend.MATH)",
        )
    else:
        operator = operator_of(decision.entry)
        try:
            with _disable_current_modes(), FakeTensorMode():
                # What is exported is found by nobody, and loaded by later versions.
                saves = "" if is_exporting() else operator.saves(example(_facts(items)))
        except AttnplugError as error:
            warn(PluginWarning(f"{error}; such calls run uncompiled"))
            return "", "", "", "", str(error)
        setattr(_operators, _attribute(decision.name), operator.forward)
        return decision.name, OPERATOR, refused, saves, ""
    return decision.name, BUILT_IN if decision.entry.distribution == BUILTIN else COMPOSITE, refused, "", ""
