"""What the kernels' `supports` ask of the machine: the GPU, PyTorch's own word on cuDNN, and the latter's version."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

import torch

from attnplug import compute_capability

LAST_KNOWN = (12, 1)
"""The last compute capability for which PyTorch's CUTLASS and cuDNN kernels are dispatched."""


def too_new(device: Any) -> str:
    """Return a reason if the GPU is later than any that the kernels are known to be built for."""
    found = compute_capability(device)
    if found is None or found <= LAST_KNOWN:
        return ""
    return f"needs compute capability {LAST_KNOWN[0]}.{LAST_KNOWN[1]} or earlier, found {found[0]}.{found[1]}"


def cudnn_version() -> int | None:
    """Return the version of cuDNN, or None if PyTorch has no cuDNN.

    If PyTorch considers this version too old for itself, or too new for a GPU, it raises the first time it is asked
    for it. Its attention does not ask.
    """
    with suppress(RuntimeError):
        return torch.backends.cudnn.version()
    return torch.backends.cudnn.version()


def cudnn_refuses(params: Any) -> str:
    """Return why PyTorch itself would not give this dense call to cuDNN, or nothing.

    `torch.backends.cuda.can_use_cudnn_attention` knows what it was compiled with, which nothing else
    tells. It also looks at the process-wide switch of `torch.nn.attention.sdpa_kernel`, which is no
    reason here: its first complaint is then the switch, and says nothing of the call. Of a GPU that is only
    asked about it knows nothing.
    """
    if not can_ask_pytorch(params.query.device):
        return ""
    tensors = params.query, params.key, params.value, params.attn_mask
    call = torch.backends.cuda.SDPAParams(*tensors, params.dropout, params.is_causal, params.enable_gqa)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if torch.backends.cuda.can_use_cudnn_attention(call, debug=True):
            return ""
    said = [str(item.message).split(" (Triggered internally")[0] for item in told]
    return f"PyTorch {torch.__version__} does not give this call to cuDNN: {' '.join(said) or 'no reason told'}"


def can_ask_pytorch(device: torch.device) -> bool:
    """Whether `cudnn_refuses` gets an answer about calls on `device`."""
    return _is_here(device) and torch.backends.cuda.cudnn_sdp_enabled()


def _is_here(device: torch.device) -> bool:
    """Whether the GPU that is asked about is the one that `device` stands for on this machine."""
    if not torch.cuda.is_available():
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        return False
    return torch.cuda.get_device_capability(index) == compute_capability(device)
