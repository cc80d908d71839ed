"""The kernel `flash_triton`: what runs on the host around the Triton kernels."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from attnplug import SDPAParams
from attnplug_flash_triton import config, toolchain
from attnplug_flash_triton.backward import key_value_gradient_kernel, query_gradient_kernel
from attnplug_flash_triton.decode import MOST_PARTS, combine_kernel
from attnplug_flash_triton.forward import forward_kernel
from attnplug_flash_triton.mask_gradient import mask_gradient_kernel
from attnplug_flash_triton.problem import INTERPRETED, Problem, keeps_statistics, read, with_dense_rows


def supports(params: SDPAParams) -> list[str]:
    """Return what, beyond the capabilities, keeps this call from running here."""
    reasons = []
    query, size_v = params.query, params.value.shape[-1]
    if not 1 <= size_v <= config.SIZES[-1]:
        reasons.append(f"value head size {size_v} is not between 1 and {config.SIZES[-1]}")
    wants_gradient = any(tensor.requires_grad for tensor in (query, params.key, params.value))
    if params.block_table is not None and wants_gradient and torch.is_grad_enabled():
        reasons.append("has no gradients for paged keys and values")
    if INTERPRETED and query.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter (TRITON_INTERPRET=1) is wrong in bfloat16; use float16 or float32")
    if INTERPRETED and query.device.type != "cpu":
        reasons.append("Triton's interpreter (TRITON_INTERPRET=1) is for CPU tensors here; unset it to run on the card")
    if not INTERPRETED and query.device.type == "cpu":
        reasons.append("needs a card; takes CPU tensors only in Triton's interpreter, TRITON_INTERPRET=1")
    if not reasons and query.device.type == "cuda":
        reasons += toolchain.reasons(query.device)
    return reasons


def forward(params: SDPAParams) -> tuple[Tensor, ...]:
    """Return out, lse and what backward needs besides.

    That is the rows' maxima and sums, where `keeps_statistics`, and, with dropout, the seed.
    """
    query = params.query
    seed = None
    if params.dropout > 0:  # drawn on the device, so that nothing waits for it
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    problem = read(params, seed)
    out = query.new_empty(*query.shape[:-1], params.value.shape[-1])
    lse = query.new_empty(problem.rows, dtype=torch.float32)
    if problem.packed:  # there may be rows that no sequence has
        out.zero_()
        lse.fill_(-torch.inf)
    statistics = query.new_empty((2, *problem.rows), dtype=torch.float32) if keeps_statistics(params) else None
    tops, totals = (None, None) if statistics is None else statistics.unbind()
    with _on(query.device):
        _run_forward(problem, out, lse, tops, totals)
    return out, lse, *(tensor for tensor in (statistics, seed) if tensor is not None)


def _run_forward(problem: Problem, out: Tensor, lse: Tensor, tops: Tensor | None, totals: Tensor | None) -> None:
    """Launch the forward kernel, and the one that adds up parts where the keys are split.

    With few rows, the query heads that share keys are packed into one tile, so that keys are read once.
    """
    params, flags = problem.params, problem.flags
    few = problem.longest_q * problem.group <= config.FEW
    tiles = problem.tiles(config.FEW_ROWS if few else config.FORWARD)
    pack = problem.group if few else 1
    count, columns = cdiv(problem.longest_q * pack, tiles.block_m), problem.batch * problem.heads // pack
    splits = problem.splits(count * columns, tiles.block_n) if few else 1
    kept = 1.0 / (1.0 - params.dropout) if params.dropout < 1 else 0.0
    results = (out, lse, tops, totals)
    if splits > 1:
        parts = out.new_empty((splits, *out.shape), dtype=torch.float32)
        part_tops = lse.new_full((splits, *lse.shape), -torch.inf)
        results = (parts, lse, part_tops, torch.empty_like(part_tops))
    forward_kernel[(count * columns * splits,)](
        *problem.leading,
        *(count, columns * splits, problem.section(columns) * splits),
        *(params.sinks, *results, kept, splits, lse.numel()),
        **flags,
        NEGATE=flags["FOLDED"] and problem.factor < 0,
        PAGE_SIZE=params.key.shape[1] if params.block_table is not None else 0,
        PACK=pack,
        SPLIT=splits > 1,
        **_compiled_with(tiles),
    )
    if splits > 1:
        parts, _, *part_statistics = results
        combine_kernel[(lse.numel(),)](
            *(parts, *part_statistics, out, lse, tops, totals),
            *(kept, splits, lse.numel(), problem.heads, lse.shape[-1]),
            PACKED=problem.packed,
            **{name: flags[name] for name in ("FOLDED", "SIZE_V", "BLOCK_DV")},
            PARTS=MOST_PARTS,
        )


def backward(
    params: SDPAParams,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *saved: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, attn_mask and sinks."""
    query, key, value = params.query, params.key, params.value
    grad_out = with_dense_rows(grad_out, -2 if params.cu_seq_q is None else -3)
    empty_like = torch.empty_like if params.cu_seq_q is None else torch.zeros_like
    grad_q, grad_k, grad_v = (empty_like(tensor) for tensor in (query, key, value))
    seed = saved[-1] if params.dropout > 0 else None
    problem = read(params, seed, grad_out, grad_q, grad_k, grad_v)
    shifts, totals = saved[0].unbind() if keeps_statistics(params) else (lse, None)
    delta = empty_like(lse)
    flags, (of_out, of_q, of_k, of_v) = problem.flags, problem.strides
    keep_scale = 1.0 / (1.0 - params.dropout) if params.dropout < 1 else 0.0
    shared = (grad_out, *of_out, shifts, totals, delta, keep_scale, problem.factor)
    with _on(query.device):
        tiles = problem.tiles(config.QUERY)
        columns, count = problem.batch * problem.heads, cdiv(problem.longest_q, tiles.block_m)
        query_gradient_kernel[(count * columns,)](
            *problem.leading,
            *(count, columns, problem.section(columns)),
            *shared,
            *(out.contiguous(), None if grad_lse is None else grad_lse.contiguous()),
            *(grad_q, *of_q),
            **flags,
            **_compiled_with(tiles),
        )
        tiles = problem.tiles(config.KEYS)
        columns, count = columns // problem.group, cdiv(problem.longest_k, tiles.block_n)
        key_value_gradient_kernel[(count * columns,)](
            *problem.leading,
            *(count, columns, problem.section(columns)),
            *shared,
            *(grad_k, grad_v, *of_k, *of_v),
            **flags,
            **_compiled_with(tiles),
        )
        grad_mask = None
        if problem.additive and params.attn_mask.requires_grad:
            grad_mask = _mask_gradient(problem, shared)
    return grad_q, grad_k, grad_v, grad_mask, _sinks_gradient(params.sinks, lse, delta)


def _mask_gradient(problem: Problem, shared: tuple[Any, ...]) -> Tensor:
    """Return the gradient of an additive mask, float32, in the mask's own shape."""
    batches, heads, rows, columns = problem.params.attn_mask.shape
    grad = problem.params.attn_mask.new_empty((batches, heads, rows, columns), dtype=torch.float32)
    tiles = problem.tiles(config.MASK)
    count = cdiv(columns, tiles.block_n)
    mask_gradient_kernel[(count * cdiv(rows, tiles.block_m) * heads * batches,)](
        *problem.leading,
        *(count, 1, 1),
        *shared,
        *(grad, batches, heads, rows, columns, problem.batch),
        **problem.flags,
        **_compiled_with(tiles),
    )
    return grad


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


def _compiled_with(tiles: config.Tiles) -> dict[str, Any]:
    return dict(BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, num_warps=tiles.num_warps, num_stages=tiles.num_stages)


def _on(device: torch.device) -> Any:
    """Return a context in which `device` is the one that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
