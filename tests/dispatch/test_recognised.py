"""A call that is like one before it runs at once: what is not quite like it must be seen all the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import Parameter

import attnplug
from attnplug import CausalVariant, ImplSpec, SDPAParams
from repeated import Change, K, Opaque, Q, Subclass, V, assert_same, forget, nested, outcome

MASK = torch.randn(2, 4, 6, 6)
SQUARE = torch.randn(2, 4, 8, 8)
HIDING = torch.zeros(6, 6).index_fill(0, torch.tensor([2, 5]), float("-inf"))
RECORDED = Q.clone().requires_grad_()


class OwnParameter(Parameter):
    pass


def fake() -> tuple[Tensor, ...]:
    mode = FakeTensorMode()
    return tuple(map(mode.from_tensor, (Q, K, V)))


CHANGES: dict[str, Change] = {
    "nothing": lambda: ((Q, K, V), {}),
    "a mask that is query, key and value": lambda: ((SQUARE, SQUARE, SQUARE), {"attn_mask": SQUARE}),
    "another batch": lambda: ((Q[:1], K[:1], V[:1]), {}),
    "other lengths": lambda: ((Q[:, :, :2], K[:, :, :5], V[:, :, :5]), {}),
    "a batch of keys alone": lambda: ((Q, K[:1], V[:1]), {}),
    "fewer values than keys": lambda: ((Q, K, V[:, :, :5]), {}),
    "more values than keys": lambda: ((Q, K[:, :, :5], V), {}),
    "fewer heads": lambda: ((Q[:, :2], K[:, :2], V[:, :2]), {}),
    "fewer key heads": lambda: ((Q, K[:, :2], V[:, :2]), {}),
    "another head size": lambda: ((Q[..., :4], K[..., :4], V[..., :4]), {}),
    "another value head size": lambda: ((Q, K, V[..., :4].contiguous()), {}),
    "no queries": lambda: ((Q[:, :, :0], K, V), {}),
    "no keys": lambda: ((Q, K[:, :, :0], V[:, :, :0]), {}),
    "no batch": lambda: ((Q[:0], K[:0], V[:0]), {}),
    "three dimensions": lambda: ((Q[0], K[0], V[0]), {}),
    "columns": lambda: ((Q.mT.contiguous().mT, K, V), {}),
    "columns of values": lambda: ((Q, K, V.mT.contiguous().mT), {}),
    "every second number": lambda: (tuple(t.repeat_interleave(2, -1)[..., ::2] for t in (Q, K, V)), {}),
    "one tensor": lambda: ((Q, Q, Q), {}),
    "one tensor as keys and values": lambda: ((Q, K, K), {}),
    "a key of another dtype": lambda: ((Q, K.double(), V), {}),
    "a value of another dtype": lambda: ((Q, K, V.half()), {}),
    "another dtype": lambda: ((Q.double(), K.double(), V.double()), {}),
    "a key on another device": lambda: ((Q, K.to("meta"), V), {}),
    "a value on another device": lambda: ((Q, K, V.to("meta")), {}),
    "another device": lambda: ((Q.to("meta"), K.to("meta"), V.to("meta")), {}),
    "a sparse key": lambda: ((Q, K.to_sparse(), V), {}),
    "a key of another library": lambda: ((Q, K.to_mkldnn(), V), {}),
    "nested tensors": lambda: ((nested(), nested(), nested()), {}),
    "a nested key": lambda: ((Q, nested(), V), {}),
    "a nested value": lambda: ((Q, K, nested()), {}),
    "a nested mask": lambda: ((Q, K, V, nested()), {}),
    "jagged tensors": lambda: ((nested(torch.jagged),) * 3, {}),
    "a key that is none": lambda: ((Q, None, V), {}),
    "numbers": lambda: ((Q, 1.0, V), {}),
    "a parameter": lambda: ((Parameter(Q), K, V), {}),
    "a gradient of values": lambda: ((Q, K, V.clone().requires_grad_()), {}),
    "a parameter of a class of its own": lambda: ((OwnParameter(Q), K, V), {}),
    "fake tensors": lambda: (fake(), {}),
    "a subclass": lambda: ((Q.as_subclass(Subclass), K, V), {}),
    "a number for a bool": lambda: ((Q, K, V), {"is_causal": 1}),
    "another number for a bool": lambda: ((Q, K, V), {"enable_gqa": 0}),
    "a bool for a number": lambda: ((Q, K, V), {"scale": True}),
    "a bool for a probability": lambda: ((Q, K, V), {"dropout_p": False}),
    "not a number": lambda: ((Q, K, V), {"scale": float("nan")}),
    "another scale": lambda: ((Q, K, V), {"scale": 1.0}),
    "a scale below zero": lambda: ((Q, K, V), {"scale": -1.0}),
    "a causal mask": lambda: ((Q, K, V), {"is_causal": True}),
    "a causal mask of other lengths": lambda: ((Q[:, :, :4], K, V), {"is_causal": True}),
    "a causal mask, a scale below zero": lambda: ((Q, K, V), {"is_causal": True, "scale": -1.0}),
    "an lse": lambda: ((Q, K, V), {"return_lse": True}),
    "something for a bool": lambda: ((Q, K, V), {"return_lse": None}),
    "a mask": lambda: ((Q, K, V, MASK), {}),
    "a mask for all heads": lambda: ((Q, K, V, MASK[:, :1]), {}),
    "a mask for all sequences": lambda: ((Q, K, V, MASK[0]), {}),
    "a mask of one row": lambda: ((Q, K, V, MASK[0, 0, :1]), {}),
    "a mask of one column": lambda: ((Q, K, V, MASK[..., :1]), {}),
    "a mask of one dimension": lambda: ((Q, K, V, MASK[0, 0, 0]), {}),
    "a mask of too few keys": lambda: ((Q, K, V, MASK[..., :5]), {}),
    "a mask of too few rows": lambda: ((Q, K, V, MASK[..., :5, :]), {}),
    "a mask of too many sequences": lambda: ((Q[:1], K[:1], V[:1], MASK), {}),
    "a mask of too few heads": lambda: ((Q, K, V, MASK[:, :2]), {}),
    "a mask of numbers": lambda: ((Q, K, V, MASK.long()), {}),
    "a boolean mask": lambda: ((Q, K, V, MASK > 0), {}),
    "a mask and an lse": lambda: ((Q, K, V, MASK), {"return_lse": True}),
    "a mask that hides rows, and an lse": lambda: ((Q, K, V, HIDING), {"return_lse": True}),
    "a mask that hides rows": lambda: ((Q, K, V, HIDING), {}),
    "a mask on another device": lambda: ((Q, K, V, MASK.to("meta")), {}),
    "a mask for one query": lambda: ((Q[:, :, :1], K, V, MASK[:, :, :1]), {}),
    "a mask that wants a gradient": lambda: ((Q, K, V, MASK.clone().requires_grad_()), {}),
    "a mask of another dtype than the queries": lambda: ((Q.double(), K.double(), V.double(), MASK), {}),
    "a mask and a scale below zero": lambda: ((Q, K, V, MASK), {"scale": -1.0}),
    "a causal mask and another": lambda: ((Q, K, V, MASK), {"is_causal": True}),
    "groups of one head": lambda: ((Q, K, V), {"enable_gqa": True}),
    "groups of one head, three dimensions": lambda: ((Q[0], K[0], V[0]), {"enable_gqa": True}),
    "an integer for a probability": lambda: ((Q, K, V), {"dropout_p": 0}),
    "an array for a number": lambda: ((Q, K, V), {"softcap": torch.ones(3)}),
    "an array for a probability": lambda: ((Q, K, V), {"dropout_p": torch.ones(3)}),
    "a window": lambda: ((Q, K, V), {"window_size": (2, 2)}),
    "another window": lambda: ((Q, K, V), {"window_size": (2, 1)}),
    "a window of numbers": lambda: ((Q, K, V), {"window_size": (2.0, 2.0)}),
    "a window of bools": lambda: ((Q, K, V), {"window_size": (True, True)}),
    "a window in a list": lambda: ((Q, K, V), {"window_size": [2, 2]}),
    "a window and other lengths": lambda: ((Q[:, :, :4], K, V), {"window_size": (2, 2)}),
    "a window and a mask": lambda: ((Q, K, V, MASK), {"window_size": (2, 2)}),
    "a window and an lse": lambda: ((Q, K, V), {"window_size": (2, 2), "return_lse": True}),
    "a softcap": lambda: ((Q, K, V), {"softcap": 2.0}),
    "an integer for a softcap": lambda: ((Q, K, V), {"softcap": 2}),
    "a bool for a softcap": lambda: ((Q, K, V), {"softcap": True}),
    "a softcap below zero": lambda: ((Q, K, V), {"softcap": -2.0}),
    "a softcap, and no gradient": lambda: ((Q.detach(), K, V), {"softcap": 2.0}),
    "a softcap and a gradient": lambda: ((RECORDED, K, V), {"softcap": 2.0}),
    "another alignment": lambda: (
        (Q[:, :, :4], K, V),
        {"causal_variant": CausalVariant.LOWER_RIGHT, "is_causal": True},
    ),
    "a number for an alignment": lambda: ((Q, K, V), {"causal_variant": 2}),
    "sinks": lambda: ((Q, K, V), {"sinks": torch.ones(4), "softcap": 2.0}),
    "used lengths": lambda: ((Q, K, V), {"seqused_k": torch.tensor([2, 3], dtype=torch.int32), "softcap": 2.0}),
}


class Shaped(Opaque):
    """A kernel that looks at lengths and strides."""

    shape_dependent = True

    @staticmethod
    def supports(params: SDPAParams) -> str | None:
        if not all(tensor.is_contiguous() for tensor in (params.query, params.key, params.value)):
            return "takes contiguous tensors alone"
        return "takes an even number of keys alone" if params.key.shape[2] % 2 else None


class Preparing(Opaque):
    """A kernel that looks up nothing for a call that repeats another."""

    @staticmethod
    def prepare(params: SDPAParams) -> Any:
        if params.dropout > 0:
            return None
        options = {"is_causal": params.is_causal, "scale": params.scale, "return_lse": params.return_lse}
        return lambda *tensors: Opaque.forward(SDPAParams(*tensors, **options))


OURS = {"opaque": Opaque, "shaped": Shaped, "preparing": Preparing}


@pytest.fixture(params=["torch", "aten_flash", "aten_math", "math_ref", *OURS])
def impl(request: pytest.FixtureRequest) -> Any:
    for name, kernel in OURS.items():
        attnplug.register_impl(ImplSpec(name=name, kernel=kernel, backend=None))
    yield request.param
    for name in OURS:
        attnplug.unregister_impl(name)


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_after_others_is_decided_as_it_is_alone(change: str, impl: str) -> None:
    expected = {}
    for name in (change, "nothing"):
        forget()
        expected[name] = outcome(CHANGES[name], impl)
    forget()
    usual = "nothing", "a mask", "an lse", "a causal mask", "a window", "a softcap"
    for name in (*usual, *usual, "one tensor") * 3:
        outcome(CHANGES[name], impl)
    for name in (change, "nothing") * 3:
        assert_same(outcome(CHANGES[name], impl), expected[name])


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to another dtype": lambda: torch.autocast("cpu", torch.float16),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "a device": lambda: torch.device("cpu"),
    "a scope": lambda: attnplug.sdpa_kernel("aten_math"),
    "a recording": attnplug.record,
}


@pytest.mark.parametrize("around", AROUND)
def test_what_is_around_a_call_counts(around: str, impl: str) -> None:
    half = Q.bfloat16(), K.bfloat16(), V.bfloat16()
    calls: dict[str, Change] = {
        "plain": lambda: ((Q, K, V), {}),
        "half": lambda: (half, {}),
        "masked": lambda: ((Q, K, V, MASK), {}),
        "half, masked": lambda: ((*half, MASK.bfloat16()), {}),
        "recorded": lambda: ((RECORDED, K, V), {}),
        "windowed": lambda: ((Q, K, V), {"window_size": (2, 2)}),
    }
    expected = {}
    for inside in (True, False):
        for name, call in calls.items():
            forget()
            with AROUND[around]() if inside else nullcontext():
                expected[inside, name] = outcome(call, impl)
    for _ in range(4):
        for inside in (True, False):
            for name, call in calls.items():
                with AROUND[around]() if inside else nullcontext():
                    assert_same(outcome(call, impl), expected[inside, name])


@pytest.mark.parametrize("impl", ["torch", "aten_math"])
def test_transforms_see_through_calls_that_were_made_before(impl: str) -> None:
    attend = attnplug.scaled_dot_product_attention
    for _ in range(3):
        attend(Q, K, V, impl=impl)
    found = torch.vmap(lambda q, k, v: attend(q, k, v, impl=impl))(Q[None], K[None], V[None])
    torch.testing.assert_close(found[0], attend(Q, K, V, impl=impl))
    gradient = torch.func.grad(lambda query: attend(query, K, V, impl=impl).sum())(Q)
    query = Q.clone().requires_grad_()
    attend(query, K, V, impl=impl).sum().backward()
    torch.testing.assert_close(gradient, query.grad)


@pytest.mark.parametrize("kernel", [Opaque, Preparing])
def test_a_dual_tensor_is_seen_after_calls_of_plain_ones(kernel: Any) -> None:
    """No dispatch key tells the two apart."""
    attnplug.register_impl(ImplSpec(name="opaque", kernel=kernel, backend=None))
    for _ in range(3):
        attnplug.scaled_dot_product_attention(Q, K, V, impl="opaque")
    with forward_ad.dual_level(), pytest.raises(attnplug.GradientError, match="has no forward-mode derivatives"):
        attnplug.scaled_dot_product_attention(forward_ad.make_dual(Q, Q), K, V, impl="opaque")
    attnplug.unregister_impl("opaque")
