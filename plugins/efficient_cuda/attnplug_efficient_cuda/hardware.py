"""What the kernels' `supports` ask of the machine, in one place so that a card can be described that is not there."""

from __future__ import annotations

import warnings
from typing import Any

import torch

LAST_KNOWN = (12, 1)
"""The last compute capability for which PyTorch's CUTLASS and cuDNN kernels are dispatched."""


def compute_capability(device: Any) -> tuple[int, int] | None:
    """Return the compute capability of `device`, or None where there is no such card to ask."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def too_new(device: Any) -> str:
    """Return a reason if the card is later than any that the kernels are known to be built for."""
    found = compute_capability(device)
    if found is None or found <= LAST_KNOWN:
        return ""
    return f"needs compute capability {LAST_KNOWN[0]}.{LAST_KNOWN[1]} or earlier, found {found[0]}.{found[1]}"


def cudnn_version() -> int | None:
    """Return the version of the loaded cuDNN, such as 91501 for 9.15.1, or None without cuDNN."""
    return torch.backends.cudnn.version()  # type: ignore[no-any-return]


def cudnn_refuses(params: Any) -> str:
    """Return why PyTorch itself would not give this call to cuDNN, or nothing.

    `torch.backends.cuda.can_use_cudnn_attention` knows what it was compiled with, which nothing else
    tells. It also looks at the process-wide switch of `torch.nn.attention.sdpa_kernel`, which is no
    reason here: its first complaint is then the switch, and says nothing of the call.
    """
    if not torch.cuda.is_available() or not torch.backends.cuda.cudnn_sdp_enabled():
        return ""
    tensors = params.query, params.key, params.value, params.attn_mask
    call = torch.backends.cuda.SDPAParams(*tensors, params.dropout, params.is_causal, params.enable_gqa)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if torch.backends.cuda.can_use_cudnn_attention(call, debug=True):
            return ""
    said = [str(item.message).split(" (Triggered internally")[0] for item in told]
    return f"PyTorch {torch.__version__} does not give this call to cuDNN: {' '.join(said) or 'no reason told'}"
