"""The checks of `varlen_attn`; those that read values do so only where that costs no synchronisation."""

from __future__ import annotations

from operator import index, sub
from typing import Any

import torch
from torch import Tensor

from attnplug._call.validate import (
    can_look,
    check_extras,
    check_head_sizes,
    check_heads,
    check_int32,
    check_range,
    check_scalars,
    check_tensors,
    shape,
)
from attnplug._types import SDPAParams


def check_varlen(params: SDPAParams) -> None:
    """Raise TypeError or ValueError unless `params` is a variable-length call with a meaning."""
    check_tensors(params)
    check_scalars(params)
    query, key, value = params.query, params.key, params.value
    _rank("query", query, 3, "(tokens, heads, head size)")
    if params.block_table is not None:
        check_int32("block_table", params.block_table, (None, None), query.device)
    paged = params.block_table is not None
    rank, meaning = (4, "(pages, page size, heads, head size)") if paged else (3, "(tokens, heads, head size)")
    _rank("key", key, rank, meaning)
    _rank("value", value, rank, meaning)
    check_head_sizes(query, key)
    if key.shape[:-2] != value.shape[:-2]:
        raise ValueError(f"value: {meaning} must agree with the key; got key {shape(key)}, value {shape(value)}")
    check_heads(query.shape[1], key.shape[-2], value.shape[-2], params.enable_gqa, broadcast=False)
    check_lengths(params)
    check_extras(params, query.shape[1], params.cu_seq_q.shape[0] - 1, None)


def check_lengths(params: SDPAParams) -> int:
    """Return the number of sequences; raise unless what says where they lie fits the tensors, of checked shapes."""
    query, device = params.query, params.query.device
    for name in ("max_q", "max_k"):
        size = getattr(params, name)
        if type(size) is int and 0 <= size < 2**31:
            continue
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
            raise TypeError(f"{name}: expected an int, the longest sequence, got {size!r}")
        if size < 0:
            raise ValueError(f"{name}: expected 0 or more, got {index(size)}")
        if size >= 2**31:
            raise ValueError(f"{name}: expected less than 2**31, as lengths are int32, got {index(size)}")
    check_int32("cu_seq_q", params.cu_seq_q, (None,), device)
    batch = params.cu_seq_q.shape[0] - 1
    if batch < 0:
        raise ValueError("cu_seq_q: expected length batch + 1, at least 1, got an empty tensor")
    _cumulative("cu_seq_q", params.cu_seq_q, query.shape[0], "max_q", params.max_q)
    if params.seqused_k is not None:
        check_int32("seqused_k", params.seqused_k, (batch,), device)
    _check_keys(params, batch)
    return batch


def _check_keys(params: SDPAParams, batch: int) -> None:
    device, paged = params.query.device, params.block_table is not None
    if params.cu_seq_k is None:
        if not paged or params.seqused_k is None:
            raise TypeError("cu_seq_k: expected an int32 tensor; None needs both block_table and seqused_k")
    elif paged or not _are_keys_packed_as_queries(params):
        check_int32("cu_seq_k", params.cu_seq_k, (batch + 1,), device)
        _cumulative("cu_seq_k", params.cu_seq_k, None if paged else params.key.shape[0], "max_k", params.max_k)
    if paged:
        check_int32("block_table", params.block_table, (batch, None), device)
    if params.seqused_k is None and not paged:
        return
    if not can_look(params.cu_seq_k if params.seqused_k is None else params.seqused_k):
        return
    lengths = params.cu_seq_k.diff() if params.seqused_k is None else params.seqused_k
    if params.seqused_k is not None:
        check_range("seqused_k", lengths, int(params.max_k or 0))
        if params.cu_seq_k is not None and not paged and bool((lengths > params.cu_seq_k.diff()).any()):
            raise ValueError("seqused_k: exceeds the length that cu_seq_k gives a sequence")
    if paged:
        _check_pages(params, lengths)


def _are_keys_packed_as_queries(params: SDPAParams) -> bool:
    """Whether what was checked of the queries holds for the keys too, as in self-attention."""
    same = params.cu_seq_k is params.cu_seq_q and params.max_k == params.max_q
    return same and params.key.shape[0] == params.query.shape[0]


def _check_pages(params: SDPAParams, lengths: Tensor) -> None:
    pages, page_size = params.key.shape[:2]
    if page_size == 0:
        raise ValueError(f"key: the page size is 0; got {shape(params.key)}")
    blocks = params.block_table.shape[1]
    longest = int(lengths.max()) if lengths.numel() else 0
    if longest > blocks * page_size:
        raise ValueError(f"block_table: {blocks} pages of {page_size} keys cannot hold a sequence of {longest} keys")
    used = torch.arange(blocks, device=lengths.device) * page_size < lengths[:, None]
    check_range("block_table", params.block_table[used], pages - 1)


def _rank(name: str, tensor: Tensor, rank: int, meaning: str) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimensions {meaning}, got {shape(tensor)}")


def _cumulative(name: str, cumulative: Tensor, total: int | None, limit: str, longest: Any) -> None:
    if not can_look(cumulative):
        return
    values = cumulative.tolist()
    lengths = [*map(sub, values[1:], values)] or [0]
    if values[0] != 0 or min(lengths) < 0:
        raise ValueError(f"{name}: expected values that start at 0 and never decrease, got {values}")
    if total is not None and values[-1] > total:
        raise ValueError(f"{name}: ends at {values[-1]}, beyond the {total} tokens that there are")
    if max(lengths) > longest:
        raise ValueError(f"{limit}: is {longest}, but {name} has a sequence of {max(lengths)}")
