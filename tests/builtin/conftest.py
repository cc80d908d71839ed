"""PyTorch's function, as it is called with tensors of a GPU that is not there."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from attnplug.builtin import torch_sdpa


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Let `torch` be called with fake CUDA tensors; what reaches PyTorch's function is collected."""
    given: list[tuple[Any, ...]] = []

    def sdpa(*arguments: Any, scale: float, enable_gqa: bool) -> Tensor:
        given.append((*arguments, scale))
        return arguments[0]

    monkeypatch.setattr(torch_sdpa, "sdpa", sdpa)
    return given
