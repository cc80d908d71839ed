"""The kernel `flash_triton` as attnplug knows it: what runs on the host around the Triton kernels."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from functools import partial, reduce
from operator import itemgetter, or_
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from attnplug import Feature, SDPAParams, compute_capability
from attnplug_flash_triton import config, launches, toolchain
from attnplug_flash_triton.growing import Growing, can_grow
from attnplug_flash_triton.plans import ALIGNED, Plan
from attnplug_flash_triton.problem import Machine, keeps_statistics, machine_of, tf32_allowed

PLANS_KEPT = 1024

Kept = TypeVar("Kept")
_plans: dict[Hashable, Plan] = {}
_growing: dict[Hashable, Growing] = {}
_interpreter = threading.Lock()
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
"""PyTorch's function without a look at whether CUDA is in use, which a tensor there says."""


def supports(params: SDPAParams) -> list[str]:
    """Return what, beyond the capabilities, keeps this call from running here."""
    reasons = []
    query, size_v = params.query, params.value.shape[-1]
    if not 1 <= size_v <= config.SIZES[-1]:
        reasons.append(f"value head size {size_v} is not between 1 and {config.SIZES[-1]}")
    if params.block_table is not None and params.needs_grad:
        reasons.append("has no gradients for paged keys and values")
    if not reasons and query.device.type == "cuda":
        reasons += toolchain.reasons(query.device)
    return reasons


def lacks(device: torch.device, dtype: torch.dtype) -> dict[Feature, str]:
    """Return the declared features that a device does not have."""
    found = compute_capability(device)
    if found is None or found[0] != 9 or dtype == torch.float32:
        return {}
    from attnplug_flash_triton.hopper import choose

    if not choose.are_allowed():
        return {}
    order = "on compute capability 9.0 the query's gradient is added up in no fixed order"
    return {Feature.DETERMINISTIC: f"{order}, unless torch.use_deterministic_algorithms(True) is in force"}


def notes(params: SDPAParams) -> list[str]:
    """Return which family of kernels runs a call on Hopper, and, where it is the plain one, why."""
    found = compute_capability(params.query.device)
    if found is None or found[0] != 9:
        return []
    from attnplug_flash_triton.hopper import choose

    kinds = {"forward": choose.reasons_forward(params)}
    if params.needs_grad:
        kinds["backward"] = choose.reasons_backward(params)
    return [
        f"{kind} runs on the plain kernels, not on Hopper's own: {', '.join(reasons)}"
        if reasons
        else f"{kind} runs on Hopper's own kernels{choose.remark(kind, params)}"
        for kind, reasons in kinds.items()
    ]


def forward(params: SDPAParams) -> tuple[Tensor, ...]:
    """Return out, lse and what backward needs besides.

    That is the rows' maxima and sums, where `keeps_statistics`, and, with dropout, the seed.
    """
    device = params.query.device
    given = tensors_of(params)
    if params.dropout > 0:  # drawn on the device, so that nothing waits for it
        given["seed"] = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    results = _run(_forward_plan(params, given, device), given, device)
    return (*results, given["seed"]) if params.dropout > 0 else results


def prepare(params: SDPAParams) -> Callable[..., tuple[Tensor | None, ...] | None] | None:
    """Return what runs a call whose tensors are like these, where they are aligned; None if it draws numbers."""
    if params.dropout > 0:
        return None
    needs_grad = params.needs_grad
    wants_lse = needs_grad or params.return_lse
    given, dtype = tensors_of(params), params.query.dtype
    settings = partial(_settings, dtype) if dtype is torch.float32 else config.version  # of others the rest is the same
    carry_out = _Like(params, given, settings, partial(_forward_plan, wants_lse=wants_lse)).carry_out
    present = _present(params, given) if params.is_varlen else None  # a dense call has those three alone

    def run(*tensors: Any) -> tuple[Tensor | None, ...] | None:
        results = carry_out(tensors if present is None else present(tensors))
        if needs_grad or results is None:
            return results
        return results[:2] if wants_lse else (results[0], None)

    return run


prepare_packed = prepare
"""Lengths and pages are read on the device alone."""


class _Like:
    """Calls that differ in nothing but where their tensors lie in memory; see `prepare`.

    Args:
        params: one of them, which is not kept.
        given: its tensors.
        settings: returns what the plan depends on besides them.
        make: returns the plan for them.
    """

    def __init__(
        self,
        params: SDPAParams,
        given: dict[str, Tensor],
        settings: Callable[[], Hashable],
        make: Callable[[SDPAParams, dict[str, Tensor], torch.device], Plan],
    ) -> None:
        self._device, self._names, self._settings, self._make = params.query.device, tuple(given), settings, make
        self._index = self._device.index if self._device.type == "cuda" else None
        self._constants = {**vars(params), **_NO_TENSORS}
        self._made: tuple[Hashable, Plan | None] = None, None
        if _are_aligned([tensor.data_ptr() for tensor in given.values()]):
            self._made = settings(), make(params, given, self._device)

    def carry_out(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Return what the plan gives for tensors in the order of those that it was prepared with.

        None where one does not start at a multiple of `ALIGNED` bytes.
        """
        pointers = [tensor.data_ptr() for tensor in tensors]
        if not _are_aligned(pointers):
            return None
        settings = self._settings()
        made, plan = self._made
        if plan is not None and made == settings:
            if self._index is not None and _current_device() == self._index:
                results = plan.repeat(tensors, pointers)
                if results is not None:
                    return results
            return _run(plan, dict(zip(self._names, tensors, strict=True)), self._device)
        given = dict(zip(self._names, tensors, strict=True))
        own: dict[str, Any] = {name: tensor for name, tensor in given.items() if name in _NO_TENSORS}
        plan = self._make(SDPAParams(**{**self._constants, **own}), given, self._device)
        self._made = settings, plan
        return _run(plan, given, self._device)


def _present(params: SDPAParams, given: dict[str, Tensor]) -> itemgetter[Any]:
    """Return what takes the tensors that a call like this one has, by their names in order, from among all and None."""
    of_call = (*_FIRST, *_SELDOM) if params.is_varlen else _FIRST
    taken = (*of_call, *[name for name in given if name not in of_call])
    return itemgetter(*[taken.index(name) for name in given])


def _are_aligned(pointers: list[int]) -> bool:
    """Whether each is a multiple of `ALIGNED` bytes."""
    return reduce(or_, pointers) % ALIGNED == 0


def _forward_plan(params: SDPAParams, given: dict[str, Tensor], device: torch.device, wants_lse: bool = True) -> Plan:
    """Return a plan that gives what forward returns or, unless `wants_lse`, out alone; the rest is then workspace."""
    kind = (*_kind(params, given, device), wants_lse)
    if (kept := _plans.get(kind)) is not None:  # before a call of each layer pays for what follows
        return kept

    def make(machine: Machine) -> Plan:
        plan = _of_whole(params, lambda whole: family_for(whole, machine).forward(whole, machine))
        return plan if wants_lse else replace(plan, results=plan.results[:1])

    def grown(machine: Machine) -> Plan:
        like = _kind_but_keys(params, kind, given)
        found = _growing.get(like)
        if found is None:
            found = _keep(_growing, like, Growing(params, machine))
        return found.plan(params, lambda: make(machine))

    return _plan(kind, device, grown if can_grow(params) else make)


def backward(
    params: SDPAParams,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *saved: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, attn_mask and sinks."""
    statistics = saved[:2] if keeps_statistics(params) else ()
    given = _given_to_backward(params, grad_out, out, lse, *statistics)
    if grad_lse is not None:
        given["grad_lse"] = grad_lse
    if params.dropout > 0:
        given["seed"] = saved[-1]
    device = params.query.device
    query, key, value, delta, *of_mask = _run(_backward_plan(params, given, device), given, device)
    sinks = params.sinks
    of_sinks = _sinks_gradient(sinks, lse, delta) if sinks is not None and sinks.requires_grad else None
    return query, key, value, of_mask[0] if of_mask else None, of_sinks


def prepare_backward(
    params: SDPAParams, grad_out: Tensor, out: Tensor, lse: Tensor, *statistics: Tensor
) -> Callable[..., tuple[Tensor | None, ...] | None] | None:
    """Return what runs backward of a call whose tensors are like these, where they are aligned."""
    given = _given_to_backward(params, grad_out, out, lse, *statistics)
    present = _present(params, given)
    names, wants_sinks = list(given), params.sinks is not None and params.sinks.requires_grad
    settings = partial(_settings_of_backward, params.query.dtype is torch.float32)
    like = _Like(params, given, settings, partial(_backward_plan, wants_delta=wants_sinks))

    def run(*tensors: Any) -> tuple[Tensor | None, ...] | None:
        own = present(tensors)
        results = like.carry_out(own)
        if results is None or not wants_sinks:
            return results
        *grads, delta = results
        return *grads, None, _sinks_gradient(own[names.index("sinks")], own[names.index("lse")], delta)

    return run


def _given_to_backward(
    params: SDPAParams, grad_out: Tensor, out: Tensor, lse: Tensor, *statistics: Tensor
) -> dict[str, Tensor]:
    given = tensors_of(params) | {"grad_out": grad_out, "out": out, "lse": lse}
    return given | dict(zip(("top", "total"), statistics, strict=False))


def _backward_plan(
    params: SDPAParams, given: dict[str, Tensor], device: torch.device, wants_delta: bool = True
) -> Plan:
    """Return a plan that gives all gradients and delta or, unless `wants_delta`, those of three tensors alone."""

    def make(machine: Machine) -> Plan:
        of_rows = [given.get(name) for name in ("grad_lse", "out", "lse")]
        statistics = [given[name] for name in ("top", "total") if name in given]
        grad_out = given["grad_out"]
        plan = _of_whole(
            params, lambda whole: family_for(whole, machine).backward(whole, machine, grad_out, *of_rows, *statistics)
        )
        return plan if wants_delta else replace(plan, results=plan.results[:3])

    return _plan((*_kind(params, given, device), wants_delta), device, make)


def _of_whole(params: SDPAParams, make: Callable[[SDPAParams], Plan]) -> Plan:
    """Return the plan of a call in which what kernels read number by number is copied where it lies apart in memory."""
    loose = {}
    for name in _SELDOM:
        tensor = getattr(params, name)
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            loose[name] = tensor.contiguous()
    if not loose:
        return make(params)
    plan = make(replace(params, **loose))
    return replace(plan, compact=(*plan.compact, *loose))


def family_for(params: SDPAParams, machine: Machine) -> ModuleType:
    """Return the family of kernels that runs a call; one for a single architecture is put before the others here.

    It is asked when a plan is made, so it may look at what a plan is kept under, see `_kind`, and nothing else.
    """
    if machine.architecture == "sm_90":
        from attnplug_flash_triton.hopper import choose

        return choose
    return launches


def _plan(kind: Hashable, device: torch.device, make: Callable[[Machine], Plan]) -> Plan:
    """Return the plan that is kept for calls of this kind, or make and keep one."""
    plan = _plans.get(kind)
    return _keep(_plans, kind, make(machine_of(device))) if plan is None else plan


def _keep(where: dict[Hashable, Kept], kind: Hashable, value: Kept) -> Kept:
    if len(where) >= PLANS_KEPT:
        where.clear()
    where[kind] = value
    return value


def _run(plan: Plan, given: dict[str, Tensor], device: torch.device) -> tuple[Tensor, ...]:
    if not given["query"].is_cuda:  # `device.type` takes three times as long
        with _interpreter:  # Triton's interpreter keeps the program at work in a variable of the process
            return plan.run(given, device)
    if torch.cuda.current_device() == device.index:
        return plan.run(given, device)
    with torch.cuda.device(device):
        return plan.run(given, device)


def _kind(params: SDPAParams, given: dict[str, Tensor], device: torch.device) -> tuple[Hashable, ...]:
    """Return all that a plan depends on. About 3 us."""
    return (
        *[(tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % ALIGNED) for tensor in given.values()],
        params.max_k,
        *_rest_of_kind(params, given, device),
    )


def _kind_but_keys(params: SDPAParams, kind: tuple[Hashable, ...], names: Iterable[str]) -> tuple[Hashable, ...]:
    """Return what `_kind` returned for tensors of these names, but for how many keys there are, and where they lie.

    Nor does it hold how many pages a sequence may have.
    """
    sizes: list[Any] = [params.key.shape, params.value.shape]
    heads = [tuple(size[1:]) if params.is_varlen else (*size[:2], size[3]) for size in sizes]
    forms: list[Any] = [*kind]
    for place, name in enumerate(names):
        if name in ("key", "value", "block_table"):
            forms[place] = forms[place][2:]
    del forms[place + 1]  # max_k
    return (*heads, *forms)


def _rest_of_kind(params: SDPAParams, given: dict[str, Tensor], device: torch.device) -> tuple[Hashable, ...]:
    mask = params.attn_mask
    return (
        *given,
        device,
        *_settings(given["query"].dtype),
        params.dropout,
        params.is_causal,
        params.scale,
        params.causal_variant,
        params.window_size,
        params.softcap,
        params.max_q,
        mask is not None and mask.requires_grad,
        torch.are_deterministic_algorithms_enabled(),
    )


def _settings(dtype: torch.dtype) -> tuple[int, bool]:
    """Return what a plan depends on besides the call and PyTorch's deterministic mode."""
    return config.version(), dtype is torch.float32 and tf32_allowed()


def _settings_of_backward(single: bool) -> tuple[Hashable, ...]:
    """Return what a plan of backward depends on besides the call."""
    return config.version(), single and tf32_allowed(), torch.are_deterministic_algorithms_enabled()


def tensors_of(params: SDPAParams) -> dict[str, Tensor]:
    """Return the tensors of a call by name, a boolean mask as numbers."""
    given = {"query": params.query, "key": params.key, "value": params.value}
    if (mask := params.attn_mask) is not None:
        given["attn_mask"] = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    for name in _SELDOM:
        if (tensor := getattr(params, name)) is not None:
            given[name] = tensor
    return given


_FIRST = ("query", "key", "value")
_SELDOM = ("cu_seq_q", "cu_seq_k", "sinks", "alibi_slopes", "seqused_k", "block_table")
"""In the order in which `prepare_packed` gets them."""
_NO_TENSORS = dict.fromkeys((*_FIRST, "attn_mask", *_SELDOM))


def fake(params: SDPAParams) -> tuple[Tensor, ...]:
    """Return empty tensors like those that `forward` returns."""
    query = params.query
    rows = (query.shape[1], query.shape[0]) if params.is_varlen else query.shape[:-1]
    returned = [query.new_empty(*query.shape[:-1], params.value.shape[-1]), query.new_empty(rows, dtype=torch.float32)]
    if keeps_statistics(params):
        returned += (query.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if params.dropout > 0:
        returned.append(query.new_empty((1,), dtype=torch.int64))
    return tuple(returned)


def _sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Return `-sum(p_sink * delta)` over all rows: the sink has a share of the denominator, and no value."""
    share = torch.exp(sinks.detach().double()[:, None] - lse)
    share = torch.where(lse == -torch.inf, 0.0, share)
    grad = -(share * delta).sum(-1)
    return grad.sum_to_size(sinks.shape).to(sinks.dtype)
