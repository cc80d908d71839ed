"""A cuDNN that PyTorch was not built for: it raises when it is first asked for the version, and then tells it."""

from __future__ import annotations

import pytest
import torch

COMPLAINT = "cuDNN version incompatibility: PyTorch was compiled against (9, 26, 0) but found (9, 19, 0). "


def install(patch: pytest.MonkeyPatch, version: int = 91900) -> None:
    """Let PyTorch find such a cuDNN."""
    complaints = [COMPLAINT]

    def told() -> int:
        if complaints:
            raise RuntimeError(complaints.pop())
        return version

    patch.setattr(torch.backends.cudnn, "version", told)
