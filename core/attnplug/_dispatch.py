"""The path of one call: a cached decision, then the kernel.

`dense` and `varlen` are hot: they build the record of the call, look at its shapes, look the decision up
and run it. Everything unusual (a first call, another rank, a broadcast, autocast, an empty tensor, a
mistake) goes to the cold functions below them, which check every argument.

A decision is kept under all that it depends on: the selection, the registry's generation, and the
dtypes, devices, head sizes and features of the call; not its lengths, so that a decode loop, whose keys
grow by one each step, decides once.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from attnplug._autocast import any_autocast, no_autocast
from attnplug._autograd import run
from attnplug._operator import is_watched, operator_of
from attnplug._prepare import default_scale, is_empty, own_terms, prepare_dense, prepare_varlen
from attnplug._recording import observe, replayed, unfused_warnings_wanted, warn_unfused
from attnplug._registry import Registry
from attnplug._requirements import is_aligned, needs_grad
from attnplug._resolver import Decision, resolve
from attnplug._selection import current_selection, process, start, thread
from attnplug._types import CausalVariant, SDPAParams, SDPBackend
from attnplug._validate import check_extras

Result = tuple[Tensor, Tensor | None]

OPEN_WINDOW = (-1, -1)
UPPER_LEFT = CausalVariant.UPPER_LEFT
PLANS_KEPT = 4096


@dataclass
class Plan:
    """A decision that is kept, or, where shapes matter, one for each shape."""

    decision: Decision
    grad: bool
    unfused: bool
    by_shape: dict[Hashable, Plan] | None = None

    def run(self, params: SDPAParams) -> Result:
        if thread.recordings or process.trace:
            observe(self.decision, params)
        if self.unfused and unfused_warnings_wanted():
            warn_unfused(self.decision)
        if not self.decision.kernel.composite and is_watched(params.query):
            return operator_of(self.decision.entry).run(params)
        return run(self.decision.entry, params, self.grad)


_plans: dict[Hashable, Plan] = {}


def dense(params: SDPAParams, impl: str | None) -> Result:
    """Run one dense call; `params` is as the user gave it. Returns `out` and `lse` (None unless asked for)."""
    if thread.recordings:
        impl = replayed(impl)
    try:
        plan = _plans.get(_dense_key(params, impl))
    except (AttributeError, TypeError, ValueError):  # something is wrong, and the cold path has words for it
        plan = None
    if plan is not None and plan.by_shape is not None:
        plan = plan.by_shape.get(_shapes(params))
    if plan is None:
        return _dense_cold(params, impl)
    if params.scale is None:  # the record is ours until a kernel has seen it
        params.__dict__["scale"] = default_scale(params.query)
    return plan.run(params)


def varlen(params: SDPAParams, impl: str | None) -> Result:
    """Run one variable-length call. Its checks read lengths, so they are made each time."""
    if thread.recordings:
        impl = replayed(impl)
    _check_impl(impl, start())
    prepared = prepare_varlen(params)
    if is_empty(prepared):
        return empty(prepared)
    plan = _plan(prepared, impl, _varlen_key(prepared, impl))
    with no_autocast(prepared.query):
        return plan.run(prepared)


def regular_form(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, int, bool, bool] | None:
    """Return `(E, Ev, Hq == Hkv, Sq == Sk)` if the tensors have four fitting dimensions and none is empty.

    None sends the call to the cold path, which broadcasts, or says what is wrong. About 0.7 us.
    """
    try:
        batch, heads, queries, size = query.shape
        key_batch, kv_heads, keys, key_size = key.shape
        value_batch, value_heads, values, value_size = value.shape
    except (AttributeError, RuntimeError, ValueError):  # no tensor, a nested one, or another rank
        return None
    if (
        batch == key_batch == value_batch
        and keys == values
        and size == key_size
        and kv_heads == value_heads
        and (heads == kv_heads or (enable_gqa is True and kv_heads > 0 and heads % kv_heads == 0))
        and batch > 0 < heads
        and queries > 0 < keys
        and size > 0
    ):
        return size, value_size, heads == kv_heads, queries == keys
    return None


def _dense_key(params: SDPAParams, impl: str | None) -> Hashable | None:
    """Return all that a decision depends on, or None if the call needs the cold path. About 2 us.

    Whatever can be wrong with an argument is either part of the key, so that it was checked when its
    decision was made, or is compared here.
    """
    query, key, value, mask, scale = params.query, params.key, params.value, params.attn_mask, params.scale
    form = regular_form(query, key, value, params.enable_gqa)
    registry = process.registry
    if form is None or registry is None or any_autocast():
        return None
    dtype, device = query.dtype, query.device
    if key.dtype is not dtype or value.dtype is not dtype or key.device != device or value.device != device:
        return None
    if not (is_bool(params.is_causal) and is_bool(params.enable_gqa)):
        return None
    if scale is not None and not ((type(scale) is float or type(scale) is int) and -inf < scale < inf):
        return None
    if params.sinks is not None or params.alibi_slopes is not None or params.seqused_k is not None:
        check_extras(params, query.shape[1], query.shape[0], query.shape[:1])
    grad = torch.is_grad_enabled()
    return (
        thread.scope,
        impl,
        process.activation,
        registry.generation,
        dtype,
        device,
        form if is_aligned(params) else form[:3],
        grad and (query.requires_grad or key.requires_grad or value.requires_grad),
        params.dropout,
        params.is_causal,
        params.causal_variant,
        mask if mask is None else _mask_key(params, grad),
        _extensions(params, grad),
    )


def _mask_key(params: SDPAParams, grad: bool) -> Hashable:
    """Return what a decision depends on of the mask, which becomes four-dimensional if it is not."""
    query, key, mask = params.query, params.key, params.attn_mask
    if not isinstance(mask, Tensor) or isinstance(mask, CausalBias) or mask.dim() > 4 or mask.device != query.device:
        raise TypeError
    if mask.dim() < 4:
        mask = mask[(None,) * (4 - mask.dim())]
    batch, heads, queries, keys = mask.shape
    full = query.shape
    if keys in (1, key.shape[2]) and queries in (1, full[2]) and heads in (1, full[1]) and batch in (1, full[0]):
        params.__dict__["attn_mask"] = mask  # the record is ours until a kernel has seen it
        return mask.dtype, grad and mask.requires_grad
    raise ValueError


def _extensions(params: SDPAParams, grad: bool) -> Hashable:
    """Return what a decision depends on besides PyTorch's own arguments."""
    sinks, slopes, used, window = params.sinks, params.alibi_slopes, params.seqused_k, params.window_size
    if (
        sinks is None
        and slopes is None
        and used is None
        and window is OPEN_WINDOW
        and params.softcap == 0.0
        and params.return_lse is False
    ):
        return None
    return (
        _checked(params.return_lse, bool),
        params.softcap,
        tuple(_checked(side, int) for side in window),
        sinks is not None and grad and sinks.requires_grad,
        (sinks is None, slopes is None, used is None),
    )


def is_bool(value: Any) -> bool:
    """Whether `value` is exactly True or False, and not 1 or 0, which equal them."""
    return value is False or value is True


def _checked(value: Any, kind: type) -> Any:
    """Return `value`, or something that no key contains if it is not exactly of this type: 1 equals True."""
    return value if type(value) is kind else object()


def _varlen_key(params: SDPAParams, impl: str | None) -> Hashable:
    """Return all that a decision about a checked variable-length call depends on."""
    registry, grad = start(), torch.is_grad_enabled()
    query, key, value = params.query, params.key, params.value
    return (
        thread.scope,
        impl,
        process.activation,
        registry.generation,
        query.dtype,
        query.device,
        query.shape[-1],
        value.shape[-1],
        query.shape[-2] == key.shape[-2],
        grad and (query.requires_grad or key.requires_grad or value.requires_grad),
        params.dropout,
        params.is_causal,
        "varlen",
        _extensions(params, grad),
        params.block_table is None,
    )


def _shapes(params: SDPAParams) -> Hashable:
    tensors = (params.query, params.key, params.value, params.attn_mask)
    layout = tuple(tensor if tensor is None else (tensor.shape, tensor.stride()) for tensor in tensors)
    return (*layout, params.max_q, params.max_k)


def _dense_cold(params: SDPAParams, impl: str | None) -> Result:
    """Check every argument, bring the call into the one form that kernels know, and decide."""
    _check_impl(impl, start())
    prepared, rows = prepare_dense(params)
    if not prepared.query.is_nested and is_empty(prepared):
        out, lse = empty(prepared)
    else:
        key = None if prepared.query.is_nested else _dense_key(prepared, impl)
        plan = _plan(prepared, impl, key)
        if plan.decision.kernel.any_form:
            return plan.run(own_terms(params))
        with no_autocast(prepared.query):
            out, lse = plan.run(prepared)
    return out.reshape(*rows, out.shape[-1]), lse if lse is None else lse.reshape(rows)


def _check_impl(impl: Any, registry: Registry) -> None:
    if impl is not None:
        if not isinstance(impl, str):
            raise TypeError(f"impl: expected the name of an implementation or None, got {impl!r}")
        registry.get(impl, "impl")


def _plan(params: SDPAParams, impl: str | None, key: Hashable | None) -> Plan:
    """Return the plan kept under `key` for checked and normalised `params`, or decide, and keep the decision."""
    shape = _shapes(params) if key is not None else None
    plan = _plans.get(key)
    if plan is not None and plan.by_shape is not None:
        plan = plan.by_shape.get(shape)
    if plan is None:
        decision = resolve(start(), current_selection(impl), params)
        unfused = decision.backend is SDPBackend.MATH and bool(decision.passed_over)
        plan = Plan(decision, needs_grad(params), unfused)
        if key is not None:
            _keep(key, shape, plan)
    return plan


def _keep(key: Hashable, shape: Hashable, plan: Plan) -> None:
    if len(_plans) >= PLANS_KEPT:
        _plans.clear()
    if not plan.decision.shape_dependent:
        _plans[key] = plan
        return
    holder = _plans.setdefault(key, replace(plan, by_shape={}))
    if holder.by_shape is None or len(holder.by_shape) >= PLANS_KEPT:
        holder.by_shape = {}
    holder.by_shape[shape] = plan


def empty(params: SDPAParams) -> Result:
    """Return what the formulas say when nothing can be attended to, or nobody attends.

    A product over no keys is zero and its gradient too; it keeps the inputs in the graph, and needs no
    kernel of attention.
    """
    query, key, value = params.query, params.key, params.value
    if params.cu_seq_q is not None:
        query, heads = query.transpose(0, 1), query.shape[1]
        no_keys = key.reshape(-1, *key.shape[-2:])[:0], value.reshape(-1, *value.shape[-2:])[:0]
        key, value = (tensor.transpose(0, 1) for tensor in no_keys)
    else:
        heads = query.shape[1]
        key, value = key[..., :0, :], value[..., :0, :]
    kv_heads = key.shape[-3]
    if kv_heads != heads and kv_heads:
        key, value = (tensor.repeat_interleave(heads // kv_heads, -3) for tensor in (key, value))
    out = query @ key.transpose(-1, -2) @ value
    if params.cu_seq_q is not None:
        out = out.transpose(0, 1)
    if not params.return_lse:
        return out, None
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_full(query.shape[:-1], -inf, dtype=dtype)
    if params.sinks is not None:
        lse = params.sinks.to(dtype)[:, None].expand(lse.shape)
    return out, lse
