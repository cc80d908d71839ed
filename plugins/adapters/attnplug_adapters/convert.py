"""What libraries of attention disagree about, each conversion written once.

attnplug hands a kernel `(B, H, S, E)`, natural logarithms, masks that start at either corner, any scale, and
any head size. Each library takes something else, and what is converted wrongly gives wrong numbers, not an
error. These helpers are for adapters of other libraries too.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnplug import CausalVariant, SDPAParams

MINUS_INFINITY = float("-inf")
OPEN = (-1, -1)
READ_BYTES = 16


def together(tensor: Tensor | None) -> Tensor | None:
    """Return numbers that lie side by side in memory. `contiguous()` leaves the stride of a single one as it is."""
    if tensor is None or tensor.stride(-1) == 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def numbers_together(params: SDPAParams) -> SDPAParams:
    """Return a call whose lengths, pages and slopes lie side by side in memory: libraries refuse others."""
    copied: dict[str, Any] = {}
    for name in ("alibi_slopes", "cu_seq_q", "cu_seq_k", "seqused_k", "block_table"):
        tensor = getattr(params, name)
        if (whole := together(tensor)) is not tensor:
            copied[name] = whole
    return replace(params, **copied) if copied else params


def heads_behind(tensor: Tensor) -> Tensor:
    """Return `(B, H, S, E)` as a view `(B, S, H, E)`, or the other way round."""
    return tensor.transpose(1, 2)


def aligned(tensor: Tensor) -> Tensor:
    """Return `tensor`, or a copy if its last dimension, its start or its strides are not of 16 bytes.

    Kernels read 16 bytes at a time, and few look at what they are given.
    """
    every = READ_BYTES // tensor.dtype.itemsize
    *strides, last = tensor.stride()
    fits = last == 1 and tensor.storage_offset() % every == 0
    if fits and all(stride % every == 0 for stride, size in zip(strides, tensor.shape, strict=False) if size > 1):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def padded(tensor: Tensor, size: int) -> Tensor:
    """Return `tensor` with zeros appended to its last dimension, up to `size`; zeros change no product."""
    missing = size - tensor.shape[-1]
    return pad(tensor, (0, missing)) if missing else tensor


def first(tensor: Tensor, size: int) -> Tensor:
    """Return `tensor[..., :size]`: what padding added is taken away."""
    return tensor if tensor.shape[-1] == size else tensor.narrow(-1, 0, size)


def rounded_up(size: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is not below `size`."""
    return -(-size // multiple) * multiple


def as_kernel_reads(params: SDPAParams, tensor: Tensor, multiple: int = 8) -> Tensor:
    """Return a tensor of the call with heads behind rows, its head size a multiple, and aligned.

    `(B, H, S, E)` becomes `(B, S, H, E)`; packed tokens `(T, H, E)` and pages have their heads there already.
    """
    tensor = padded(tensor, rounded_up(tensor.shape[-1], multiple))
    return aligned(tensor if params.is_varlen else heads_behind(tensor))


def as_caller_reads(params: SDPAParams, tensor: Tensor, size: int) -> Tensor:
    """Return what `as_kernel_reads` undone gives, with the head size that the caller knows."""
    tensor = first(tensor, size)
    return tensor if params.is_varlen else heads_behind(tensor)


def empty_results(params: SDPAParams) -> tuple[Tensor, Tensor]:
    """Return empty tensors for the `out` and `lse` of a kernel with heads behind and head sizes padded to 8."""
    rows = params.query if params.is_varlen else heads_behind(params.query)
    size = params.value.shape[-1]
    out = rows.new_empty(*rows.shape[:-1], size if params.is_varlen else rounded_up(size, 8))
    return as_caller_reads(params, out, size), rows.new_empty(params.lse_shape, dtype=torch.float32)


def outside_cleared(params: SDPAParams, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return out with 0, and lse with minus infinity, for packed queries of no sequence, which nobody wrote."""
    nowhere = outside(params.cu_seq_q, params.query.shape[0])
    return out.masked_fill(nowhere.view(-1, 1, 1), 0.0), lse.masked_fill(nowhere, MINUS_INFINITY)


def outside(cu_seq: Tensor, tokens: int) -> Tensor:
    """Return which of so many packed tokens are of no sequence."""
    return torch.arange(tokens, device=cu_seq.device) >= cu_seq[-1]


def existing(params: SDPAParams, tensor: Tensor) -> Tensor:
    """Return keys or values with 0 where none exists: past `seqused_k`, and, packed, behind the last sequence.

    For kernels that read the last tile whole, and multiply what is in it by 0: a NaN stays one. A pass over the
    tensor, in every such call, since only the GPU knows lengths. Pages are returned as they are.
    """
    if params.block_table is not None or (params.seqused_k is None and not params.is_varlen):
        return tensor
    if not params.is_varlen:
        positions = torch.arange(tensor.shape[2], device=tensor.device).view(-1, 1)
        return _with_0(positions >= params.seqused_k.view(-1, 1, 1, 1), tensor)
    if params.seqused_k is None:
        nowhere = outside(params.cu_seq_k, tensor.shape[0])
    else:
        sequence, position, nowhere = tokens_of(params.cu_seq_k, tensor.shape[0])
        nowhere = nowhere | (position >= params.seqused_k[sequence])
    return _with_0(nowhere.view(-1, 1, 1), tensor)


def _with_0(places: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor` with 0 in some places. `masked_fill` would pass over it twice: it copies, and then fills."""
    return torch.where(places, 0.0, tensor)


def notes_of_existing(params: SDPAParams, tile: int) -> list[str]:
    """Return what `existing` and `pages_in_pieces` do to a call, for `explain`."""
    if params.block_table is not None:
        size = params.key.shape[1]
        return [] if size < tile else [f"reads pages of {size} keys key by key, so that none past the last is felt"]
    if params.seqused_k is None and not params.is_varlen:
        return []
    return ["copies value with 0 where no key is, since the kernel reads whole tiles, and 0 * NaN is NaN"]


def of_sequences(params: SDPAParams, tensor: Tensor) -> Tensor:
    """Return queries, or gradients of them, with 0 where packed ones are of no sequence: `existing` of rows."""
    if not params.is_varlen:
        return tensor
    return _with_0(outside(params.cu_seq_q, tensor.shape[0]).view(-1, 1, 1), tensor)


def pages_in_pieces(params: SDPAParams, tile: int) -> SDPAParams:
    """Return a call with its pages cut into equal ones below `tile`, the least number of keys that a kernel reads.

    Kernels read pages that hold whole tiles as they read other memory: past the last key as well. Smaller ones they
    read key by key. Cut pages are a view, also of a pool that has keys and values in turn, or heads before keys: what
    lies between two pages counts as pages, which no sequence has. Only a pool in which that cannot be is copied.
    """
    if params.block_table is None or params.key.shape[1] < tile:
        return params
    key, value, size = params.key, params.value, params.key.shape[1]
    piece = max(part for part in range(1, tile) if size % part == 0)
    apart, *others = {_pages_apart(key), _pages_apart(value)}
    if others or not apart or apart % piece:
        key, value, apart = key.contiguous(), value.contiguous(), size
    steps = torch.arange(size // piece, device=params.block_table.device, dtype=params.block_table.dtype)
    table = (params.block_table.unsqueeze(-1) * (apart // piece) + steps).flatten(1)
    key, value = (_cut(tensor, piece, apart) for tensor in (key, value))
    return replace(params, key=key, value=value, block_table=table)


def _pages_apart(pool: Tensor) -> int:
    """Return by how many keys pages of `(pages, page_size, H, E)` begin apart; 0 where that is no whole number."""
    pages, size = pool.shape[:2]
    between, row = pool.stride()[:2]
    if pages < 2:
        return size
    return between // row if row and between % row == 0 else 0


def _cut(pool: Tensor, piece: int, apart: int) -> Tensor:
    pages, size, *shape = pool.shape
    _, row, *strides = pool.stride()
    count = (pages - 1) * (apart // piece) + size // piece
    return pool.as_strided((count, piece, *shape), (piece * row, row, *strides))


def natural(lse: Tensor) -> Tensor:
    """Return an lse in natural units, given one to the base of 2."""
    return lse * math.log(2.0)


def blind_as_minus_infinity(lse: Tensor) -> Tensor:
    """Return `lse` with minus infinity, the logarithm of no sum, where a kernel writes plus infinity."""
    return lse.masked_fill(lse == math.inf, MINUS_INFINITY)


def blind_as_infinity(lse: Tensor) -> Tensor:
    """Return `lse` as such a kernel's backward reads it: `exp(logit - inf)` is 0, `exp(logit + inf)` is not."""
    return lse.masked_fill(lse == MINUS_INFINITY, math.inf)


def band(params: SDPAParams) -> tuple[int, int]:
    """Return how many keys to the left and right of the diagonal are seen, `is_causal` included; -1 is open."""
    left, right = params.window_size
    return left, 0 if params.is_causal else right


def is_lower_right(params: SDPAParams) -> bool:
    """Whether the diagonal ends at the last key; variable length always does."""
    return params.is_varlen or params.causal_variant == CausalVariant.LOWER_RIGHT


def blind_rows(params: SDPAParams) -> Tensor | None:
    """Return which queries see no key, for lengths and band alone; None where there can be none.

    `(Sq,)`, or `(B, 1, Sq)` with `seqused_k`, or `(Tq,)` for variable length, in which queries of no sequence
    count too.
    """
    left, right = band(params)
    device = params.query.device
    if params.is_varlen:
        sequence, position, outside = tokens_of(params.cu_seq_q, params.query.shape[0])
        used = used_keys(params)[sequence]
        row = position + used - params.cu_seq_q.diff()[sequence]
        return _sees_nothing(row, used, left, right) | outside
    queries, keys = params.query.shape[2], params.key.shape[2]
    if params.seqused_k is not None:
        used = params.seqused_k.view(-1, 1, 1)
        row = torch.arange(queries, device=device) + (used - queries if is_lower_right(params) else 0)
        return _sees_nothing(row, used, left, right)
    offset = keys - queries if is_lower_right(params) else 0
    if (right < 0 or offset + right >= 0) and (left < 0 or queries - 1 + offset - left < keys):
        return None
    return _sees_nothing(torch.arange(queries, device=device) + offset, keys, left, right)


def _sees_nothing(row: Tensor, keys: Tensor | int, left: int, right: int) -> Tensor:
    nothing = row * 0 + keys <= 0
    if right >= 0:
        nothing = nothing | (row + right < 0)
    if left >= 0:
        nothing = nothing | (row - left >= keys)
    return nothing


def hidden(params: SDPAParams) -> Tensor | None:
    """Return `(Sq, Sk)`, which keys the band of a dense call hides; None if it hides none."""
    left, right = band(params)
    if (left, right) == OPEN:
        return None
    queries, keys = params.query.shape[2], params.key.shape[2]
    offset = keys - queries if is_lower_right(params) else 0
    row = torch.arange(queries, device=params.query.device).view(-1, 1) + offset
    column = torch.arange(keys, device=params.query.device)
    outside = torch.zeros(queries, keys, dtype=torch.bool, device=params.query.device)
    if left >= 0:
        outside |= column < row - left
    if right >= 0:
        outside |= column > row + right
    return outside


def cleared(params: SDPAParams, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return out with 0, and lse with minus infinity, for queries that see no key, whatever was there."""
    blind = blind_rows(params)
    if blind is None:
        return out, lse
    rows = blind.view(-1, 1, 1) if params.is_varlen else blind.unsqueeze(-1)
    return out.masked_fill(rows, 0.0), lse.masked_fill(blind, MINUS_INFINITY)


def with_sinks(params: SDPAParams, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return out, in its own memory, and lse as if the kernel, which has no sinks, had had those of the call.

    A sink is one more summand of the softmax's denominator, so it scales each row of out, by `exp(lse) / (exp(lse) +
    exp(sink))`. A backward that is given these, as flash kernels' are, has the right probabilities as it is.
    """
    if params.sinks is None:
        return out, lse
    whole = torch.logaddexp(lse, params.sinks.float().view(-1, 1))
    share = torch.exp(lse - whole).masked_fill(lse == MINUS_INFINITY, 0.0)
    if params.is_varlen:
        whole = whole.masked_fill(outside(params.cu_seq_q, params.query.shape[0]), MINUS_INFINITY)
        share = share.T
    return out.mul_(share.unsqueeze(-1)), whole


def gradients_of_sinks(params: SDPAParams, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor | None, ...]:
    """Return what follows the gradients of query, key and value where sinks have one: `-sum exp(sink - lse) dO . O`."""
    if params.sinks is None or not params.sinks.requires_grad:
        return ()
    delta = (grad_out.float() * out.float()).sum(-1)
    delta = delta.T if params.is_varlen else delta
    share = torch.exp(params.sinks.detach().float().view(-1, 1) - lse).masked_fill(lse == MINUS_INFINITY, 0.0)
    grad = -(share * delta).sum(-1)
    return None, (grad if params.is_varlen else grad.sum(0)).to(params.sinks.dtype)


def tokens_of(cu_seq: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each of so many packed tokens its sequence, its position in it, and whether it is in none."""
    token = torch.arange(tokens, device=cu_seq.device, dtype=cu_seq.dtype)
    sequence = torch.searchsorted(cu_seq[1:].contiguous(), token, right=True)
    outside = sequence >= cu_seq.shape[0] - 1
    sequence = sequence.clamp(max=max(0, cu_seq.shape[0] - 2))
    return sequence, token - cu_seq[sequence], outside


def used_keys(params: SDPAParams) -> Tensor:
    """Return `(B,)` int32, how many keys each packed sequence has."""
    found: Tensor = params.cu_seq_k.diff() if params.seqused_k is None else params.seqused_k
    return found.int()


def as_tokens(params: SDPAParams) -> SDPAParams:
    """Return a dense call as one of variable length: the way to `seqused_k` in kernels that have it there alone."""
    batch, _, queries, _ = params.query.shape
    keys = params.key.shape[2]
    query, key, value = (
        heads_behind(tensor).reshape(-1, tensor.shape[1], tensor.shape[3])
        for tensor in (params.query, params.key, params.value)
    )
    steps = torch.arange(batch + 1, device=params.query.device, dtype=torch.int32)
    return replace(
        params,
        query=query,
        key=key,
        value=value,
        cu_seq_q=steps * queries,
        cu_seq_k=steps * keys,
        max_q=queries,
        max_k=keys,
        causal_variant=CausalVariant.LOWER_RIGHT,
    )


def from_tokens(tensor: Tensor, batch: int) -> Tensor:
    """Return `(B * S, H, E)` as `(B, H, S, E)`."""
    return heads_behind(tensor.reshape(batch, -1, *tensor.shape[1:]))


def lse_from_tokens(lse: Tensor, batch: int) -> Tensor:
    """Return `(H, B * S)` as `(B, H, S)`."""
    return lse.reshape(lse.shape[0], batch, -1).transpose(0, 1).contiguous()


def spread_heads(tensor: Tensor, heads: int, dim: int = 2) -> Tensor:
    """Return keys or values with each head repeated for its group, for kernels without grouped queries."""
    group = heads // tensor.shape[dim]
    return tensor if group == 1 else tensor.repeat_interleave(group, dim)


def sum_heads(grad: Tensor, kv_heads: int) -> Tensor:
    """Return the gradient, by tokens, of what `spread_heads` repeated."""
    return grad if grad.shape[2] == kv_heads else grad.unflatten(2, (kv_heads, -1)).sum(3)
