"""What tests of selection and control share: a small call, what runs it, a correct kernel, and modules that attend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnplug
from attnplug import ImplSpec, SDPAParams, SDPBackend

Q = torch.randn(1, 2, 4, 8)
MATH, FLASH, DEFAULT = "aten_math", "aten_flash", "torch"


def ran(**arguments: Any) -> str:
    """Return which implementation a call runs now."""
    with attnplug.record() as calls:
        attnplug.scaled_dot_product_attention(Q, Q, Q, **arguments)
    return calls[-1].impl


def ran_in(function: Callable[[], Any]) -> list[str]:
    """Return which implementations the calls in `function` run."""
    with attnplug.record() as calls:
        function()
    return [call.impl for call in calls]


def formula(params: SDPAParams) -> tuple[Tensor, None]:
    return torch.softmax(params.scale * params.query @ params.key.mT, -1) @ params.value, None


def register(name: str, **fields: Any) -> None:
    """Register an implementation that the end of the test removes."""
    spec = {"kernel": formula, "backend": SDPBackend.EFFICIENT_ATTENTION} | fields
    attnplug.register_impl(ImplSpec(name=name, **spec))


class Model(nn.Module):
    """Self-attention that knows nothing of attnplug."""

    def forward(self, query: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, query, query)


class Attention(nn.Module):
    """A module that does something before it attends."""

    def __init__(self, before: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        self.before = before

    def forward(self, hidden: Tensor) -> Any:
        self.before()
        return attnplug.scaled_dot_product_attention(hidden, hidden, hidden)
