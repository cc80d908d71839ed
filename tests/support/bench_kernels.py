"""Kernels for the tests of benchmarks: one that is right, one that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Kernel = Callable[..., Any]


def plain(params: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as its formula has it, without masks; differentiable by PyTorch."""
    logits = params.scale * params.query @ params.key.mT
    return torch.softmax(logits, -1) @ params.value, torch.logsumexp(logits.float(), -1)


def zeros(params: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As fast as it gets, and wrong."""
    out = params.query * 0
    return out, out[..., 0].float()


def kernel(forward: Kernel, backward: Kernel | None = None) -> Any:
    """Return what `ImplSpec.kernel` takes; without a backward it is differentiated by PyTorch."""
    functions = {"forward": staticmethod(forward), "composite": backward is None}
    return type("Kernel", (), functions | ({} if backward is None else {"backward": staticmethod(backward)}))
