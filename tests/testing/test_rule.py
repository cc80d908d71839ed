"""The contract's rule, held against numpy and against results of known error.

`attnplug.testing.assert_right` tells whether a result is right. What it holds results against, and how far they may be
from it, no public name tells, so that part is tested where it is computed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnplug
from attnplug import CausalVariant
from attnplug._accuracy import Expected, Outcome, formula
from attnplug.testing import Call, CheckFailure, assert_right
from attnplug.testing._compare import expected
from reference import attention as by_numpy

GRADIENTS = ("query", "key", "value")
EPS = 2.0**-23
CALLS = {
    "plain": Call(queries=9, keys=13, gradients=GRADIENTS),
    "causal, grouped": Call(queries=13, keys=9, heads=4, kv_heads=2, is_causal=True, gradients=GRADIENTS),
    "lower right, sinks": Call(
        queries=7, keys=13, sinks=True, is_causal=True, causal_variant="LOWER_RIGHT", gradients=(*GRADIENTS, "sinks")
    ),
    "mask": Call(queries=9, keys=13, mask="additive blind", mask_dims="b1qk", gradients=(*GRADIENTS, "attn_mask")),
    "softcap, window": Call(queries=9, keys=13, softcap=1.5, scale=1.0, window_size=(3, 2), gradients=GRADIENTS),
    "alibi, lse": Call(queries=9, keys=13, alibi="bh", lse=True, lse_gradient=True, gradients=GRADIENTS),
    "used": Call(queries=9, keys=13, used=(4, 13), gradients=GRADIENTS),
}
PACKED = {
    "packed": Call(lengths_q=(5, 0, 7), lengths_k=(9, 3, 20), heads=4, kv_heads=2, is_causal=True, gradients=GRADIENTS),
    "paged": Call(lengths_q=(5, 7), lengths_k=(9, 20), page_size=8, gradients=GRADIENTS),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_reference_is_what_numpy_gives(name: str) -> None:
    inputs = CALLS[name].make()
    taken = {name: value for name, value in inputs.arguments.items() if name not in ("dropout_p", "return_lse")}
    out, lse = by_numpy(**taken)
    ref = expected(CALLS[name], inputs).ref
    np.testing.assert_allclose(ref["out"], out, atol=1e-12)
    np.testing.assert_allclose(ref["lse"], lse, atol=1e-12)


@pytest.mark.parametrize("name", [*CALLS, *PACKED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_of_rows_give_what_the_whole_gives(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = (CALLS | PACKED)[name].but(dtype=dtype)
    inputs = call.make()
    whole = expected(call, inputs)
    bounds = {name: list(whole.bounds(name)) for name in whole.ref.names}
    monkeypatch.setattr(formula, "SCORES", {"cpu": 60})
    blocks = expected(call, inputs)
    for name in whole.ref.names:
        torch.testing.assert_close(blocks.ref[name], whole.ref[name], atol=1e-12, rtol=0)
        torch.testing.assert_close(blocks.sums[name], whole.sums[name], atol=1e-12, rtol=1e-9)
        assert list(blocks.bounds(name))[-1] == pytest.approx(bounds[name][-1], rel=0.5)


def test_a_long_sequence_takes_the_memory_of_a_block() -> None:
    """The scores of this call take 4 GiB in float64: only blocks of them are made."""
    query = torch.zeros(1, 1, 2**18, 1)
    key = torch.zeros(1, 1, 2**11, 1)
    shapes: list[int] = []

    def compute(form: Any, query: Tensor, key: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        shapes.append(query.shape[2] * key.shape[2])
        return query, query[..., 0]

    formula.attention({"query": query, "key": key, "value": key}, torch.float64, formula.OPPOSITE, compute=compute)
    assert max(shapes) <= formula.SCORES["cpu"] and sum(shapes) == 2**29


@pytest.mark.parametrize("name", [*CALLS, *PACKED])
def test_no_element_is_larger_than_the_sum_of_what_it_is_made_of(name: str) -> None:
    call = (CALLS | PACKED)[name]
    right = expected(call, call.make())
    for part in ("out", *call.gradients):
        assert (right.ref[part].abs() <= right.sums[part] * (1 + 1e-9) + 1e-12).all(), part


def test_the_sums_are_those_of_the_formulas() -> None:
    """By numpy, in the words of the contract, for one head."""
    call = Call(batch=1, heads=1, queries=5, keys=7, scale=0.3, gradients=GRADIENTS)
    inputs = call.make()
    query, key, value = (inputs.arguments[name][0, 0].double().numpy() for name in GRADIENTS)
    grad = np.abs(inputs.grad_out[0, 0].double().numpy())
    weights = np.exp(0.3 * query @ key.T)
    weights /= weights.sum(-1, keepdims=True)
    delta = (grad * np.abs(weights @ value)).sum(-1, keepdims=True)
    scores = weights * (grad @ np.abs(value).T + delta)
    right = {
        "out": weights @ np.abs(value),
        "value": weights.T @ grad,
        "query": 0.3 * scores @ np.abs(key),
        "key": 0.3 * scores.T @ np.abs(query),
    }
    found = expected(call, inputs).sums
    for name, sums in right.items():
        np.testing.assert_allclose(found[name][0, 0], sums, atol=1e-12)


def test_gradients_that_are_exactly_zero_may_round() -> None:
    """With one key the gradient of query is P (dP - delta), two equal numbers that a kernel rounds apart."""
    call = Call(queries=5, keys=1, gradients=("query",))
    right = expected(call, call.make())
    assert (right.ref["query"] == 0).all()
    off = torch.full(right.ref["query"].shape, 2 * EPS * right.sums["query"].max().item())
    assert not right.mistakes(Outcome(right.ref["out"].float(), None, {"query": off}))
    assert right.mistakes(Outcome(right.ref["out"].float(), None, {"query": 100 * off}))


@pytest.mark.parametrize("ulps", [1, 2])
def test_float32_results_may_be_off_by_one_or_two_units_in_the_last_place(ulps: int) -> None:
    call = Call(queries=1, keys=1, values="raised")
    right = expected(call, call.make())
    out = right.ref["out"].float()
    for _ in range(ulps):
        out = torch.nextafter(out, torch.tensor(float("inf")))
    assert not right.mistakes(Outcome(out))


def test_what_is_wrong_says_how_far_and_where() -> None:
    call = Call(queries=3, keys=4, heads=1, batch=1)
    right = expected(call, call.make())
    out = right.ref["out"].float()
    out[0, 0, 2, 5] += 1.0
    (mistake,) = right.mistakes(Outcome(out))
    assert mistake.place == (0, 0, 2, 5)
    assert mistake.error == pytest.approx(1.0, rel=1e-5)
    assert mistake.allowed == pytest.approx(right.allowed("out"))
    assert "largest error 1 at [0, 0, 2, 5]" in str(mistake)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_wrong(broken: float) -> None:
    call = Call(queries=3, keys=4)
    right = expected(call, call.make())
    out = right.ref["out"].float()
    out[0, 0, 0, 0] = broken
    assert right.mistakes(Outcome(out))


def test_nan_of_the_inputs_may_show_where_the_formula_has_it() -> None:
    query, key = torch.randn(2, 1, 2, 4, 8)
    query[0, 0, 1] = float("nan")
    out = torch.softmax(query[None, 0] @ key[None, 0].mT * 8**-0.5, -1) @ key[None, 0]
    right = Expected({"query": query[None, 0], "key": key[None, 0], "value": key[None, 0]})
    assert not right.mistakes(Outcome(out))
    assert right.mistakes(Outcome(out.nan_to_num(0.0)))


def test_kernels_that_quantize_are_held_to_the_norm_of_their_error() -> None:
    query, key, value = (torch.randn(2, 2, 64, 32) for _ in range(3))
    arguments = {"query": query, "key": key, "value": value}
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    noise = torch.randn_like(out)
    noise *= out.norm() / noise.norm()
    assert_right(arguments, out + 0.04 * noise, quantized=True)
    for wrong, quantized in (
        (out + 0.04 * noise, False),
        (out + 0.06 * noise, True),
        (out.masked_fill(out == out[0, 0, 0, 0], float("nan")), True),
    ):
        with pytest.raises(CheckFailure):
            assert_right(arguments, wrong, quantized=quantized)


def test_a_call_whose_plain_formula_overflows_cannot_be_judged() -> None:
    query = torch.full((1, 1, 2, 2), 6e4, dtype=torch.float16)
    right = Expected({"query": query, "key": query, "value": query, "scale": 1e-3})
    with pytest.raises(ValueError, match="overflows in torch.float16"):
        right.allowed("out")


@pytest.mark.parametrize("impl", ["torch", "aten_flash", "aten_math"])
def test_assert_right_takes_any_call(impl: str) -> None:
    query, key, value = (torch.randn(2, 4, 16, 8, requires_grad=True) for _ in range(3))
    arguments: dict[str, Any] = {"query": query, "key": key, "value": value, "is_causal": True}
    out = attnplug.scaled_dot_product_attention(**arguments, impl=impl)
    grad = torch.randn_like(out)
    gradients = dict(zip(GRADIENTS, torch.autograd.grad(out, (query, key, value), grad), strict=True))
    assert_right(arguments, out.detach(), gradients=gradients, grad_out=grad)
    wrong = {**gradients, "key": gradients["value"]}
    with pytest.raises(CheckFailure, match="gradient of key: largest error"):
        assert_right(arguments, out.detach(), gradients=wrong, grad_out=grad)
    with pytest.raises(CheckFailure, match="out: largest error"):
        assert_right({**arguments, "causal_variant": CausalVariant.UPPER_LEFT, "scale": 2.0}, out.detach())


def test_autocast_around_a_judgement_allows_no_more() -> None:
    query, key, value = torch.randn(3, 1, 2, 16, 8)
    arguments = {"query": query, "key": key, "value": value}
    out = attnplug.scaled_dot_product_attention(**arguments, impl="aten_math")
    with torch.autocast("cpu", torch.bfloat16):
        assert_right(arguments, out)
        with pytest.raises(CheckFailure, match="out: largest error"):
            assert_right(arguments, out * 1.0001)


def test_two_units_in_the_last_place_are_allowed_and_no_more() -> None:
    """One key of values 1, which any order of rounding gives exactly: in bfloat16, 1 + 0.3 - 0.3 is 2**-8 off."""
    one = torch.ones(1, 1, 1, 8, dtype=torch.bfloat16)
    assert ((one + 0.3 - 0.3 - one).abs() == 2.0**-8).all()
    arguments = {"query": one, "key": one, "value": one}
    assert_right(arguments, one + 2 * 2.0**-8)
    with pytest.raises(CheckFailure, match="out: largest error"):
        assert_right(arguments, one + 4 * 2.0**-8)


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 1e-3)],
    ids=str,
)
def test_an_lse_may_be_off_by_what_the_contract_allows_its_dtype(dtype: torch.dtype, limit: float) -> None:
    query = torch.zeros(1, 1, 1, 8, dtype=dtype)
    key = torch.ones(1, 1, 1024, 8, dtype=dtype)
    arguments = {"query": query, "key": key, "value": key}
    lse = torch.full((1, 1, 1), math.log(1024), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    assert_right(arguments, torch.ones_like(query), lse * (1 + 0.9 * limit))
    with pytest.raises(CheckFailure, match="lse: largest"):
        assert_right(arguments, torch.ones_like(query), lse * (1 + 1.1 * limit))
