"""A kernel's forward and backward never run under autocast, whoever asks for the gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attnplug
from attnplug import ImplSpec, SDPAParams

seen: list[bool] = []


class Watching:
    """A kernel that remembers whether autocast was on."""

    @staticmethod
    def forward(params: SDPAParams) -> tuple[Tensor, None]:
        seen.append(torch.is_autocast_enabled("cpu"))
        return params.query + 0, None

    @staticmethod
    def backward(params: SDPAParams, grad_out: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(torch.is_autocast_enabled("cpu"))
        return grad_out, torch.zeros_like(params.key), torch.zeros_like(params.value)


@pytest.fixture(autouse=True)
def watching() -> Iterator[None]:
    seen.clear()
    attnplug.register_impl(ImplSpec(name="watching", kernel=Watching, backend=None))
    yield
    attnplug.unregister_impl("watching")


def loss(query: Tensor) -> Tensor:
    return attnplug.scaled_dot_product_attention(query, query, query, impl="watching").sum()


def eager(query: Tensor) -> Tensor:
    return torch.autograd.grad(loss(query.requires_grad_()), query)[0]


def compiled(query: Tensor) -> Tensor:
    return torch.autograd.grad(torch.compile(loss, backend="aot_eager")(query.requires_grad_()), query)[0]


@pytest.mark.parametrize("gradient", [eager, compiled, torch.func.grad(loss)], ids=["eager", "compiled", "torch.func"])
def test_autocast_stays_out_of_a_kernel(gradient: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = gradient(torch.randn(1, 2, 4, 8))
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False, False]
    torch.testing.assert_close(found, torch.ones_like(found))
