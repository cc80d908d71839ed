"""`sageattention` 2.2.0 on the CPU: its signature, and what it is documented to do (`sageattention/core.py`)."""

from __future__ import annotations

from typing import Any

import torch

from libraries.formula import INF, Mask, check_memory, forward

SIZES = (64, 128)


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
    out, lse = attend(q, k, v, tensor_layout, is_causal, sm_scale)
    return (out, lse) if return_lse else out


def attend(q, k, v, tensor_layout, is_causal, sm_scale):
    assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "Last dim of qkv must be contiguous."
    assert q.shape[-1] <= 128, f"Unsupported head_dim: {q.shape[-1]}"
    check_memory(q, k, v)
    if tensor_layout == "NHD":
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    smooth = k.double() - k.double().mean(2, keepdim=True)
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    query, key = to_8_bits(q.double()), to_8_bits(smooth)
    out, lse = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype), torch.empty(q.shape[:-1])
    mask = Mask(scale=scale, causal=is_causal, lower_right=False)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        found, sums = forward(query[b].transpose(0, 1), key[b].transpose(0, 1), v[b].transpose(0, 1), mask, -INF)
        mean = k[b].double().mean(1).repeat_interleave(group, 0)
        out[b], lse[b] = found.transpose(0, 1), sums + scale * (q[b].double() * mean.unsqueeze(1)).sum(-1)
    return (out if tensor_layout == "HND" else out.transpose(1, 2)), lse


def to_8_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Round to 8 bits with one scale for 128 rows."""
    parts = []
    for block in tensor.split(128, 2):
        step = block.abs().amax((-1, -2), keepdim=True).clamp(min=1e-30) / 127
        parts.append((block / step).round() * step)
    return torch.cat(parts, 2)
