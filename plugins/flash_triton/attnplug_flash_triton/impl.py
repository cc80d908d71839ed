"""The kernel `flash_triton` as attnplug knows it: what runs on the host around the Triton kernels."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor

from attnplug import SDPAParams
from attnplug_flash_triton import config, launches, toolchain
from attnplug_flash_triton.launches import Launch
from attnplug_flash_triton.problem import Machine, keeps_statistics, machine_of

_interpreter = threading.Lock()


def supports(params: SDPAParams) -> list[str]:
    """Return what, beyond the capabilities, keeps this call from running here."""
    reasons = []
    query, size_v = params.query, params.value.shape[-1]
    if not 1 <= size_v <= config.SIZES[-1]:
        reasons.append(f"value head size {size_v} is not between 1 and {config.SIZES[-1]}")
    wants_gradient = any(tensor.requires_grad for tensor in (query, params.key, params.value))
    if params.block_table is not None and wants_gradient and torch.is_grad_enabled():
        reasons.append("has no gradients for paged keys and values")
    if not reasons and query.device.type == "cuda":
        reasons += toolchain.reasons(query.device)
    return reasons


def forward(params: SDPAParams) -> tuple[Tensor, ...]:
    """Return out, lse and what backward needs besides.

    That is the rows' maxima and sums, where `keeps_statistics`, and, with dropout, the seed.
    """
    device = params.query.device
    seed = None
    if params.dropout > 0:  # drawn on the device, so that nothing waits for it
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    machine = machine_of(device)
    launched, results = kernels_for(machine).forward(params, seed, machine)
    run(launched, device)
    return results if seed is None else (*results, seed)


def backward(
    params: SDPAParams,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *saved: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, attn_mask and sinks."""
    device = params.query.device
    statistics = saved[0] if keeps_statistics(params) else None
    seed = saved[-1] if params.dropout > 0 else None
    machine = machine_of(device)
    launched, gradients = kernels_for(machine).backward(params, seed, machine, grad_out, grad_lse, out, lse, statistics)
    run(launched, device)
    *others, delta = gradients
    return *others, _sinks_gradient(params.sinks, lse, delta)


def kernels_for(machine: Machine) -> ModuleType:
    """Return the family of kernels for a machine; one for a single architecture is put before the others here."""
    return launches


def run(launched: Iterable[Launch], device: torch.device) -> None:
    """Run launches where their tensors are."""
    # Triton's interpreter keeps the program at work in a variable of the process.
    with torch.cuda.device(device) if device.type == "cuda" else _interpreter:
        for launch in launched:
            launch.run()


def fake(params: SDPAParams) -> tuple[Tensor, ...]:
    """Return empty tensors like those that `forward` returns."""
    query = params.query
    rows = query.shape[:-1] if params.cu_seq_q is None else (query.shape[1], query.shape[0])
    returned = [query.new_empty(*query.shape[:-1], params.value.shape[-1]), query.new_empty(rows, dtype=torch.float32)]
    if keeps_statistics(params):
        returned.append(query.new_empty((2, *rows), dtype=torch.float32))
    if params.dropout > 0:
        returned.append(query.new_empty((1,), dtype=torch.int64))
    return tuple(returned)


def _sinks_gradient(sinks: Tensor | None, lse: Tensor, delta: Tensor) -> Tensor | None:
    """Return `-sum(p_sink * delta)` over all rows: the sink has a share of the denominator, and no value."""
    if sinks is None or not sinks.requires_grad:
        return None
    share = torch.exp(sinks.detach().double()[:, None] - lse)
    share = torch.where(lse == -torch.inf, 0.0, share)
    grad = -(share * delta).sum(-1)
    return grad.sum_to_size(sinks.shape).to(sinks.dtype)
