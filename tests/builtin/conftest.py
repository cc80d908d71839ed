"""PyTorch's function, as it is called with tensors of a GPU that is not there."""

from __future__ import annotations

import math
from typing import Any

import pytest
from torch import Tensor

from attnplug.builtin import torch_sdpa


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Let `torch` be called with fake CUDA tensors; what reaches PyTorch's function is collected."""
    given: list[tuple[Any, ...]] = []

    def sdpa(*arguments: Any, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
        given.append((*arguments, 1 / math.sqrt(arguments[0].shape[-1]) if scale is None else scale))
        return arguments[0]

    monkeypatch.setattr(torch_sdpa, "sdpa", sdpa)
    return given
