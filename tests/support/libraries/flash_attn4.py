"""`flash_attn.cute.interface` of flash-attn-4 4.0.0b36 on the CPU: its signatures, and what they are documented to do.

Source: `flash_attn/cute/interface.py`. A window is counted wherever it is not None, -1 too. Whole tiles are read, as by
FlashAttention 3 (`flash_attn/cute/flash_fwd_sm90.py`, `flash_fwd_sm100.py`: `use_tma_KV`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from libraries.flash_attn3 import check_lengths, sequences, write_gradients
from libraries.formula import INF, NAN, Mask, check_memory, forward

WIDE = 2**30


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: torch.Tensor | None = None,
    gather_kv_indices: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: torch.Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable | None = None,
    score_mod_bwd: Callable | None = None,
    mask_mod: Callable | None = None,
    aux_tensors: list | None = None,
    aux_scalars: tuple | None = None,
    block_sparse_tensors: object | None = None,
    block_sparse_tensors_bwd: object | None = None,
    return_lse: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
):
    mask = _mask(softmax_scale, causal, window_size, learnable_sink, softcap)
    out, lse = _forward(q, k, v, mask, None, None, None, None)
    return out, lse if return_lse else None


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    gather_kv_indices: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: torch.Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable | None = None,
    score_mod_bwd: Callable | None = None,
    mask_mod: Callable | None = None,
    block_sparse_tensors: object | None = None,
    aux_tensors: list | None = None,
    aux_scalars: tuple | None = None,
    return_lse: bool = False,
    scheduler_metadata: object | None = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
):
    assert page_table is None or cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k"
    mask = _mask(softmax_scale, causal, window_size, learnable_sink, softcap)
    out, lse = _forward(q, k, v, mask, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table)
    return out, lse if return_lse else None


def _flash_attn_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    m_block_size: int = 64,
    n_block_size: int = 128,
    num_threads: int = 256,
    pack_gqa: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    score_mod: Callable | None = None,
    score_mod_bwd: Callable | None = None,
    mask_mod: Callable | None = None,
    dlse: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
):
    check_memory(q, k, v, out, dout)
    mask = _mask(softmax_scale, causal, (window_size_left, window_size_right), learnable_sink, softcap)
    grads = [torch.full_like(t, NAN) if g is None else g for t, g in zip((q, k, v), (dq, dk, dv), strict=True)]
    write_gradients(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_k, grads, mask, deterministic, dlse)
    if learnable_sink is None:
        return tuple(grads)
    # dsink[h] = -sum_rows exp(sink[h] - lse[row,h]) * dpsum[row,h], dpsum = sum(dout * out) - dlse
    delta = (dout.double() * out.double()).sum(-1)
    delta = delta.T if cu_seqlens_q is not None else delta.transpose(1, 2)
    delta = delta if dlse is None else delta - dlse.double()
    sinks = learnable_sink.double().view(-1, 1)
    gradient = -(torch.exp(sinks - lse.double()) * delta).sum(-1)
    return (*grads, gradient if cu_seqlens_q is not None else gradient.sum(0))


def _mask(scale, causal, window, sinks, softcap) -> Mask:
    left, right = window
    if causal:
        right = 0
    assert left is None or left >= 0 or (right is not None and right < 0), "-1 would be counted as a key"
    assert sinks is None or sinks.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return Mask(
        scale=scale,
        left=-1 if left is None else left,
        right=-1 if right is None else right,
        softcap=softcap,
        sinks=sinks,
    )


def _forward(q, k, v, mask, cu_q, cu_k, used, table):
    check_memory(q, k, v)
    check_lengths(cu_q, cu_k, used, table, mask.sinks)
    out = torch.full((*q.shape[:-1], v.shape[-1]), NAN, dtype=q.dtype)
    varlen = cu_q is not None
    lse = torch.full((q.shape[-2], q.shape[0]) if varlen else (q.shape[0], q.shape[2], q.shape[1]), NAN)
    for b, each in enumerate(sequences(q, k, v, cu_q, cu_k, used, table)):
        rows, query = each.rows, each.query
        if each.key.shape[0] == 0 and mask.sinks is not None:
            found = torch.zeros(*query.shape[:2], v.shape[-1]), mask.sinks.double()[:, None].expand(-1, query.shape[0])
        else:
            found = forward(query, each.key, each.value, mask, -INF)
        if varlen:
            out[rows], lse[:, rows] = found
        else:
            out[b], lse[b] = found
        out[rows if varlen else b] += each.felt(v)
    return out, lse
