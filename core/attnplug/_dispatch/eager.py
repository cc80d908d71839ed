"""The path of one eager call.

Two routes, after the one that `_api` takes when PyTorch's own function can simply run: *kept*, where the facts of
the call are those of a decision that was made before, and *decided*, where the candidates are asked. A call in the form
that kernels know is decided from its facts; of any other every argument is checked, and it is brought into that form.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from attnplug._call.autocast import any_autocast, autocasted
from attnplug._call.facts import CallFacts, is_plain, nested_facts
from attnplug._call.prepare import (
    default_scale,
    empty,
    is_causal_bias,
    is_empty,
    own_terms,
    prepare_dense,
    prepare_varlen,
)
from attnplug._call.validate_varlen import check_lengths
from attnplug._dispatch import traced
from attnplug._dispatch.plans import Plan, find, make, with_four_dimensions
from attnplug._dispatch.ranges import is_profiled
from attnplug._dispatch.recognised import known, recognise, remember
from attnplug._params import params_of
from attnplug._run.contract import Result
from attnplug._selection.selection import check_kind
from attnplug._selection.state import start, thread
from attnplug._types import SDPAParams


def dense(params: SDPAParams, impl: str | None, way: Hashable = None) -> Result:
    """Run one dense call; returns `out`, and `lse` or None. Later ones that are like it are recognised by `way`."""
    if any_autocast():
        given, params = params, autocasted(params)
        if way is not None and params is not given and (returned := _recognised(params, way)) is not None:
            return returned
    if is_causal_bias(params.attn_mask):
        params, way = own_terms(params), None  # which the function is not called with
    query, mask = params.query, params.attn_mask
    plan = None if isinstance(query, Tensor) and query.dim() != 4 else _planned(params, impl)
    if plan is None:
        return _lifted(params, impl) or _decided(params, impl)
    if way is not None:
        remember(way, plan, params, mask)
    return plan.run(params)


def _recognised(params: SDPAParams, way: Hashable) -> Result | None:
    """Run a dense call that autocast has cast, if it is like one before it now."""
    candidates, tensors = known.get(way), (params.query, params.key, params.value, params.attn_mask)
    found = None if candidates is None else recognise(candidates, *tensors)
    if found is None:
        return None
    if found.plain is None or thread.state.watched or is_profiled() or not is_plain(params):
        return found.run_as_given(params)
    return found.plain(*tensors, params.dropout, params.is_causal, params.scale, params.enable_gqa)


def varlen(params: SDPAParams, impl: str | None, way: Hashable = None) -> Result:
    """Run one variable-length call. What its lengths may have wrong is checked each time."""
    if any_autocast():
        params = autocasted(params)
    _, plan = _kept(params, impl)
    if plan is not None and check_lengths(params) > 0:
        if params.scale is None:
            params.__dict__["scale"] = plan.scale
        if way is not None:
            remember(way, plan, params)
        return plan.run(params)
    if _is_symbolic(params):
        return traced.varlen(params, impl)
    _check_impl(impl)
    prepared = prepare_varlen(params)
    if is_empty(prepared):
        return empty(prepared)
    return _plan(prepared, impl).run(prepared)


def _planned(params: SDPAParams, impl: str | None) -> Plan | None:
    """Return the plan of a dense call, kept or made now; None if the call is not in the form that kernels know.

    Its mask gets four dimensions and its scale the default, and it says `enable_gqa` only if heads are grouped.
    """
    mask, fields = params.attn_mask, params.__dict__
    if isinstance(mask, Tensor) and not is_causal_bias(mask):
        fields["attn_mask"] = with_four_dimensions(mask)
    facts, plan = _kept(params, impl)
    if facts is None or (plan is None and (not facts.are_of_known_dtypes or _is_symbolic(params))):
        fields["attn_mask"] = mask
        return None
    grouped = facts.heads != facts.kv_heads
    fields["enable_gqa"] = True if grouped else False  # noqa: SIM210, sizes are tensors in torch.jit.trace
    if plan is None:
        _check_impl(impl)
        if params.scale is None:
            fields["scale"] = default_scale(params.query)
        return make(impl, facts, params)
    if params.scale is None:
        fields["scale"] = plan.scale
    return plan


def _kept(params: SDPAParams, impl: str | None) -> tuple[CallFacts | None, Plan | None]:
    """Return the facts of a call, if it is in the form that kernels know, and the plan kept for it, if there is one."""
    try:
        facts = CallFacts.of(params)
        return facts, None if facts is None else find(impl, facts, params)
    except (AttributeError, TypeError):  # no tensor, or something unhashable: the decided route has words for it
        return None, None


def _lifted(params: SDPAParams, impl: str | None) -> Result | None:
    """Run a call of another rank, or whose batch or heads broadcast, if it then is in the form that kernels know."""
    tensors, mask = (params.query, params.key, params.value), params.attn_mask
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_nested:
            return None
    rank = params.query.dim()
    if rank < 2 or any(tensor.dim() != rank for tensor in tensors):
        return None
    if mask is not None and (rank > 4 or not isinstance(mask, Tensor) or mask.dim() > rank):
        return None
    rows = params.query.shape[:-1]
    if rank > 4 and any(tensor.shape[:-3] != rows[:-2] for tensor in tensors):
        return None
    if rank == 4:
        expanded = _expanded(*tensors, params.enable_gqa)
        if expanded is None:
            return None
        query, key, value = expanded
    else:
        query, key, value = [tensor.flatten(0, rank - 4) if rank > 4 else tensor.unsqueeze(0) for tensor in tensors]
    if rank == 2:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    lifted = params_of(params.__dict__ | {"query": query, "key": key, "value": value})
    plan = _planned(lifted, impl)
    if plan is None:
        return None
    if plan.decision.kernel.any_form:
        params.__dict__["enable_gqa"] = lifted.enable_gqa
        return plan.run(params)
    out, lse = plan.run(lifted)
    if rank == 4:
        return out, lse
    if rank == 3:  # takes a third of the time of what holds for all
        return out.squeeze(0), lse if lse is None else lse.squeeze(0)
    return out.reshape(*rows, out.shape[-1]), lse if lse is None else lse.reshape(rows)


def _expanded(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, ...] | None:
    """Return tensors of four dimensions with all of their batch and heads; None if these do not broadcast."""
    batch = max(query.shape[0], key.shape[0], value.shape[0])
    heads, kv_heads = query.shape[1], max(key.shape[1], value.shape[1])
    if not (enable_gqa and heads > kv_heads):
        heads = kv_heads = max(heads, kv_heads)
    try:
        return (
            query.expand(batch, heads, -1, -1),
            key.expand(batch, kv_heads, -1, -1),
            value.expand(batch, kv_heads, -1, -1),
        )
    except RuntimeError:
        return None


def _decided(params: SDPAParams, impl: str | None) -> Result:
    """Check every argument, bring the call into the one form that kernels know, and decide."""
    if _is_symbolic(params):
        return traced.dense(params, impl)
    _check_impl(impl)
    prepared, rows = prepare_dense(params)
    if prepared.query.is_nested:
        return make(impl, nested_facts(prepared), prepared, keep=False).run(prepared)
    if is_empty(prepared):
        out, lse = empty(prepared)
    else:
        plan = _plan(prepared, impl)
        if plan.decision.kernel.any_form:
            return plan.run(own_terms(params))
        out, lse = plan.run(prepared)
    return out.reshape(*rows, out.shape[-1]), lse if lse is None else lse.reshape(rows)


def _plan(prepared: SDPAParams, impl: str | None) -> Plan:
    """Return the plan kept for a checked call in the form that kernels know, or decide."""
    facts = CallFacts.of(prepared)
    assert facts is not None, prepared
    return find(impl, facts, prepared) or make(impl, facts, prepared)


def _is_symbolic(params: SDPAParams) -> bool:
    """Whether a size is a symbol, as `make_fx(..., tracing_mode="symbolic")` has it: no decision is kept under one."""
    for tensor in (params.query, params.key, params.value):
        # Jagged tensors, which have symbols of their own, are left out.
        if isinstance(tensor, Tensor) and not tensor.is_nested and torch.SymInt in map(type, tensor.shape):
            return True
    return False


def _check_impl(impl: Any) -> None:
    registry = start()
    check_kind(impl)
    if impl is not None:
        registry.get(impl, "impl")
