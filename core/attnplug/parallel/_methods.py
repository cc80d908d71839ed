"""The ways to share a sequence, on calls that have been checked and brought into the form that kernels know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling

from attnplug._api.dense import scaled_dot_product_attention
from attnplug._call.prepare import empty, is_empty
from attnplug._call.validate import check_mask
from attnplug._run.contract import Result
from attnplug._run.seeds import drawn_seed, seeded
from attnplug._types import SDPAParams
from attnplug.parallel._alike import check_alike
from attnplug.parallel._entries import check_impl, run_ring
from attnplug.parallel._exchange import reporting
from attnplug.parallel._heads import Heads
from attnplug.parallel._ranges import parts_of, total

Attend = Callable[[SDPAParams], Result]


def ulysses(params: SDPAParams, group: dist.ProcessGroup, impl: str | None) -> Result:
    """Run a call whose sequence is cut contiguously, by any implementation; `max_k` is the length of all, or None."""
    check_impl(impl)
    heads = Heads(group)
    length = params.max_k
    of_keys = heads.shares(params.key.shape[2], length, "key")
    same = params.query.shape[2] == params.key.shape[2]
    of_queries = of_keys if same else heads.shares(params.query.shape[2], None, "query")
    if params.attn_mask is not None:
        whole = (*params.query.shape[:2], sum(of_queries), sum(of_keys))
        check_mask(params.attn_mask, params.query, whole)
    return _by_heads(params, heads, of_queries, of_keys, lambda whole: _attend(whole, impl))


def usp(params: SDPAParams, mesh: Any, impl: str | None) -> Result:
    """Run a call by a ring along the first dimension of a mesh, with heads shared along the second."""
    ring, heads = mesh.get_group(0), Heads(mesh.get_group(1))
    ranks, rank = dist.get_world_size(ring), dist.get_rank(ring)

    def shares(rows: int, length: int | None, name: str) -> tuple[list[int], int]:
        whole = rows * heads.ranks * ranks if length is None else length
        return heads.shares(rows, total(parts_of(rank, ranks, whole, params.is_causal)), name), whole

    of_keys, length = shares(params.key.shape[2], params.max_k, "key")
    of_queries = of_keys
    if params.query.shape[2] != params.key.shape[2]:
        of_queries, _ = shares(params.query.shape[2], None, "query")
    return _by_heads(
        params, heads, of_queries, of_keys, lambda whole: run_ring(replace(whole, max_k=length), ring, impl)
    )


def _by_heads(params: SDPAParams, heads: Heads, of_queries: list[int], of_keys: list[int], attend: Attend) -> Result:
    """Change the sequence for heads, attend, and change back.

    Raises:
        ValueError: the ranks cannot share the heads.
    """
    if reasons := heads.reasons(params.query.shape[1], params.key.shape[1]):
        raise ValueError(f"query, key: {reasons}")
    if is_empty(params):
        return empty(params)
    if is_compiling():
        return _changed(params, heads, of_queries, of_keys, attend)
    with reporting(heads.group):
        check_alike(heads.group, "heads", params)
        return _changed(params, heads, of_queries, of_keys, attend)


def _changed(params: SDPAParams, heads: Heads, of_queries: list[int], of_keys: list[int], attend: Attend) -> Result:
    tensors = (params.query, params.key, params.value)
    query, key, value = heads.gather(tensors, (of_queries, of_keys, of_keys))
    mask, sinks, slopes = params.attn_mask, params.sinks, params.alibi_slopes
    whole = replace(
        params,
        query=query,
        key=key,
        value=value,
        attn_mask=heads.own(mask, -3) if mask is not None and mask.dim() > 2 else mask,
        sinks=None if sinks is None else heads.own(sinks, 0),
        alibi_slopes=None if slopes is None else heads.own(slopes, -1),
        max_k=None,
    )
    out, lse = _drawing(whole, heads, attend)
    out = heads.scatter(out, of_queries)
    return out, None if lse is None else heads.scatter(lse.unsqueeze(-1), of_queries).squeeze(-1)


def _drawing(params: SDPAParams, heads: Heads, attend: Attend) -> Result:
    """Attend, and with dropout draw other numbers on each rank: its heads are others.

    Raises:
        ValueError: the call has dropout and is compiled.
    """
    if not params.dropout:
        return attend(params)
    if is_compiling():
        raise ValueError("dropout_p: heads that ranks share draw outside of a trace; compile without dropout")
    device = params.query.device
    with seeded(device, drawn_seed(device), heads.rank):
        return attend(params)


def _attend(params: SDPAParams, impl: str | None) -> tuple[Tensor, Tensor | None]:
    """Attend as on one rank."""
    result: Any = scaled_dot_product_attention(
        params.query,
        params.key,
        params.value,
        params.attn_mask,
        params.dropout,
        params.is_causal,
        params.scale,
        params.enable_gqa,
        window_size=params.window_size,
        softcap=params.softcap,
        sinks=params.sinks,
        alibi_slopes=params.alibi_slopes,
        seqused_k=params.seqused_k,
        return_lse=params.return_lse,
        impl=impl,
    )
    return result if params.return_lse else (result, None)
