"""`sageattention` 1.0.6 on the CPU: its signatures, and what its kernels do (`sageattention/core.py`).

Without a causal mask they count the keys that the last block lacks, as keys of logit 0 and value 0. On an H100, and
interpreted on a CPU, the wheel's own kernels gave what this gives.
"""

from __future__ import annotations

from typing import Any

import torch

from libraries.sage2 import attend, attend_packed


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
    value = v.half().to(v.dtype)
    return attend(q, k, value, tensor_layout, is_causal, sm_scale, smooth=False, hides=False)[0]


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
    k -= k.mean(dim=0, keepdim=True)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return attend_packed(q, k, v, *lengths, is_causal, sm_scale, hides=False)
