"""Calls that repeat one before, or differ from it: what they give, held against what they give alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import attnplug
from attnplug import ImplSpec, SDPAParams

torch.manual_seed(0)
Q, K, V = torch.randn(3, 2, 4, 6, 8)

Change = Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
"""Makes the arguments of a call."""


class Subclass(Tensor):
    pass


class Opaque:
    """A kernel for which more has to be done than to call it."""

    @staticmethod
    def forward(params: SDPAParams) -> tuple[Tensor, None]:
        logits = params.scale * params.query @ params.key.mT
        if params.is_causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
        if params.attn_mask is not None:
            logits = logits + params.attn_mask
        return torch.softmax(logits, -1) @ params.value, None

    @staticmethod
    def backward(params: SDPAParams, grad_out: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        return grad_out, grad_out, grad_out


def nested(layout: torch.layout = torch.strided) -> Tensor:
    return torch.nested.nested_tensor([Q[0, :2, :3], K[0, :2, :3]], layout=layout)


def outcome(change: Change, impl: str, attend: Any = attnplug.scaled_dot_product_attention) -> Any:
    given, options = change()
    try:
        result = attend(*given, **options, impl=impl)
    except Exception as error:  # what a call raises is its outcome
        return (type(error), str(error)), ()
    out, *lse = result if isinstance(result, tuple) else (result,)
    if out.is_nested:
        out = torch.cat([part.flatten() for part in out.unbind()])
    facts = type(out), out.requires_grad, out.dtype, out.device, tuple(out.shape)
    return facts, tuple(tensor.detach() for tensor in (out, *lse))


def forget() -> None:
    """Make every decision void, as any change of the registry does."""
    attnplug.register_impl(ImplSpec(name="another", kernel="not.imported", backend=None))
    attnplug.unregister_impl("another")


def assert_same(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    for tensor, other in zip(found[1], expected[1], strict=True):
        if tensor.device.type != "meta" and not isinstance(tensor, FakeTensor):
            torch.testing.assert_close(tensor, other, equal_nan=True)
