"""What a call launches: the kernels of this package with their arguments, as values that nothing has run yet.

So the same launches are run by a call, compiled ahead of time to learn what they cost, and timed by the tuning. A
family of kernels for one architecture is another module with these two functions; `impl.kernels_for` chooses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnplug import SDPAParams
from attnplug_flash_triton import config
from attnplug_flash_triton.backward import key_value_gradient_kernel, query_gradient_kernel
from attnplug_flash_triton.decode import MOST_PARTS, combine_kernel
from attnplug_flash_triton.forward import forward_kernel
from attnplug_flash_triton.mask_gradient import mask_gradient_kernel
from attnplug_flash_triton.problem import Machine, Problem, cdiv, keeps_statistics, read, with_dense_rows

FUSED = {"enable_fp_fusion": True}
"""Products and sums in one instruction, of which Triton's default differs between releases."""


class Launch(NamedTuple):
    """A kernel, how many programs of it, and its arguments: in order, and those that are compiled in by name."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    compiled_in: dict[str, Any]

    def run(self) -> None:
        self.kernel[(self.programs,)](*self.arguments, **self.compiled_in)


class Gradients(NamedTuple):
    """What backward's launches write; `delta` is, for each row, the sum of `p * grad_p`."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    delta: Tensor


def forward(params: SDPAParams, seed: Tensor | None, machine: Machine) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """Return the launches of forward, and what they write: out, lse and, where `keeps_statistics`, those.

    With few rows, the query heads that share keys are packed into one tile, so that keys are read once; if that
    makes few programs, the keys are split among more of them, and a last kernel adds up the parts.
    """
    problem = read(params, seed, machine)
    query, flags = params.query, problem.flags
    out = query.new_empty(*query.shape[:-1], params.value.shape[-1])
    lse = query.new_empty(problem.rows, dtype=torch.float32)
    if problem.packed:  # there may be rows that no sequence has
        out.zero_()
        lse.fill_(-torch.inf)
    statistics = query.new_empty((2, *problem.rows), dtype=torch.float32) if keeps_statistics(params) else None
    tops, totals = (None, None) if statistics is None else statistics.unbind()

    few = problem.longest_q * problem.group <= config.FEW
    tiles = problem.tiles(config.FEW_ROWS if few else config.FORWARD)
    pack = problem.group if few else 1
    count, columns = cdiv(problem.longest_q * pack, tiles.block_m), problem.batch * problem.heads // pack
    splits = problem.splits(count * columns, tiles.block_n) if few else 1
    kept = 1.0 / (1.0 - params.dropout) if params.dropout < 1 else 0.0
    written: tuple[Tensor | None, ...] = (out, lse, tops, totals)
    if splits > 1:
        part_tops = lse.new_full((splits, *lse.shape), -torch.inf)
        written = (
            out.new_empty((splits, *out.shape), dtype=torch.float32),
            lse,
            part_tops,
            torch.empty_like(part_tops),
        )
    arguments = (
        *problem.leading,
        *(count, columns * splits, problem.section(columns) * splits),
        *(params.sinks, *written, kept, splits, lse.numel()),
    )
    compiled_in = dict(
        **flags,
        NEGATE=flags["FOLDED"] and problem.factor < 0,
        PAGE_SIZE=params.key.shape[1] if params.block_table is not None else 0,
        PACK=pack,
        SPLIT=splits > 1,
        **_compiled_in(tiles),
    )
    launches = [Launch(forward_kernel, count * columns * splits, arguments, compiled_in)]
    if splits > 1:
        parts, _, *part_statistics = written
        arguments = (
            *(parts, *part_statistics, out, lse, tops, totals),
            *(kept, splits, lse.numel(), problem.heads, lse.shape[-1]),
        )
        compiled_in = {name: flags[name] for name in ("FOLDED", "SIZE_V", "BLOCK_DV")}
        compiled_in |= dict(PACKED=problem.packed, PARTS=MOST_PARTS, **FUSED)
        launches.append(Launch(combine_kernel, lse.numel(), arguments, compiled_in))
    return launches, (out, lse) if statistics is None else (out, lse, statistics)


def backward(
    params: SDPAParams,
    seed: Tensor | None,
    machine: Machine,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    statistics: Tensor | None,
) -> tuple[list[Launch], Gradients]:
    """Return the launches of backward, in the order in which they must run, and what they write."""
    grad_out = with_dense_rows(grad_out, -2 if params.cu_seq_q is None else -3)
    grad_q, grad_k, grad_v = (_gradient_of(tensor, params) for tensor in (params.query, params.key, params.value))
    problem = read(params, seed, machine, grad_out, grad_q, grad_k, grad_v)
    flags, (of_out, of_q, of_k, of_v) = problem.flags, problem.strides
    shifts, totals = (lse, None) if statistics is None else statistics.unbind()
    delta = torch.zeros_like(lse) if problem.packed else torch.empty_like(lse)
    keep_scale = 1.0 / (1.0 - params.dropout) if params.dropout < 1 else 0.0
    shared = (grad_out, *of_out, shifts, totals, delta, keep_scale, problem.factor)

    tiles = problem.tiles(config.QUERY)
    columns, count = problem.batch * problem.heads, cdiv(problem.longest_q, tiles.block_m)
    arguments = (
        *problem.leading,
        *(count, columns, problem.section(columns)),
        *shared,
        *(out.contiguous(), None if grad_lse is None else grad_lse.contiguous()),
        *(grad_q, *of_q),
    )
    of_query = Launch(query_gradient_kernel, count * columns, arguments, flags | _compiled_in(tiles))

    tiles = problem.tiles(config.KEYS)
    columns, count = columns // problem.group, cdiv(problem.longest_k, tiles.block_n)
    arguments = (
        *problem.leading,
        *(count, columns, problem.section(columns)),
        *shared,
        *(grad_k, grad_v, *of_k, *of_v),
    )
    of_keys = Launch(key_value_gradient_kernel, count * columns, arguments, flags | _compiled_in(tiles))

    launches, grad_mask = [of_query, of_keys], None
    if problem.additive and params.attn_mask.requires_grad:
        of_mask, grad_mask = _of_mask(problem, shared)
        launches.append(of_mask)
    return launches, Gradients(grad_q, grad_k, grad_v, grad_mask, delta)


def _of_mask(problem: Problem, shared: tuple[Any, ...]) -> tuple[Launch, Tensor]:
    """Return the launch that writes the gradient of an additive mask, float32, in the mask's own shape."""
    batches, heads, rows, columns = problem.params.attn_mask.shape
    grad = problem.params.attn_mask.new_empty((batches, heads, rows, columns), dtype=torch.float32)
    tiles = problem.tiles(config.MASK)
    count = cdiv(columns, tiles.block_n)
    arguments = (
        *problem.leading,
        *(count, 1, 1),
        *shared,
        *(grad, batches, heads, rows, columns, problem.batch),
    )
    programs = count * cdiv(rows, tiles.block_m) * heads * batches
    return Launch(mask_gradient_kernel, programs, arguments, problem.flags | _compiled_in(tiles)), grad


def _gradient_of(tensor: Tensor, params: SDPAParams) -> Tensor:
    """Return where the gradient of `tensor` is written: laid out as it is, if that leaves the rows dense."""
    rows = -2 if params.cu_seq_q is None else -3
    grad = with_dense_rows(torch.empty_like(tensor), rows)
    return grad if params.cu_seq_q is None else grad.zero_()  # there may be rows that no sequence has


def _compiled_in(tiles: config.Tiles) -> dict[str, Any]:
    return dict(
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **FUSED,
    )
