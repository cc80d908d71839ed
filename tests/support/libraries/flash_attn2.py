"""`flash_attn.flash_attn_interface` of flash-attn 2.8.3 on the CPU: its signatures, and what they are documented to do.

Sources: `flash_attn/flash_attn_interface.py`, `csrc/flash_attn/flash_api.cpp`, `csrc/flash_attn/src/flash_fwd_kernel.h`
(a row that sees no key has an lse of plus infinity) and `flash_bwd_preprocess_kernel.h`.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from libraries.formula import INF, NAN, Mask, added_up, backward, check_memory, forward, keep, pages

Tensor = torch.Tensor


def _check(q: Tensor, k: Tensor, v: Tensor, softcap: float, dropout_p: float) -> None:
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[-1] <= 256, "FlashAttention forward only supports head dimension at most 256"
    assert q.shape[-2] % k.shape[-2] == 0
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert softcap == 0 or dropout_p == 0, "Softcapping does not support dropout for now"
    check_memory(q, k, v)


def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    return_softmax: bool,
):
    _check(q, k, v, softcap, dropout_p)
    state = torch.randint(2**31, (2,)) if dropout_p > 0 else torch.empty((2,), dtype=torch.int64)
    out, lse = torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1])
    for b in range(q.shape[0]):
        mask = _mask(
            b,
            q[b],
            k[b],
            state,
            dropout_p,
            softmax_scale,
            causal,
            window_size_left,
            window_size_right,
            softcap,
            alibi_slopes,
        )
        out[b], lse[b] = forward(q[b], k[b], v[b], mask, INF)
    return out, lse, torch.empty((0,), dtype=q.dtype), state


def _flash_attn_varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
    block_table: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    zero_tensors: bool = False,
):
    _check(q, k, v, softcap, dropout_p)
    for starts in (cu_seqlens_q, cu_seqlens_k):
        assert starts.dtype == torch.int32 and starts.is_contiguous()
    assert seqused_k is None or seqused_k.is_contiguous()
    assert block_table is None or block_table.stride(-1) == 1, "block_table must have contiguous last dimension"
    assert block_table is None or k.shape[1] % PAGE == 0, "Paged KV cache block size must be divisible by 256"
    state = torch.randint(2**31, (2,)) if dropout_p > 0 else torch.empty((2,), dtype=torch.int64)
    fill = 0.0 if zero_tensors else NAN
    out, lse = torch.full_like(q, fill), torch.full((q.shape[1], q.shape[0]), -INF if zero_tensors else NAN)
    for b, (rows, columns) in enumerate(_sequences(cu_seqlens_q, cu_seqlens_k)):
        used = int(columns.stop - columns.start) if seqused_k is None else int(seqused_k[b])
        if block_table is None:
            key, value = (tensor[columns][:used] for tensor in (k, v))
        else:
            key, value = (pages(tensor, block_table[b], used) for tensor in (k, v))
        mask = _mask(
            b,
            q[rows],
            key,
            state,
            dropout_p,
            softmax_scale,
            causal,
            window_size_left,
            window_size_right,
            softcap,
            alibi_slopes,
        )
        out[rows], lse[:, rows] = forward(q[rows], key, value, mask, INF)
    return out, lse, torch.empty((0,), dtype=q.dtype), state


PAGE = 256


def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(q, k, v, softcap, dropout_p)
    check_memory(dout, out, dq, dk, dv)
    assert dout.dtype == out.dtype == q.dtype and softmax_lse.is_contiguous()
    for b in range(q.shape[0]):
        mask = _mask(
            b,
            q[b],
            k[b],
            rng_state,
            dropout_p,
            softmax_scale,
            causal,
            window_size_left,
            window_size_right,
            softcap,
            alibi_slopes,
        )
        found = backward(dout[b], q[b], k[b], v[b], out[b], softmax_lse[b], mask)
        dq[b], dk[b], dv[b] = added_up(found[0], deterministic), *found[1:]
    return torch.empty(0)


def _flash_attn_varlen_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> torch.Tensor:
    _check(q, k, v, softcap, dropout_p)
    check_memory(dout, out, dq, dk, dv)
    assert cu_seqlens_q.is_contiguous() and cu_seqlens_k.is_contiguous()
    for b, (rows, columns) in enumerate(_sequences(cu_seqlens_q, cu_seqlens_k)):
        mask = _mask(
            b,
            q[rows],
            k[columns],
            rng_state,
            dropout_p,
            softmax_scale,
            causal,
            window_size_left,
            window_size_right,
            softcap,
            alibi_slopes,
        )
        dq[rows], dk[columns], dv[columns] = backward(
            dout[rows], q[rows], k[columns], v[columns], out[rows], softmax_lse[:, rows], mask
        )
    return torch.empty(0)


def _mask(b, q, k, state, dropout_p, scale, causal, left, right, softcap, slopes) -> Mask:
    if slopes is not None:
        assert slopes.dtype == torch.float32 and slopes.stride(-1) == 1
        slopes = slopes if slopes.dim() == 1 else slopes[b]
    shape = (q.shape[1], q.shape[0], k.shape[0])
    return Mask(
        scale=scale,
        causal=causal,
        left=left,
        right=right,
        softcap=softcap,
        slopes=slopes,
        keep=keep(state, b, dropout_p, shape),
    )


def _sequences(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    starts = pairwise(cu_q.tolist()), pairwise(cu_k.tolist())
    return [(slice(*rows), slice(*columns)) for rows, columns in zip(*starts, strict=True)]
