"""Backward on Hopper: which calls its kernels take, and the plan of what they launch.

Head sizes to 128 run fused: gradients of the query are added up in float32, in no fixed order. Larger ones, and every
call while PyTorch asks for deterministic algorithms, have a kernel of their own for the gradient of the query, and
equal bits on repeated runs; with 256 columns that is also faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import e, log2
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnplug import CausalVariant, SDPAParams
from attnplug_flash_triton import launches
from attnplug_flash_triton.hopper import backward as kernels
from attnplug_flash_triton.hopper.descriptors import of_numbers, of_rows, rows_between_sequences, why_not
from attnplug_flash_triton.plans import Launch, New, Plan
from attnplug_flash_triton.problem import LONGEST, Machine, block_of, cdiv

L2_BYTES = 32 * 2**20
"""What programs at work at the same time should fit."""
OPTIONS = {"num_warps": 4, "maxnreg": 168, **launches.FUSED}
"""The registers of three warpgroups with 168 each are shared out again: 240 for those that multiply, 24 to load."""


class Tiles(NamedTuple):
    """The tiles of one class of head sizes.

    Attributes:
        queries: of one tile, for a program that has keys.
        keys: that such a program has.
        keys_of_query: of one tile, for a program that has queries.
        stages: tiles of queries held at once.
    """

    queries: int
    keys: int
    keys_of_query: int
    stages: int = 2


TILES = {64: Tiles(128, 128, 64), 128: Tiles(64, 128, 64), 256: Tiles(64, 64, 32)}


def reasons(params: SDPAParams, grad_out: Tensor | None = None) -> list[str]:
    """Return why these kernels do not run backward of a call; none if they do.

    `grad_out`, once it is there, is made contiguous where it must be; what is contiguous already is not moved.
    """
    query, key, value = params.query, params.key, params.value
    found = []
    if grad_out is not None and grad_out.is_contiguous() and (reason := why_not("grad_out", grad_out)):
        found.append(reason)
    if query.dtype not in (torch.float16, torch.bfloat16):
        found.append(f"dtype {query.dtype} is neither float16 nor bfloat16")
    for name in ("attn_mask", "alibi_slopes", "block_table"):
        if getattr(params, name) is not None:
            found.append(f"has no {name}")
    if params.dropout > 0:
        found.append("has no dropout")
    found += filter(None, (why_not(name, getattr(params, name)) for name in ("query", "key", "value")))
    if params.seqused_k is not None and not params.is_varlen and not found:
        between = {rows_between_sequences(tensor) for tensor in (key, value)}
        if len(between) > 1 or None in between:
            found.append("seqused_k: key and value must have the same whole number of rows between their sequences")
    return found


@dataclass(frozen=True)
class _Call:
    """A call, in the kernels' words: what all launches share."""

    params: SDPAParams
    size: int
    tiles: Tiles

    @property
    def packed(self) -> bool:
        return self.params.is_varlen

    @property
    def ragged_keys(self) -> bool:
        return self.packed or self.params.seqused_k is not None

    @property
    def batch(self) -> int:
        return self.params.cu_seq_q.shape[0] - 1 if self.packed else self.params.query.shape[0]

    @property
    def heads(self) -> int:
        return int(self.params.query.shape[1])

    @property
    def group(self) -> int:
        return self.heads // int(self.params.key.shape[1])

    @property
    def num_q(self) -> int:
        return int(self.params.query.shape[0 if self.packed else 2])

    @property
    def longest_q(self) -> int:
        return int(self.params.max_q) if self.packed else self.num_q

    @property
    def longest_k(self) -> int:
        return int(self.params.max_k) if self.packed else int(self.params.key.shape[2])

    @property
    def q_tiles(self) -> int:
        """Tiles of queries of one head; each sequence of a packed call may begin and end within one."""
        tile = self.tiles.queries
        return self.num_q // tile + self.batch if self.packed else cdiv(self.num_q, tile)

    @property
    def row_count(self) -> int:
        """Rows of all tiles of queries."""
        return (1 if self.packed else self.batch) * self.heads * self.q_tiles * self.tiles.queries

    @property
    def window(self) -> tuple[int, int]:
        left, right = self.params.window_size
        return left, 0 if self.params.is_causal else right

    @property
    def lengths(self) -> tuple[str | None, ...]:
        names = ("cu_seq_q", "cu_seq_k", "seqused_k")
        return tuple(name if getattr(self.params, name) is not None else None for name in names)

    def numbers(self, tiles: int, columns: int, section: int) -> tuple[int, ...]:
        left, right = (min(max(side, 0), 2 * LONGEST) for side in self.window)
        dense = self.params.seqused_k is not None and not self.packed
        k_rows = rows_between_sequences(self.params.key) if dense else 0
        assert k_rows is not None
        numbers = (self.heads, self.group, self.num_q, self.longest_k, k_rows, left, right)
        return (*numbers, self.q_tiles, tiles, columns, section)

    @property
    def scales(self) -> tuple[float, float, float]:
        """Return what logits (with softcap: its tanh), products within the tanh, and gradients are multiplied by."""
        scale, softcap = float(self.params.scale), float(self.params.softcap)
        if softcap > 0:
            return softcap * log2(e), 2 * log2(e) * scale / softcap, scale
        return scale * log2(e), 0.0, scale

    def flags(self, keys: int) -> dict[str, Any]:
        """Return the compile-time arguments of kernels that have tiles of so many keys."""
        has_low, has_high = (side >= 0 for side in self.window)
        sides = has_low or has_high
        aligned = self.params.causal_variant == CausalVariant.UPPER_LEFT
        aligned = aligned or (not self.ragged_keys and self.num_q == self.longest_k)
        return dict(
            EVEN=not (sides or self.ragged_keys) and self.longest_k % keys == 0,
            LOWER_RIGHT=sides and not aligned,
            HAS_LOW=has_low,
            HAS_HIGH=has_high,
            SOFTCAP=self.params.softcap > 0,
        )

    def rows(self, name: str, tensor: Any, rows: int, ragged: bool) -> Any:
        return of_rows(name, tensor, rows, self.size, packed=self.packed, ragged=ragged)


def backward(
    params: SDPAParams,
    machine: Machine,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> Plan:
    """Return the plan of backward: it gives the gradients of query, key and value, and delta (see `launches`)."""
    largest = max(params.query.shape[-1], params.value.shape[-1])
    size = next(limit for limit in TILES if largest <= limit)
    call = _Call(params, size, TILES[size])
    fused = size <= 128 and not torch.are_deterministic_algorithms_enabled()
    new = launches.gradients_of(params)
    results = (*new, "delta")
    new["delta"] = New.contiguous(lse.shape, torch.float32)
    new["rows"] = New.contiguous((2, call.row_count), torch.float32)
    compact = tuple(name for name, tensor in (("grad_out", grad_out),) if why_not(name, tensor))
    compact += tuple(
        name
        for name, tensor in (("out", out), ("grad_lse", grad_lse), ("lse", lse))
        if tensor is not None and not tensor.is_contiguous()
    )
    of_out = New.contiguous(grad_out.shape, grad_out.dtype)
    if not compact or compact[0] != "grad_out":
        of_out = of_out._replace(stride=tuple(grad_out.stride()))

    wanted = [_of_rows(call, out, of_out, grad_lse)]
    if fused:
        new["sums"] = New.contiguous((call.row_count * size // 256, 256), torch.float32, 0.0)
    wanted += _of_keys(call, of_out, new, fused, machine)
    wanted.append(_gathering(call, new["grad_query"]) if fused else _of_query(call, of_out, new["grad_query"]))
    wanted += launches.tails_of_gradients(params, machine, new)
    return Plan(tuple(wanted), new, results, compact)


def _of_rows(call: _Call, out: Tensor, of_out: New, grad_lse: Tensor | None) -> Launch:
    block = 128
    blocks = cdiv(call.longest_q, block)
    arguments = (
        *("out", "grad_out", "lse", None if grad_lse is None else "grad_lse", "rows", "delta", call.lengths[0]),
        *(blocks, call.heads, call.num_q, call.q_tiles, call.row_count),
        *_steps(New.contiguous(out.shape, out.dtype), call.packed),
        *_steps(of_out, call.packed),
    )
    compiled_in = dict(**_columns(out.shape[-1]), M=call.tiles.queries, BLOCK=block, num_warps=8, **launches.FUSED)
    return Launch(kernels.rows_kernel, blocks * call.batch * call.heads, arguments, compiled_in)


def _of_keys(call: _Call, of_out: New, new: dict[str, New], fused: bool, machine: Machine) -> list[Launch]:
    """Return the launches that write the gradients of key and value.

    Where programs are few, each query head gets its own; the sum over a group is taken afterwards.
    """
    params, tiles, size = call.params, call.tiles, call.size
    count = cdiv(call.longest_k, tiles.keys)
    apart = call.group > 1 and count * call.batch * call.heads // call.group < machine.processors
    taken = 1 if apart else call.group
    written = {name: f"{name}_parts" if apart else name for name in ("grad_key", "grad_value")}
    for name, part in written.items():
        if apart:
            of = list(new[name].shape)
            of[1] = call.heads
            new[part] = New.contiguous(of, new[name].dtype, new[name].fill)
    columns = call.batch * call.heads // taken
    row = taken * call.longest_q * size * (2 * new["grad_query"].dtype.itemsize + (4 if fused else 0))
    section = max(1, min(columns, L2_BYTES // max(row, 1)))
    descriptors = (
        call.rows("query", params.query, tiles.queries, call.packed),
        call.rows("grad_out", of_out, tiles.queries, call.packed),
        *(call.rows(name, getattr(params, name), 64, call.ragged_keys) for name in ("key", "value")),
        *(call.rows(part, new[part], 64, call.packed) for part in written.values()),
        of_numbers("rows", new["rows"].shape, (1, tiles.queries)),
    )
    numbers = (*call.lengths, *call.numbers(count, columns, section), taken, *call.scales)
    flags = call.flags(tiles.keys) | {"REGISTERS": 240, **OPTIONS}
    if size == 256:
        kernel, compiled_in = kernels.key_gradients_wide_kernel, dict(SIZE=size, STAGES=tiles.stages, **flags)
    else:
        kernel = kernels.key_gradients_kernel
        sums = of_numbers("sums", new["sums"].shape, (tiles.queries * size // 512, 256)) if fused else descriptors[-1]
        descriptors = (*descriptors, sums)
        compiled_in = dict(SIZE=size, M=tiles.queries, STAGES=tiles.stages, FUSED=fused, **flags)
    launched = [Launch(kernel, count * columns, (*descriptors, *numbers), compiled_in)]
    if apart:
        launched += [_adding(call, part, new[part], name, new[name]) for name, part in written.items()]
    return launched


def _adding(call: _Call, part: str, of_part: New, name: str, of_sum: New) -> Launch:
    """Return the launch that adds up the gradients of the query heads of each group."""
    packed, block = call.packed, 64
    num_k, heads, batch = (of_sum.shape[0], of_sum.shape[1], 1) if packed else (*of_sum.shape[2:0:-1], call.batch)
    blocks = cdiv(num_k, block)
    arguments = (part, name, blocks, heads, num_k, call.group, *_steps(of_part, packed), *_steps(of_sum, packed))
    compiled_in = dict(**_columns(of_sum.shape[-1]), BLOCK=block, num_warps=4, **launches.FUSED)
    return Launch(kernels.add_heads_kernel, blocks * heads * batch, arguments, compiled_in)


def _of_query(call: _Call, of_out: New, of_query: New) -> Launch:
    params, n = call.params, call.tiles.keys_of_query
    count, columns = cdiv(call.longest_q, 128), call.batch * call.heads
    section = max(1, min(columns, L2_BYTES // max(2 * call.longest_k * call.size * 2, 1)))
    arguments = (
        call.rows("query", params.query, 64, call.packed),
        call.rows("grad_out", of_out, 64, call.packed),
        *(call.rows(name, getattr(params, name), n, call.ragged_keys) for name in ("key", "value")),
        call.rows("grad_query", of_query, 64, call.packed),
        *("rows", *call.lengths, *call.numbers(count, columns, section), call.row_count, *call.scales),
    )
    compiled_in = dict(SIZE=call.size, M=call.tiles.queries, N=n, K_STAGES=3, V_STAGES=2, **call.flags(n))
    return Launch(
        kernels.query_gradient_kernel, count * columns, arguments, compiled_in | {"REGISTERS": 240, **OPTIONS}
    )


def _gathering(call: _Call, of_query: New) -> Launch:
    """Return the launch that brings the sums of the query's gradient to their places."""
    halves = 2 * cdiv(call.longest_q, call.tiles.queries)
    arguments = (
        *("sums", "grad_query", call.lengths[0], halves, call.heads, call.num_q, call.q_tiles),
        *(*_steps(of_query, call.packed), call.scales[2]),
    )
    compiled_in = dict(SIZE=of_query.shape[-1], BLOCK_D=call.size, M=call.tiles.queries, num_warps=4, **launches.FUSED)
    return Launch(kernels.gather_kernel, halves * call.batch * call.heads, arguments, compiled_in)


def _steps(tensor: New, packed: bool) -> tuple[int, int, int]:
    """Return the strides of batch, head and row."""
    stride = tensor.stride
    return (0, stride[1], stride[0]) if packed else (stride[0], stride[1], stride[2])


def _columns(size: int) -> dict[str, int]:
    return dict(SIZE=size, BLOCK_D=block_of(size))
