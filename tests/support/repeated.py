"""Calls that repeat one before, or differ from it: what they give, held against what they give alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import attnplug
from attnplug import Capabilities, Feature, ImplSpec, SDPAParams

torch.manual_seed(0)
Q, K, V = torch.randn(3, 2, 4, 6, 8)

TOKENS, PAGES = torch.randn(9, 4, 8), torch.randn(6, 2, 4, 8)


def row(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


STARTS = row(0, 4, 9)
"""Two packed sequences, of four and five tokens."""

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


EVERYTHING = Capabilities(
    devices=frozenset({"cpu", "meta"}),
    dtypes=frozenset({"float16", "bfloat16", "float32", "float64"}),
    features=frozenset(Feature) - {Feature.NESTED},
)
Answer = Callable[[SDPAParams], Any]


BESIDES = "cu_seq_q", "cu_seq_k", "sinks", "alibi_slopes", "seqused_k", "block_table"
"""What there is besides query, key and value in calls of packed sequences, in order."""


def answer(params: SDPAParams) -> Any:
    """Return what a call gives, asked of another implementation; an lse only where it is wanted."""
    if params.query.is_meta:
        lse = params.query.new_empty(params.lse_shape, dtype=params.lse_dtype)
        return torch.empty_like(params.query), lse if params.return_lse else None
    names = ("query", "key", "value", *BESIDES, "max_q", "max_k")
    options = ("is_causal", "scale", "window_size", "softcap", "return_lse")
    given = {name: getattr(params, name) for name in (*names, *options)}
    found = attnplug.varlen_attn(**given, dropout_p=params.dropout, impl="math_ref", enable_gqa=True)
    return found if params.return_lse else (found, None)


def layouts(*tensors: Tensor | None) -> list[Any]:
    """Return all that calls of what was prepared have in common: the tensors' numbers are their own."""
    return [
        None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)
        for tensor in tensors
    ]


class Packs:
    """Counts how often forward runs, and what it prepared; `answer` is what that returns. The same of backward.

    What it prepared runs for tensors like those that it was prepared for alone.
    """

    def __init__(self, answer: Answer = answer) -> None:
        self.forwards = self.asked = self.runs = 0
        self.backwards = self.asked_for_backward = self.runs_of_backward = 0
        self.answer = answer

    def forward(self, params: SDPAParams) -> Any:
        self.forwards += 1
        return answer(params)

    def backward(self, params: SDPAParams, grad_out: Tensor, *others: Any) -> Any:
        self.backwards += 1
        return gradients(params, grad_out)

    def prepare_packed(self, params: SDPAParams) -> Any:
        self.asked += 1
        with_tensors, expected = repeating(params)

        def run(*tensors: Tensor | None) -> Any:
            self.runs += 1
            assert layouts(*tensors) == expected
            return self.answer(with_tensors(*tensors))

        return run

    def prepare_backward(self, params: SDPAParams, grad_out: Tensor, out: Tensor, lse: Tensor | None) -> Any:
        self.asked_for_backward += 1
        with_tensors, expected = repeating(params)
        expected += layouts(grad_out, out, lse)
        names = [name for name in ("query", "key", "value", "sinks") if getattr(params, name) is not None]
        wanted = {name: getattr(params, name).requires_grad for name in names}

        def run(*tensors: Tensor | None) -> Any:
            self.runs_of_backward += 1
            assert [layout and layout[:-1] for layout in layouts(*tensors)] == [each and each[:-1] for each in expected]
            again = with_tensors(*tensors[:9])
            return gradients(
                replace(again, **{name: marked(getattr(again, name), wanted[name]) for name in names}), tensors[9]
            )

        return run


def repeating(params: SDPAParams) -> tuple[Callable[..., SDPAParams], list[Any]]:
    """Return what describes a call of other tensors, and what these must be like."""
    constants = {name: value for name, value in vars(params).items() if not isinstance(value, Tensor)}
    names = "query", "key", "value", *BESIDES
    return (
        lambda *tensors: SDPAParams(**(constants | dict(zip(names, tensors, strict=True)))),
        layouts(*(getattr(params, name) for name in names)),
    )


def marked(tensor: Tensor, want: bool) -> Tensor:
    return tensor.detach().requires_grad_(want)


def gradients(params: SDPAParams, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, no mask, and sinks, where these say that they are wanted."""
    names = [name for name in ("query", "key", "value", "sinks") if getattr(params, name) is not None]
    names = [name for name in names if getattr(params, name).requires_grad]
    with torch.enable_grad():
        leaves = {name: getattr(params, name).detach().requires_grad_() for name in names}
        out = answer(replace(params, **leaves))[0]
        found = dict(zip(names, torch.autograd.grad(out, [*leaves.values()], grad_out), strict=True))
    return found.get("query"), found.get("key"), found.get("value"), None, found.get("sinks")


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
