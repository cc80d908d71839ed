"""`sageattention` 2.2.0 on the CPU: its signatures, and what it is documented to do (`sageattention/core.py`).

`HIDES` is False for builds from before 2025-08-04, whose Triton kernels count the keys that a block lacks.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from libraries.formula import INF, NAN, Mask, check_memory, forward

SIZES = (64, 128)
BLOCK = 64
HIDES = True


def sageattn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    **kwargs: Any,
):
    """What it does not know, an attn_mask among it, it ignores in silence."""
    assert q.dtype in (torch.float16, torch.bfloat16), (
        "Input tensors must be in dtype of torch.float16 or torch.bfloat16"
    )
    out, lse = attend(q, k, v, tensor_layout, is_causal, sm_scale, hides=HIDES)
    return (out, lse) if return_lse else out


def sageattn_qk_int8_pv_fp16_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    quantization_backend: str = "triton",
    is_causal: bool = False,
    attn_mask: torch.Tensor | None = None,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    return_lse: bool = False,
    **kwargs: Any,
):
    """What `sageattn` runs on compute capability 8.6; the mask came the day after missing keys were hidden."""
    assert attn_mask is None
    out, lse = attend(q, k, v, tensor_layout, is_causal, sm_scale, smooth_k, HIDES)
    return (out, lse) if return_lse else out


def sageattn_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    **kwargs: Any,
) -> torch.Tensor:
    """The keys' mean is that of all sequences, and of what lies behind them; a causal mask begins at the first key."""
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return attend_packed(q, k, v, *lengths, is_causal, sm_scale, HIDES)


def attend_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal, sm_scale, hides):
    assert cu_seqlens_q.is_contiguous() and cu_seqlens_k.is_contiguous()
    mean = k.mean(0, keepdim=True)
    out = torch.full_like(q, NAN)
    for rows, columns in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        assert rows[1] - rows[0] <= max_seqlen_q and columns[1] - columns[0] <= max_seqlen_k
        if rows[0] == rows[1]:
            continue
        if columns[0] == columns[1]:
            out[slice(*rows)] = 0.0  # its loop over keys ends at once
            continue
        given = ((q, rows), (k - mean, columns), (v, columns))
        parts = (tensor[slice(*at)].transpose(0, 1).unsqueeze(0) for tensor, at in given)
        found, _ = attend(*parts, "HND", is_causal, sm_scale, smooth=False, hides=hides)
        out[slice(*rows)] = found[0].transpose(0, 1)
    return out


def attend(q, k, v, tensor_layout, is_causal, sm_scale, smooth=True, hides=True):
    assert q.dtype == k.dtype == v.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "Last dim of qkv must be contiguous."
    assert q.shape[-1] <= 128, f"Unsupported head_dim: {q.shape[-1]}"
    check_memory(q, k, v)
    if tensor_layout == "NHD":
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    means = k.double().mean(2, keepdim=True) * smooth
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    query, key = to_8_bits(q.double(), 2 * BLOCK), to_8_bits(k.double() - means, BLOCK)
    if not hides and not is_causal:
        key, v = (torch.nn.functional.pad(tensor, (0, 0, 0, -k.shape[2] % BLOCK)) for tensor in (key, v))
    out, lse = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype), torch.empty(q.shape[:-1])
    mask = Mask(scale=scale, causal=is_causal, lower_right=False)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        found, sums = forward(query[b].transpose(0, 1), key[b].transpose(0, 1), v[b].transpose(0, 1), mask, -INF)
        mean = means[b].repeat_interleave(group, 0)
        out[b], lse[b] = found.transpose(0, 1), sums + scale * (q[b].double() * mean).sum(-1)
    return (out if tensor_layout == "HND" else out.transpose(1, 2)), lse


def to_8_bits(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Round to 8 bits with one scale for so many rows."""
    parts = []
    for block in tensor.split(rows, 2):
        step = block.abs().amax((-1, -2), keepdim=True).clamp(min=1e-30) / 127
        parts.append((block / step).round() * step)
    return torch.cat(parts, 2)
