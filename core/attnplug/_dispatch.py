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
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor

from attnplug._autograd import run
from attnplug._prepare import is_empty, prepare_dense, prepare_varlen
from attnplug._recording import observe, unfused_warnings_wanted, warn_unfused
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
        return run(self.decision, params, self.grad)


@dataclass
class _Plans:
    kept: dict[Hashable, Plan] = field(default_factory=dict)

    def find(self, params: SDPAParams, impl: str | None) -> Plan | None:
        """Return the plan that was made for an equal call, if there was one."""
        plan = self.kept.get(_key(params, impl))
        if plan is not None and plan.by_shape is not None:
            return plan.by_shape.get(_shapes(params))
        return plan

    def make(self, params: SDPAParams, impl: str | None) -> Plan:
        """Decide about checked and normalised `params`, and keep the decision."""
        key = _key(params, impl)  # holds the generation read before deciding, never a later one
        decision = resolve(start(), current_selection(impl), params)
        unfused = decision.backend is SDPBackend.MATH and bool(decision.passed_over)
        plan = Plan(decision, _needs_grad(params), unfused)
        if len(self.kept) >= PLANS_KEPT:
            self.kept.clear()
        if not decision.shape_dependent:
            self.kept[key] = plan
            return plan
        holder = self.kept.setdefault(key, Plan(decision, plan.grad, unfused, {}))
        if holder.by_shape is None or len(holder.by_shape) >= PLANS_KEPT:
            holder.by_shape = {}
        holder.by_shape[_shapes(params)] = plan
        return plan


plans = _Plans()


def dense(params: SDPAParams, impl: str | None) -> Result:
    """Run one dense call; `params` is as the user gave it. Returns `out` and `lse` (None unless asked for)."""
    if _is_regular(params):
        plan = plans.find(params, impl)
        if plan is not None:
            if params.scale is None:  # the record is ours until a kernel has seen it
                vars(params)["scale"] = params.query.shape[-1] ** -0.5
            return plan.run(params)
    return _dense_cold(params, impl)


def varlen(params: SDPAParams, impl: str | None) -> Result:
    """Run one variable-length call. Its checks read lengths, so they are made each time."""
    registry = start()
    params = prepare_varlen(params)
    if impl is not None:
        registry.get(impl, "impl")
    if is_empty(params):
        return _empty(params)
    plan = plans.find(params, impl) or plans.make(params, impl)
    return plan.run(params)


def is_regular_shape(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether three tensors have the plain four-dimensional form, with nothing empty. About 0.7 us."""
    try:
        batch, heads, queries, size = query.shape
        key_batch, kv_heads, keys, key_size = key.shape
        value_batch, value_heads, values, _ = value.shape
    except (AttributeError, ValueError):  # no tensor, or another rank
        return False
    return (
        batch == key_batch == value_batch
        and keys == values
        and size == key_size
        and kv_heads == value_heads
        and (heads == kv_heads or (enable_gqa is True and kv_heads > 0 and heads % kv_heads == 0))
        and batch > 0
        and heads > 0
        and queries > 0
        and keys > 0
        and size > 0
    )


def _is_regular(params: SDPAParams) -> bool:
    """Whether nothing about the call needs the cold path, if its kind was seen before."""
    query, mask, window, scale = params.query, params.attn_mask, params.window_size, params.scale
    if not is_regular_shape(query, params.key, params.value, params.enable_gqa):
        return False
    if mask is not None and not _is_regular_mask(mask, query, params.key):
        return False
    if window is not OPEN_WINDOW and not (type(window) is tuple and all(type(side) is int for side in window)):
        return False
    if params.sinks is not None or params.alibi_slopes is not None or params.seqused_k is not None:
        check_extras(params, query.shape[1], query.shape[0], query.shape[:1])
    return (
        _is_bool(params.is_causal)
        and _is_bool(params.enable_gqa)
        and _is_bool(params.return_lse)
        and (scale is None or ((type(scale) is float or type(scale) is int) and -inf < scale < inf))
        and not torch.is_autocast_enabled(query.device.type)
    )


def _is_bool(value: Any) -> bool:
    return value is False or value is True


def _is_regular_mask(mask: Any, query: Tensor, key: Tensor) -> bool:
    if type(mask) is not Tensor or mask.dim() != 4 or mask.device != query.device:
        return False
    batch, heads, queries, keys = mask.shape
    full = query.shape
    return (
        keys in (1, key.shape[2])
        and queries in (1, full[2])
        and heads in (1, full[1])
        and batch in (1, full[0])
    )


def _key(params: SDPAParams, impl: str | None) -> Hashable:
    """Return all that a decision depends on. About 1.2 us without the optional tensors."""
    query, key, value, mask, sinks = params.query, params.key, params.value, params.attn_mask, params.sinks
    registry = process.registry
    plain = not (params.is_causal or params.window_size != OPEN_WINDOW or params.alibi_slopes is not None)
    return (
        thread.scope,
        impl,
        registry.generation if registry is not None else -1,
        query.dtype,
        key.dtype,
        value.dtype,
        query.device,
        key.device,
        value.device,
        query.shape[-1],
        value.shape[-1],
        _needs_grad(params),
        query.shape[-3] == key.shape[-3],
        plain or query.shape[-2] == key.shape[-2],
        params.is_causal,
        params.causal_variant,
        params.dropout,
        params.window_size,
        params.softcap,
        params.return_lse,
        mask if mask is None else (mask.dtype, mask.requires_grad),
        sinks if sinks is None else (sinks.dtype, sinks.requires_grad),
        params.alibi_slopes is None,
        params.seqused_k is None,
        params.cu_seq_q is None,
        params.block_table is None,
    )


def _shapes(params: SDPAParams) -> Hashable:
    tensors = (params.query, params.key, params.value, params.attn_mask)
    layout = tuple(tensor if tensor is None else (tensor.shape, tensor.stride()) for tensor in tensors)
    return (*layout, params.max_q, params.max_k)


def _needs_grad(params: SDPAParams) -> bool:
    if not torch.is_grad_enabled():
        return False
    mask, sinks = params.attn_mask, params.sinks
    return (
        params.query.requires_grad
        or params.key.requires_grad
        or params.value.requires_grad
        or (mask is not None and mask.requires_grad)
        or (sinks is not None and sinks.requires_grad)
    )


def _dense_cold(params: SDPAParams, impl: str | None) -> Result:
    registry = start()
    params, rows = prepare_dense(params)
    if impl is not None:
        registry.get(impl, "impl")
    if params.query.is_nested:
        decision = resolve(registry, current_selection(impl), params)
        return Plan(decision, _needs_grad(params), False).run(params)
    if is_empty(params):
        out, lse = _empty(params)
    else:
        out, lse = (plans.find(params, impl) or plans.make(params, impl)).run(params)
    return out.reshape(*rows, out.shape[-1]), lse if lse is None else lse.reshape(rows)


def _empty(params: SDPAParams) -> Result:
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
