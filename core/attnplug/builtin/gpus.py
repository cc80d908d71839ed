"""What PyTorch has for a GPU: FlashAttention-2 with its limits, and cuDNN."""

from __future__ import annotations

import torch
from torch import Tensor

from attnplug import SDPAParams, compute_capability
from attnplug._tracing import constant_in_traces, cudnn_version
from attnplug.builtin.rewrites import holds

HALF = (torch.float16, torch.bfloat16)


@constant_in_traces  # which cannot ask a GPU
def flash_on(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a device where PyTorch's function may use FlashAttention-2; None of others."""
    capability = compute_capability(device)
    enabled = capability is not None and capability >= (8, 0) and torch.backends.cuda.flash_sdp_enabled()
    return capability if enabled else None


@constant_in_traces
def cudnn_on(device: torch.device) -> tuple[tuple[int, int] | None, int]:
    """Return the compute capability of a device and the version of cuDNN, 0 where there is none."""
    return compute_capability(device), cudnn_version() or 0


def lacks_backward(gpu: tuple[int, int], params: SDPAParams) -> bool:
    """Whether FlashAttention-2's backward refuses a call, on GPUs whose multiprocessors have less shared memory."""
    if not ((8, 6) <= gpu <= (8, 9) or gpu[0] == 12) or not params.needs_grad:
        return False
    size = params.query.shape[-1]
    return holds(size > 192) and (holds(size <= 224) or params.dropout > 0)


def counts_too_far(query: Tensor) -> bool:
    """Whether FlashAttention-2 counts beyond 32 bits in the backward of a dense query, with its sizes rounded up."""
    batch, heads, queries, size = query.shape
    return holds(batch * heads * (-(-queries // 128) * 128) * (-(-size // 32) * 32) > 2**31)
