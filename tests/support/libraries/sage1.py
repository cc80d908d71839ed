"""`sageattention` 1.0.6 on the CPU: its signature, and what it is documented to do (`sageattention/core.py`)."""

from __future__ import annotations

from typing import Any

import torch

from libraries import sage2
from libraries.sage2 import attend


def sageattn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str = "HND",
    is_causal=False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    **kwargs: Any,
) -> torch.Tensor:
    """It subtracts the mean of the keys from the caller's tensor, and ignores return_lse."""
    assert q.size(-1) in [64, 96, 128], "headdim should be in [64, 96, 128]."
    if smooth_k:
        k -= k.mean(dim=1 if tensor_layout == "NHD" else 2, keepdim=True)
    return attend(q, k, v, tensor_layout, is_causal, sm_scale)[0]


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
    """It subtracts the mean of the keys from the caller's tensor, too."""
    assert q.size(-1) in [64, 128], "varlen only support head_dim [64, 128]."
    starts = cu_seqlens_q, cu_seqlens_k
    out = sage2.sageattn_varlen(q, k, v, *starts, max_seqlen_q, max_seqlen_k, is_causal, sm_scale)
    k -= k.mean(dim=0, keepdim=True)
    return out
