"""The path of one call under `torch.compile` and `torch.export`.

The resolver runs outside the graph, as a constant: all that it depends on is either an argument that the
trace specialises on, or state that it guards (this thread's scope, the registry's generation). So the
graph holds the chosen kernel alone, and a change of selection is a guard that fails, never a stale choice.
"""

from __future__ import annotations

from operator import index  # under a trace it makes a symbolic size a constant, with a guard
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from attnplug._call.autocast import no_autocast
from attnplug._call.prepare import default_scale, empty, is_empty, own_terms, prepare_dense, prepare_varlen
from attnplug._call.requirements import is_aligned, is_square
from attnplug._dispatch.eager import Result
from attnplug._dispatch.recording import unfused_warnings_wanted, warn_unfused
from attnplug._dispatch.resolver import resolve
from attnplug._errors import AttnplugError
from attnplug._run.autograd import check_outputs
from attnplug._run.operator import arguments_of, operator_of
from attnplug._run.transforms import is_transformed
from attnplug._selection.selection import Selection
from attnplug._selection.state import process, start, start_outside, thread
from attnplug._tracing import constant_in_traces
from attnplug._types import CausalVariant, SDPAParams, SDPBackend


class _Chosen:
    """What was chosen so far, by attribute: adding one does not touch the guards on another."""


_composite = _Chosen()
_operators = _Chosen()


def dense(params: SDPAParams, impl: str | None) -> Result:
    """Trace one dense call."""
    start_outside()
    given = own_terms(params)
    prepared, rows = prepare_dense(params)
    if is_empty(prepared):
        out, lse = empty(prepared)
    else:
        name, composite = _chosen(prepared, impl)
        if composite and getattr(_composite, name).any_form:
            return getattr(_composite, name).forward(given)  # type: ignore[no-any-return]
        with no_autocast(prepared.query):
            out, lse = _run(prepared, name, composite)
    if rows != prepared.query.shape[:-1]:
        out, lse = out.reshape(*rows, out.shape[-1]), lse if lse is None else lse.reshape(rows)
    return out, lse


def varlen(params: SDPAParams, impl: str | None) -> Result:
    """Trace one variable-length call."""
    start_outside()
    prepared = prepare_varlen(params)
    if is_empty(prepared):
        return empty(prepared)
    name, composite = _chosen(prepared, impl)
    with no_autocast(prepared.query):
        return _run(prepared, name, composite)


def _chosen(params: SDPAParams, impl: str | None) -> tuple[str, bool]:
    """Return, as constants, the name of the chosen implementation and whether it is traced into."""
    registry = process.registry
    assert registry is not None
    facts = _facts(params)
    selected = (thread.state.scope, impl, process.activation, index(registry.generation))
    lengths = None
    if _shape_matters(*selected, facts):
        lengths = tuple(index(size) for size in (params.query.shape[0], params.query.shape[-2], params.key.shape[-2]))
    name, composite, error = _choose(*selected, facts, lengths)
    if error:  # A trace gives up here, and the eager call raises the error itself; under fullgraph this is its text.
        raise AttnplugError(error)
    return name, composite


def _run(params: SDPAParams, name: str, composite: bool) -> Result:
    if composite:
        returned = getattr(_composite, name).forward(params)
        check_outputs(name, params, returned)
        out, lse = returned[:2]
    else:
        out, lse, _ = getattr(_operators, name)(*arguments_of(params))
    return out, lse if params.return_lse else None


def _facts(params: SDPAParams) -> tuple[Any, ...]:
    """Return, as constants, all that a decision depends on but lengths."""
    query, key, value = params.query, params.key, params.value
    recording = torch.is_grad_enabled()
    heads_at = 1 if params.cu_seq_q is not None else -3
    kv_heads_at = -2 if params.block_table is not None else heads_at
    return (
        query.device,
        query.dtype,
        index(query.shape[-1]),
        index(value.shape[-1]),
        index(query.shape[heads_at]),
        index(key.shape[kv_heads_at]),
        recording and (query.requires_grad or key.requires_grad or value.requires_grad),
        _tensor_facts(params.attn_mask, recording),
        _tensor_facts(params.sinks, recording),
        params.alibi_slopes is not None,
        params.seqused_k is not None,
        params.cu_seq_q is not None,
        params.block_table is not None,
        _settled(not is_aligned(params) or is_square(params)),
        _settled(params.dropout > 0),
        params.is_causal,
        int(params.causal_variant),
        (index(params.window_size[0]), index(params.window_size[1])),
        _settled(params.softcap > 0),
        params.return_lse,
        params.enable_gqa,
    )


def _settled(condition: bool) -> bool:
    """Branch on a condition, which under a trace may be symbolic, so that it becomes a constant with a guard."""
    if condition:  # noqa: SIM103
        return True
    return False


def _tensor_facts(tensor: Tensor | None, recording: bool) -> Any:
    return None if tensor is None else (tensor.dtype, recording and tensor.requires_grad)


@constant_in_traces
def _shape_matters(scope: Any, impl: str | None, activation: str | None, generation: int, facts: Any) -> bool:
    try:
        decision = resolve(start(), Selection(impl, scope, activation, process.preferred), _example(facts, None))
    except AttnplugError:
        return True  # another shape may do, and if not then `_choose` says so
    return decision.shape_dependent


@constant_in_traces
def _choose(
    scope: Any, impl: str | None, activation: str | None, generation: int, facts: Any, lengths: Any
) -> tuple[str, bool, str]:
    """Return the name under which the chosen kernel is kept, whether it is traced into, and what went wrong."""
    selection = Selection(impl, scope, activation, process.preferred)
    try:
        decision = resolve(start(), selection, _example(facts, lengths))
    except AttnplugError as error:
        return "", False, str(error)
    if decision.backend is SDPBackend.MATH and decision.passed_over and unfused_warnings_wanted():
        warn_unfused(decision)
    if decision.kernel.composite:
        setattr(_composite, decision.name, decision.kernel)
    elif is_transformed():
        return (
            "",
            False,
            f"implementation {decision.name!r} cannot be seen through by torch.func transforms inside torch.compile; "
            f"leave the transformed function uncompiled, or use an implementation made of PyTorch operators, for "
            f"example inside sdpa_kernel(SDPBackend.MATH)",
        )
    else:
        setattr(_operators, decision.name, operator_of(decision.entry).forward)
    return decision.name, decision.kernel.composite, ""


def _example(facts: tuple[Any, ...], lengths: tuple[int, int, int] | None) -> SDPAParams:
    """Return a call of fake tensors that has these facts, for the resolver and for `supports` to look at."""
    device, dtype, size, value_size, heads, kv_heads, grad, mask, sinks = facts[:9]
    slopes, used, is_varlen, paged, square, dropout, is_causal, variant, window, softcap, lse, gqa = facts[9:]
    batch, queries, keys = lengths or (2, 16, 16 if square else 24)
    with _disable_current_modes(), FakeTensorMode(), torch.set_grad_enabled(True):

        def make(*shape: int, dtype: torch.dtype = dtype, grad: bool = False) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device, requires_grad=grad)

        def integers(*shape: int) -> Tensor:
            return make(*shape, dtype=torch.int32)

        if is_varlen:
            query = make(batch * queries, heads, size, grad=grad)
            rows = (keys, 16) if paged else (batch * keys,)
            key, value = (make(*rows, kv_heads, last, grad=grad) for last in (size, value_size))
        else:
            query = make(batch, heads, queries, size, grad=grad)
            key, value = (make(batch, kv_heads, keys, last, grad=grad) for last in (size, value_size))
        return SDPAParams(
            query,
            key,
            value,
            None if mask is None else make(1, 1, queries, keys, dtype=mask[0], grad=mask[1]),
            0.5 if dropout else 0.0,
            is_causal,
            gqa,
            scale=default_scale(query),
            causal_variant=CausalVariant(variant),
            window_size=window,
            softcap=30.0 if softcap else 0.0,
            sinks=None if sinks is None else make(heads, dtype=sinks[0], grad=sinks[1]),
            alibi_slopes=make(heads, dtype=torch.float32) if slopes else None,
            seqused_k=integers(batch) if used else None,
            return_lse=lse,
            cu_seq_q=integers(batch + 1) if is_varlen else None,
            cu_seq_k=integers(batch + 1) if is_varlen else None,
            max_q=queries if is_varlen else None,
            max_k=keys if is_varlen else None,
            block_table=integers(batch, 4) if paged else None,
        )
