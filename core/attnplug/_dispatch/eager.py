"""The path of one call: a cached decision, then the kernel.

`dense` and `varlen` are hot: they build the record of the call, look at its shapes, look the decision up
and run it. Everything unusual (a first call, another rank, a broadcast, autocast, an empty tensor, a
mistake) goes to the cold functions below them, which check every argument.

A decision is kept under all that it depends on: the selection, the registry's generation, and the
dtypes, devices, head sizes and features of the call; not its lengths, so that a decode loop, whose keys
grow by one each step, decides once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from attnplug._call.autocast import any_autocast, no_autocast
from attnplug._call.prepare import (
    default_scale,
    empty,
    is_causal_bias,
    is_empty,
    own_terms,
    prepare_dense,
    prepare_varlen,
)
from attnplug._call.requirements import is_aligned
from attnplug._call.validate import check_extras
from attnplug._dispatch.recording import observe, replayed, unfused_warnings_wanted, warn_unfused
from attnplug._dispatch.resolver import Decision, resolve
from attnplug._registry.registry import BUILTIN, Registry
from attnplug._run.autograd import run
from attnplug._run.operator import is_watched, operator_of
from attnplug._run.transforms import is_transformed, run_transformed
from attnplug._selection.selection import current_selection
from attnplug._selection.state import process, start, thread
from attnplug._types import CausalVariant, SDPAParams, SDPBackend

Result = tuple[Tensor, Tensor | None]
Form = tuple[int, int, bool, bool]

OPEN_WINDOW = (-1, -1)
UPPER_LEFT = CausalVariant.UPPER_LEFT
PLANS_KEPT = 4096
_ORDINARY = (None, None, UPPER_LEFT)
_any_autocast, _grad_enabled = torch._C._is_any_autocast_enabled, torch.is_grad_enabled


@dataclass
class Plan:
    """A decision that is kept, or, where shapes matter, one for each shape."""

    decision: Decision
    grad: bool
    unfused: bool
    by_shape: dict[Hashable, Plan] | None = None
    scale: float | None = None
    """The default, which depends on the head size alone."""
    direct: Callable[[SDPAParams], Any] | None = None
    """The kernel's forward, if nothing has to be done around it: no autograd, no check, no warning."""

    def run(self, params: SDPAParams) -> Result:
        if thread.state.recordings or process.trace:
            observe(self.decision, params)
        if self.unfused and unfused_warnings_wanted():
            warn_unfused(self.decision)
        if not self.decision.kernel.composite and is_watched(params.query) and not params.query.is_nested:
            return operator_of(self.decision.entry).run(params)
        if is_transformed():
            return run_transformed(self.decision.entry, params)
        return run(self.decision.entry, params, self.grad)


_plans: dict[Hashable, Plan] = {}


def ordinary(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    enable_gqa: bool,
    scale: float | None,
    impl: str | None,
    form: Form,
) -> Tensor:
    """Run a dense call of a regular form with PyTorch's own arguments, of which `dense` would check more.

    About 3 us on top of the kernel; what is not decided yet, or not so simple, goes to `dense`.
    """
    dtype, device, registry = query.dtype, query.device, process.registry
    if (
        registry is not None
        and attn_mask is None
        and (is_causal is False or is_causal is True)
        and not _any_autocast()
        and key.dtype is dtype is value.dtype
        and key.device == device == value.device
        and not thread.state.recordings
    ):
        recorded = _grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        try:
            plan = _plans.get(_key(registry, impl, dtype, device, form, recorded, dropout, is_causal))
        except TypeError:  # something unhashable, which the cold path has words for
            plan = None
        if plan is not None and plan.direct is not None:
            scale = plan.scale if scale is None else scale
            return plan.direct(
                record_of(
                    query=query,
                    key=key,
                    value=value,
                    dropout=dropout,
                    is_causal=is_causal,
                    enable_gqa=enable_gqa,
                    scale=scale,
                )
            )[0]
    params = record_of(
        query=query,
        key=key,
        value=value,
        attn_mask=attn_mask,
        dropout=dropout,
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        scale=scale,
    )
    return dense(params, impl)[0]


def _key(
    registry: Registry,
    impl: str | None,
    dtype: torch.dtype,
    device: torch.device,
    form: tuple[Any, ...],
    recorded: bool,
    dropout: float,
    is_causal: bool,
    *others: Hashable,
) -> Hashable:
    """Return the key of a decision; `others` only if they ask for more than PyTorch's own arguments, without a mask."""
    form = form if is_causal or others else form[:3]
    return (
        thread.state.scope,
        impl,
        process.activation,
        registry.generation,
        dtype,
        device,
        form,
        recorded,
        dropout,
        is_causal,
        *others,
    )


def record_of(**fields: Any) -> SDPAParams:
    """Build a record without the frozen dataclass's `__init__`, which costs more than the rest of a call.

    Fields that are not given read as the class's defaults.
    """
    if is_compiling():
        return SDPAParams(**fields)
    params = object.__new__(SDPAParams)
    object.__setattr__(params, "__dict__", fields)
    return params


def dense(params: SDPAParams, impl: str | None) -> Result:
    """Run one dense call; `params` is as the user gave it. Returns `out` and `lse` (None unless asked for)."""
    if thread.state.recordings:
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
    if thread.state.recordings:
        impl = replayed(impl)
    _check_impl(impl, start())
    prepared = prepare_varlen(params)
    if is_empty(prepared):
        return empty(prepared)
    plan = _plan(prepared, impl, _varlen_key(prepared, impl))
    with no_autocast(prepared.query):
        return plan.run(prepared)


def regular_form(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> Form | None:
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
    others = (mask if mask is None else _mask_key(params, grad), _extensions(params, grad), params.causal_variant)
    recorded = grad and (query.requires_grad or key.requires_grad or value.requires_grad)
    if others == _ORDINARY:
        return _key(registry, impl, dtype, device, form, recorded, params.dropout, params.is_causal)
    lengths = form if is_aligned(params) else form[:3]
    return _key(registry, impl, dtype, device, lengths, recorded, params.dropout, params.is_causal, *others)


def _mask_key(params: SDPAParams, grad: bool) -> Hashable:
    """Return what a decision depends on of the mask, which becomes four-dimensional if it is not."""
    query, key, mask = params.query, params.key, params.attn_mask
    if not isinstance(mask, Tensor) or is_causal_bias(mask) or mask.dim() > 4 or mask.device != query.device:
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
        and (window is OPEN_WINDOW or _is_open(window))
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


def _is_open(window: Any) -> bool:
    """Whether `window` is `OPEN_WINDOW` in another tuple, as the cold path makes one; -1.0 is not -1."""
    return type(window) is tuple and window == OPEN_WINDOW and type(window[0]) is int is type(window[1])


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
        thread.state.scope,
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
        if plan.decision.kernel.any_form or prepared.query.is_nested:
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
        plan = Plan(decision, params.needs_grad, unfused)
        if key is not None and _is_simple(plan):
            plan.scale, plan.direct = default_scale(params.query), decision.kernel.forward
        if key is not None:
            _keep(key, shape, plan)
    return plan


def _is_simple(plan: Plan) -> bool:
    """Whether nothing has to be done around the kernel's forward. The built-in ones are taken at their word."""
    entry, kernel = plan.decision.entry, plan.decision.kernel
    ours = entry.distribution == BUILTIN and kernel.composite and not plan.decision.shape_dependent
    return ours and not (plan.unfused or process.trace or (plan.grad and kernel.backward is not None))


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
