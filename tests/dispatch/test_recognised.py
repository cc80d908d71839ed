"""A call that is like one before it runs at once: what is not quite like it must be seen all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import attnplug
import forked
from attnplug import CausalVariant, ImplSpec, SDPAParams

torch.manual_seed(0)
Q, K, V = torch.randn(3, 2, 4, 6, 8)
MASK = torch.randn(2, 4, 6, 6)
SQUARE = torch.randn(2, 4, 8, 8)
HIDING = torch.zeros(6, 6).index_fill(0, torch.tensor([2, 5]), float("-inf"))


RECORDED = Q.clone().requires_grad_()


class Subclass(Tensor):
    pass


class OwnParameter(Parameter):
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


def fake() -> tuple[Tensor, ...]:
    mode = FakeTensorMode()
    return tuple(map(mode.from_tensor, (Q, K, V)))


def nested(layout: torch.layout = torch.strided) -> Tensor:
    return torch.nested.nested_tensor([Q[0, :2, :3], K[0, :2, :3]], layout=layout)


Change = Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
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


TOKENS, PAGES = torch.randn(9, 4, 8), torch.randn(6, 2, 4, 8)


def row(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


STARTS = row(0, 4, 9)


def packed(*given: Any, **options: Any) -> Change:
    """Return a call of two sequences of four and five tokens, with other first arguments, or with `options`."""
    usual = TOKENS, TOKENS, TOKENS, STARTS, STARTS, 5, 5
    return lambda: ((*given, *usual[len(given) :]), options)


PACKED: dict[str, Change] = {
    "nothing": packed(),
    "other lengths": packed(TOKENS, TOKENS, TOKENS, row(0, 1, 9), row(0, 1, 9), 8, 8),
    "fewer tokens": packed(TOKENS[:7], TOKENS[:7], TOKENS[:7], row(0, 4, 7), row(0, 4, 7)),
    "more sequences": packed(TOKENS, TOKENS, TOKENS, row(0, 4, 6, 9), row(0, 4, 6, 9)),
    "no tokens": packed(TOKENS[:0], TOKENS[:0], TOKENS[:0], row(0, 0), row(0, 0)),
    "no keys": packed(TOKENS, TOKENS[:0], TOKENS[:0], STARTS, row(0, 0, 0), 5, 0),
    "no sequences": packed(TOKENS, TOKENS, TOKENS, row(0), row(0)),
    "fewer values than keys": packed(TOKENS, TOKENS, TOKENS[:8]),
    "fewer heads": packed(TOKENS[:, :2], TOKENS[:, :2], TOKENS[:, :2]),
    "fewer key heads": packed(TOKENS, TOKENS[:, :2], TOKENS[:, :2]),
    "another head size": packed(TOKENS[..., :4], TOKENS[..., :4], TOKENS[..., :4]),
    "a sequence beyond the tokens": packed(TOKENS, TOKENS, TOKENS, row(0, 4, 10), row(0, 4, 10), 6, 6),
    "a sequence that ends before it starts": packed(TOKENS, TOKENS, TOKENS, row(0, 5, 4), row(0, 5, 4)),
    "a sequence longer than the longest": packed(TOKENS, TOKENS, TOKENS, STARTS, STARTS, 4, 4),
    "starts of another dtype": packed(TOKENS, TOKENS, TOKENS, STARTS.long()),
    "keys of fewer sequences": packed(TOKENS, TOKENS, TOKENS, STARTS, row(0, 9), 5, 9),
    "no starts": packed(TOKENS, TOKENS, TOKENS, None),
    "no starts of keys": packed(TOKENS, TOKENS, TOKENS, STARTS, None),
    "a longest that is no number": packed(TOKENS, TOKENS, TOKENS, STARTS, STARTS, None),
    "four dimensions": packed(Q, K, V),
    "pages": packed(
        TOKENS, PAGES, PAGES, STARTS, None, seqused_k=row(4, 5), block_table=row(0, 3, 1, 2, 4, 5).view(2, 3)
    ),
    "pages without a table": packed(TOKENS, PAGES, PAGES, STARTS, None, seqused_k=row(4, 5)),
    "pages with starts, without a table": packed(TOKENS, PAGES, PAGES, STARTS, row(0, 2, 4)),
    "used lengths": packed(seqused_k=row(1, 2)),
    "used lengths that are too long": packed(seqused_k=row(1, 6)),
    "a nested key": packed(TOKENS, nested()),
    "a nested value": packed(TOKENS, TOKENS, nested()),
    "nested starts": packed(TOKENS, TOKENS, TOKENS, nested()),
    "a sparse key": packed(TOKENS, TOKENS.to_sparse()),
    "a key that is none": packed(TOKENS, None),
    "a subclass": packed(TOKENS.as_subclass(Subclass)),
    "fake tensors": lambda: packed(*[FakeTensorMode().from_tensor(TOKENS)] * 3)(),
    "a gradient": packed(TOKENS.clone().requires_grad_()),
    "a causal mask": packed(is_causal=True),
    "a number for a bool": packed(is_causal=1),
    "a scale below zero": packed(scale=-1.0),
    "not a number": packed(scale=float("nan")),
    "a window": packed(window_size=(1, 1)),
    "a window of numbers": packed(window_size=(1.0, 1.0)),
    "a softcap": packed(softcap=2.0),
    "slopes": packed(alibi_slopes=torch.ones(4)),
    "sinks": packed(sinks=torch.ones(4)),
    "an lse": packed(return_lse=True),
}


@pytest.mark.parametrize("change", PACKED)
@pytest.mark.parametrize("impl", ["math_ref"])
def test_packed_sequences_after_others_are_decided_as_they_are_alone(change: str, impl: str) -> None:
    expected = {}
    for name in (change, "nothing"):
        forget()
        expected[name] = outcome(PACKED[name], impl, attnplug.varlen_attn)
    forget()
    for name in ("nothing", "a window", "a causal mask", "an lse", "used lengths", "pages") * 3:
        outcome(PACKED[name], impl, attnplug.varlen_attn)
    for name in (change, "nothing") * 3:
        assert_same(outcome(PACKED[name], impl, attnplug.varlen_attn), expected[name])


def test_packed_sequences_without_keys_reach_no_kernel() -> None:
    lengths = []

    def forward(params: SDPAParams) -> tuple[Tensor, None]:
        lengths.append(params.key.shape[0])
        return params.query.clone(), None

    packed_alone = attnplug.Capabilities(features=(attnplug.Feature.VARLEN,), dense=False)
    attnplug.register_impl(ImplSpec(name="counts", kernel=forward, backend=None, capabilities=packed_alone))
    for keys, starts in ((9, STARTS), (9, STARTS), (9, STARTS), (0, row(0, 0, 0))):
        given = TOKENS, TOKENS[:keys], TOKENS[:keys]
        out = attnplug.varlen_attn(*given, STARTS, starts, 5, 5, impl="counts")
    attnplug.unregister_impl("counts")
    assert lengths == [9, 9, 9] and not out.any()


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


class Prepares(Opaque):
    """Counts how often forward runs, and what it prepared; `answer` is what that returns."""

    def __init__(self, answer: Any = Opaque.forward) -> None:
        self.forwards = self.runs = 0
        self.answer = answer

    def forward(self, params: SDPAParams) -> Any:  # type: ignore[override]  # of Opaque it is static
        self.forwards += 1
        return Opaque.forward(params)

    def prepare(self, params: SDPAParams) -> Any:
        options = {"is_causal": params.is_causal, "scale": params.scale}

        def run(*tensors: Tensor) -> Any:
            self.runs += 1
            return self.answer(SDPAParams(*tensors, **options))

        return run


@contextmanager
def registered(kernel: Prepares) -> Iterator[Callable[..., Any]]:
    attnplug.register_impl(ImplSpec(name="prepares", kernel=kernel, backend=None))
    yield partial(attnplug.scaled_dot_product_attention, impl="prepares")
    attnplug.unregister_impl("prepares")


def test_a_call_that_repeats_another_runs_what_the_kernel_prepared() -> None:
    with registered(kernel := Prepares()) as attend:
        for number in range(1, 5):
            torch.testing.assert_close(attend(Q * number, K, V), sdpa(Q * number, K, V))
        assert (kernel.forwards, kernel.runs) == (1, 3)
        for around in (torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False), profile()):
            with around:
                attend(Q, K, V)
        attend(RECORDED, K, V)
        attend(Q, K, V, scale=0.3)
        attend(Q[:1], K[:1], V[:1])
        assert (kernel.forwards, kernel.runs) == (7, 3)
        with attnplug.record() as calls, torch.no_grad():
            for _ in range(3):
                attend(K, Q, V)
        assert [call.impl for call in calls] == ["prepares"] * 3


def test_a_kernel_may_have_forward_called_after_all() -> None:
    with registered(kernel := Prepares(lambda params: None)) as attend:
        for number in range(3):
            torch.testing.assert_close(attend(Q * number, K, V), sdpa(Q * number, K, V))
        assert (kernel.forwards, kernel.runs) == (3, 2)


@pytest.mark.parametrize("answer", [lambda params: params.query, lambda params: (params.query[:1], None)])
def test_what_a_prepared_call_returns_is_checked(answer: Any) -> None:
    with registered(Prepares(answer)) as attend:
        attend(Q, K, V)
        with pytest.raises(attnplug.KernelError, match="'prepares'"):
            attend(Q, K, V)


def test_pytorchs_function_is_itself_in_what_a_kernel_prepared() -> None:
    def answer(params: SDPAParams) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(params.query, params.key, params.value), None

    with registered(kernel := Prepares(answer)), attnplug.patch_torch(), attnplug.sdpa_kernel("prepares"):
        for _ in range(3):
            torch.nn.functional.scaled_dot_product_attention(Q, K, V)
    assert (kernel.forwards, kernel.runs) == (1, 2)


def test_a_decode_loop_decides_once_wherever_its_lengths_are_equal() -> None:
    asked = []

    class Asked(Opaque):
        @staticmethod
        def supports(params: SDPAParams) -> None:
            asked.append(params)

    attnplug.register_impl(ImplSpec(name="asked", kernel=Asked, backend=None))
    for length in (1, 2, 3, 1, 6):
        attnplug.scaled_dot_product_attention(Q[:, :, :1], K[:, :, :length], V[:, :, :length], impl="asked")
        attnplug.scaled_dot_product_attention(Q, K, V, impl="asked", enable_gqa=True)
    attnplug.unregister_impl("asked")
    assert len(asked) == 1


def test_a_shape_dependent_kernel_is_asked_again_for_every_shape() -> None:
    class Even(Opaque):
        shape_dependent = True

        @staticmethod
        def supports(params: SDPAParams) -> str | None:
            return "an odd number of keys" if params.key.shape[-2] % 2 else None

    attnplug.register_impl(ImplSpec(name="even", kernel=Even, backend=None))
    with attnplug.sdpa_kernel(["even", "aten_math"], set_priority=True), attnplug.record() as calls:
        for length in (6, 6, 6, 5, 6, 5, 4):
            attnplug.scaled_dot_product_attention(Q, K[:, :, :length], V[:, :, :length])
    attnplug.unregister_impl("even")
    assert [call.impl for call in calls] == ["even", "even", "even", "aten_math", "even", "aten_math", "even"]


def test_decisions_by_length_do_not_pile_up() -> None:
    """Where a kernel looks at lengths each has a decision; after some thousands the first ones are made again."""
    asked: list[int] = []

    class Asked(Opaque):
        shape_dependent = True

        @staticmethod
        def forward(params: SDPAParams) -> tuple[Tensor, None]:
            return params.query.clone(), None

        @staticmethod
        def supports(params: SDPAParams) -> None:
            asked.append(params.key.shape[-2])

    attnplug.register_impl(ImplSpec(name="asked", kernel=Asked, backend=None))
    query, keys = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 5000, 8)
    for length in (*range(1, 21), *range(1, 5001), 20):
        attnplug.scaled_dot_product_attention(query, keys[:, :, :length], keys[:, :, :length], impl="asked")
    assert asked.count(19) == asked.count(5000) == 1
    assert asked.count(20) == 2


def test_more_kinds_of_tensors_than_are_recognised_are_decided_as_well() -> None:
    for _ in range(3):
        for heads in range(1, 20):
            query = torch.randn(1, heads, 3, 8)
            out = attnplug.scaled_dot_product_attention(query, query, query, impl="aten_flash")
            expected = torch.nn.functional.scaled_dot_product_attention(query, query, query)
            torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("change", ["del guards.TensorGuards", "guards.TensorGuards = lambda *tensors: None"])
def test_a_release_with_other_guards_decides_as_well(change: str) -> None:
    done = forked.run(f"""
import torch
from torch._C._dynamo import guards
{change}
import attnplug
query = torch.randn(1, 2, 4, 8)
expected = torch.nn.functional.scaled_dot_product_attention(query, query, query)
for _ in range(4):
    out = attnplug.scaled_dot_product_attention(query, query, query, impl="aten_flash")
    torch.testing.assert_close(out, expected)
""")
    assert done.returncode == 0, done.stderr
