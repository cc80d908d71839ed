"""The plans of the plain kernels: which of them a call launches, with which arguments, and what they write.

They suit every architecture and every feature. Another family of kernels is another module with these two functions;
`impl.family_for` chooses.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnplug import SDPAParams
from attnplug_flash_triton import config
from attnplug_flash_triton.backward import key_value_gradient_kernel, query_gradient_kernel
from attnplug_flash_triton.decode import MOST_PARTS, combine_kernel
from attnplug_flash_triton.forward import forward_kernel
from attnplug_flash_triton.mask_gradient import mask_gradient_kernel
from attnplug_flash_triton.plans import Launch, New, Plan, contiguous_strides
from attnplug_flash_triton.problem import (
    Form,
    Machine,
    Problem,
    block_of,
    cdiv,
    is_dense,
    keeps_statistics,
    read,
    row_dim,
)
from attnplug_flash_triton.tails import clear_kernel

FUSED = {"enable_fp_fusion": True}
"""Products and sums in one instruction, of which Triton's default differs between releases."""
TAIL = 32
"""Rows of one head that are cleared at once."""


class Grid(NamedTuple):
    """The programs of forward, before keys are split: so many tiles of rows for each of `columns`.

    `pack` query heads that share keys are in one tile, where there are few rows.
    """

    few: bool
    tiles: config.Tiles
    pack: int
    row_tiles: int
    columns: int

    @property
    def programs(self) -> int:
        return self.row_tiles * self.columns


def grid_of(problem: Problem) -> Grid:
    """Return the programs of forward, which do not depend on how many keys there are."""
    few = problem.longest_q * problem.group <= config.FEW
    tiles = problem.tiles(config.FEW_ROWS if few else config.FORWARD)
    pack = problem.group if few else 1
    count = cdiv(problem.longest_q * pack, tiles.block_m)
    return Grid(few, tiles, pack, count, problem.batch * problem.heads // pack)


def forward(params: SDPAParams, machine: Machine) -> Plan:
    """Return the plan of forward: it gives out, lse and, where `keeps_statistics`, tops and totals of all rows.

    With few rows, the query heads that share keys are packed into one tile, so that keys are read once; if that
    makes few programs, the keys are split among more of them, and a last kernel adds up the parts.
    """
    problem = read(params, machine)
    rows = problem.rows
    shape, dtype = (*params.query.shape[:-1], params.value.shape[-1]), params.query.dtype
    new = {"out": New.contiguous(shape, dtype), "lse": New.contiguous(rows, torch.float32)}
    statistics: tuple[str | None, str | None] = (None, None)
    if keeps_statistics(params):
        statistics = ("top", "total")
        new |= {name: New.contiguous(rows, torch.float32) for name in statistics}
    results = tuple(new)

    few, tiles, pack, count, columns = grid = grid_of(problem)
    splits = problem.splits(grid.programs, tiles.block_n) if few else 1
    kept = 1.0 / (1.0 - params.dropout) if params.dropout < 1 else 0.0
    written: tuple[str | None, ...] = ("out", "lse", *statistics)
    if splits > 1:
        written = ("parts", "lse", "part_tops", "part_totals")
        new |= {
            "parts": New.contiguous((splits, *shape), torch.float32),
            **{name: New.contiguous((splits, *rows), torch.float32) for name in ("part_tops", "part_totals")},
        }
    arguments = (
        *problem.leading,
        *(count, columns * splits, problem.section(columns) * splits),
        *("sinks" if params.sinks is not None else None, *written, kept, splits, prod(rows)),
    )
    compiled_in = dict(
        **problem.flags,
        NEGATE=problem.flags["FOLDED"] and problem.factor < 0,
        PAGE_SIZE=params.key.shape[1] if params.block_table is not None else 0,
        PACK=pack,
        SPLIT=splits > 1,
        **_compiled_in(tiles),
    )
    launches = [Launch(forward_kernel, grid.programs * splits, arguments, compiled_in)]
    if splits > 1:
        launches.append(_of_parts(problem, statistics, kept, splits))
    elif problem.packed:
        launches.append(tail_of_out(params, machine, new))
    return Plan(tuple(launches), new, results, _not_dense(params))


def _of_parts(problem: Problem, statistics: tuple[str | None, str | None], kept: float, splits: int) -> Launch:
    """Return the launch that adds up the parts of each row."""
    rows = prod(problem.rows)
    arguments = (
        *("parts", "part_tops", "part_totals", "out", "lse", *statistics),
        *("cu_seq_q" if problem.packed else None, problem.batch),
        *(kept, splits, rows, problem.heads, problem.rows[-1]),
    )
    compiled_in = {name: problem.flags[name] for name in ("FOLDED", "SIZE_V", "BLOCK_DV")}
    return Launch(combine_kernel, rows, arguments, compiled_in | dict(PACKED=problem.packed, PARTS=MOST_PARTS, **FUSED))


def backward(
    params: SDPAParams,
    machine: Machine,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *statistics: Tensor,
) -> Plan:
    """Return the plan of backward: it gives the gradients of query, key and value, delta, and that of the mask.

    Delta is, for each row, the sum of `p * grad_p`. The last is there if the mask is additive and wants one.
    """
    rows = row_dim(params)
    new = gradients_of(params)
    others = [Form.dense(grad_out, rows), *(Form(tensor.shape, tensor.stride) for tensor in new.values())]
    problem = read(params, machine, *others)
    flags, (of_out, of_q, of_k, of_v) = problem.flags, problem.strides
    new["delta"] = New.contiguous(lse.shape, torch.float32)
    keep_scale = 1.0 / (1.0 - params.dropout) if params.dropout < 1 else 0.0
    shifts = ("top", "total") if statistics else ("lse", None)
    shared = ("grad_out", *of_out, *shifts, "delta", keep_scale, problem.factor)

    tiles = problem.tiles(config.QUERY)
    columns, count = problem.batch * problem.heads, cdiv(problem.longest_q, tiles.block_m)
    arguments = (
        *problem.leading,
        *(count, columns, problem.section(columns)),
        *shared,
        *("out", None if grad_lse is None else "grad_lse"),
        *("grad_query", *of_q),
    )
    of_query = Launch(query_gradient_kernel, count * columns, arguments, flags | _compiled_in(tiles))

    tiles = problem.tiles(config.KEYS)
    columns, count = columns // problem.group, cdiv(problem.longest_k, tiles.block_n)
    arguments = (
        *problem.leading,
        *(count, columns, problem.section(columns)),
        *shared,
        *("grad_key", "grad_value", *of_k, *of_v),
    )
    of_keys = Launch(key_value_gradient_kernel, count * columns, arguments, flags | _compiled_in(tiles))

    launches = [of_query, of_keys]
    if problem.additive and params.attn_mask.requires_grad:
        new["grad_mask"] = New.contiguous(params.attn_mask.shape, torch.float32)
        launches.append(_of_mask(problem, shared))
    launches += tails_of_gradients(params, machine, new)
    compact = [*_not_dense(params)]
    if not is_dense(grad_out.shape, grad_out.stride(), rows):
        compact.append("grad_out")
    whole = {"out": out, "grad_lse": grad_lse}
    compact += [name for name, tensor in whole.items() if tensor is not None and not tensor.is_contiguous()]
    return Plan(tuple(launches), new, tuple(new), tuple(compact))


def _of_mask(problem: Problem, shared: tuple[Any, ...]) -> Launch:
    """Return the launch that writes the gradient of an additive mask, float32, in the mask's own shape."""
    batches, heads, rows, columns = problem.params.attn_mask.shape
    tiles = problem.tiles(config.MASK)
    count = cdiv(columns, tiles.block_n)
    arguments = (
        *problem.leading,
        *(count, 1, 1),
        *shared,
        *("grad_mask", batches, heads, rows, columns, problem.batch),
    )
    programs = count * cdiv(rows, tiles.block_m) * heads * batches
    return Launch(mask_gradient_kernel, programs, arguments, problem.flags | _compiled_in(tiles))


def gradients_of(params: SDPAParams) -> dict[str, New]:
    """Return where the gradients of query, key and value are written: laid out as these, if that leaves rows dense."""
    new = {}
    for name in ("query", "key", "value"):
        tensor = getattr(params, name)
        shape, stride = tuple(tensor.shape), _strides_like(tensor)
        stride = stride if is_dense(shape, stride, row_dim(params)) else contiguous_strides(shape)
        new[f"grad_{name}"] = New(shape, tensor.dtype, stride, 0.0 if name != "query" and _has_gaps(params) else None)
    return new


def _strides_like(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of `torch.empty_like`, which takes 10 us."""
    stride = tensor.stride()
    if tensor.is_contiguous():
        return stride
    if all(step > after for step, after in pairwise(stride)):
        return contiguous_strides(tensor.shape)
    return torch.empty_like(tensor, device="meta").stride()


def _has_gaps(params: SDPAParams) -> bool:
    """Whether there may be packed keys within sequences that do not exist."""
    return params.is_varlen and params.seqused_k is not None


def tail_of_out(params: SDPAParams, machine: Machine, new: dict[str, New]) -> Launch:
    """Return the launch that writes packed rows of out and lse that no sequence has."""
    return _tail("cu_seq_q", "out", params, machine, new, "lse", -torch.inf)


def tails_of_gradients(params: SDPAParams, machine: Machine, new: dict[str, New]) -> list[Launch]:
    """Return the launches that write packed rows of gradients, and of delta, that no sequence has; none if dense."""
    if not params.is_varlen:
        return []
    launches = [_tail("cu_seq_q", "grad_query", params, machine, new, "delta")]
    if not _has_gaps(params):
        launches += [_tail("cu_seq_k", name, params, machine, new) for name in ("grad_key", "grad_value")]
    return launches


def _tail(
    cumulative: str,
    name: str,
    params: SDPAParams,
    machine: Machine,
    new: dict[str, New],
    of_rows: str | None = None,
    value: float = 0.0,
) -> Launch:
    rows, heads, size = new[name].shape
    row_step, head_step, _ = new[name].stride
    aligned = 16 // new[name].dtype.itemsize
    align = aligned if row_step % aligned == head_step % aligned == 0 else 1
    shares = max(1, min(cdiv(2 * machine.processors, heads), cdiv(rows, TAIL)))
    arguments = (
        *(cumulative, name, of_rows, params.cu_seq_q.shape[0] - 1, rows, heads),
        *(head_step // align, row_step // align, shares),
    )
    compiled_in = dict(OF_ROWS=value, ALIGN=align, SIZE=size, BLOCK_D=block_of(size), BLOCK=TAIL, num_warps=4, **FUSED)
    return Launch(clear_kernel, shares * heads, arguments, compiled_in)


def _not_dense(params: SDPAParams) -> tuple[str, ...]:
    named = {name: getattr(params, name) for name in ("query", "key", "value")}
    return tuple(name for name, tensor in named.items() if not is_dense(tensor.shape, tensor.stride(), row_dim(params)))


def _compiled_in(tiles: config.Tiles) -> dict[str, Any]:
    return dict(
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **FUSED,
    )
