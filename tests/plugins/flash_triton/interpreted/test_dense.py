"""Dense calls without dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnplug
from attnplug_flash_triton.problem import machine_of, read
from interpreted_calls import (
    INF,
    KEYS,
    LOWER_RIGHT,
    QUERIES,
    assert_call_right,
    coin,
    differentiated,
    formula,
    inputs,
    random,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of divisions by 0 that are then left out


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "many heads of keys": ({"batch": 2, "heads": 4, "kv_heads": 2}, {}),
    "negative scale": ({}, {"scale": -0.3}),
    "scale of zero": ({}, {"scale": 0.0, "is_causal": True}),
    "causal": ({}, {"is_causal": True}),
    "causal, lower right": ({}, {"is_causal": True, "causal_variant": LOWER_RIGHT}),
    "causal, lower right, rows without keys": (
        {"queries": KEYS, "keys": QUERIES},
        {"is_causal": True, "causal_variant": LOWER_RIGHT},
    ),
    "window": ({"queries": 60, "keys": 60}, {"window_size": (5, 3)}),
    "window wider than a tile": ({"queries": 60, "keys": 50}, {"window_size": (20, 18), "causal_variant": LOWER_RIGHT}),
    "window open to the right": ({}, {"window_size": (2, -1)}),
    "window past the last key": ({"queries": KEYS, "keys": 17}, {"window_size": (3, 0)}),
    "softcap": ({}, {"softcap": 1.5}),
    "sinks": ({}, {"sinks": random(2), "is_causal": True}),
    "alibi": ({}, {"alibi_slopes": torch.tensor([0.3, 0.7])}),
    "alibi for each sequence": ({"batch": 2}, {"alibi_slopes": torch.rand(2, 2), "causal_variant": LOWER_RIGHT}),
    "boolean mask": ({"batch": 2}, {"attn_mask": coin(2, 1, QUERIES, KEYS)}),
    "boolean mask of keys": ({"batch": 2}, {"attn_mask": coin(2, 1, 1, KEYS)}),
    "boolean mask of queries": ({}, {"attn_mask": coin(1, 2, QUERIES, 1)}),
    "boolean mask of queries, sinks": ({}, {"attn_mask": coin(1, 2, QUERIES, 1), "sinks": random(2)}),
    "boolean mask, transposed": ({}, {"attn_mask": coin(1, 1, KEYS, QUERIES).mT}),
    "additive mask": ({}, {"attn_mask": random(1, 2, QUERIES, KEYS)}),
    "additive mask for all heads": ({"batch": 2}, {"attn_mask": random(1, 1, QUERIES, KEYS), "is_causal": True}),
    "additive mask of keys": ({"batch": 2}, {"attn_mask": random(2, 1, 1, KEYS)}),
    "additive mask of queries": ({}, {"attn_mask": random(1, 2, QUERIES, 1)}),
    "additive mask of one number": ({}, {"attn_mask": random(1, 1, 1, 1)}),
    "additive mask of -inf": ({}, {"attn_mask": random(1, 2, QUERIES, KEYS).masked_fill(coin(QUERIES, 1), -INF)}),
    "used keys": ({"batch": 3}, {"seqused_k": torch.tensor([0, 16, 30], dtype=torch.int32)}),
    "used keys, lower right": (
        {"batch": 2},
        {"seqused_k": torch.tensor([9, 30], dtype=torch.int32), "is_causal": True, "causal_variant": LOWER_RIGHT},
    ),
    "everything": (
        {"batch": 2},
        {
            "attn_mask": random(2, 1, QUERIES, KEYS),
            "sinks": random(2),
            "softcap": 2.0,
            "window_size": (15, 1),
            "is_causal": True,
            "causal_variant": LOWER_RIGHT,
            "alibi_slopes": torch.tensor([0.2, 0.4]),
            "seqused_k": torch.tensor([20, KEYS], dtype=torch.int32),
        },
    ),
}
HALF = (  # whose logits are kept in another unit than float32's
    "plain",
    "negative scale",
    "scale of zero",
    "causal, lower right, rows without keys",
    "window",
    "softcap",
    "additive mask",
    "boolean mask of queries, sinks",
    "everything",
)


@pytest.mark.parametrize("case", CASES)
def test_out_lse_and_gradients_are_right_in_float32(case: str) -> None:
    shapes, arguments = CASES[case]
    assert_call_right(inputs(**shapes), **arguments)


@pytest.mark.parametrize("case", HALF)
def test_out_lse_and_gradients_are_right_in_float16(case: str) -> None:
    shapes, arguments = CASES[case]
    assert_call_right(inputs(**shapes), torch.float16, **arguments)


@pytest.mark.parametrize(("size", "size_v"), [(8, 8), (8, 1), (72, 16), (33, 65), (256, 8)])
def test_any_head_size_is_right(size: int, size_v: int) -> None:
    query, key, value = random(1, 2, 20, size), random(1, 2, 18, size, seed=1), random(1, 2, 18, size_v, seed=2)
    assert_call_right([query, key, value], is_causal=True)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 40), (17, 16), (16, 33)])
def test_lengths_around_a_tile_are_right(lengths: tuple[int, int]) -> None:
    queries, keys = lengths
    assert_call_right(inputs(queries=queries, keys=keys, size=16), is_causal=True, causal_variant=LOWER_RIGHT)


def test_a_sink_of_minus_inf_is_none() -> None:
    tensors = [tensor.float() for tensor in inputs()]
    results = []
    for sinks in (None, torch.full((2,), -INF, requires_grad=True)):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = attnplug.scaled_dot_product_attention(*leaves, enable_gqa=True, sinks=sinks, impl="flash_triton")
        out.square().sum().backward()
        results.append((out, *(leaf.grad for leaf in leaves)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert not sinks.grad.any()


def test_rows_whose_mask_is_the_lowest_number_see_all_keys_alike() -> None:
    """As a padded row of a language model has it: adding -3.4e38 to all its logits makes them equal."""
    mask = torch.zeros(1, 1, QUERIES, KEYS, dtype=torch.float64)
    mask[:, :, ::3] = torch.finfo(torch.float32).min

    def call(**named: Any) -> Any:
        return attnplug.scaled_dot_product_attention(**named, enable_gqa=True, return_lse=True, impl="flash_triton")

    out, _, grads = differentiated(call, torch.float32, inputs(), {"attn_mask": mask})
    ref, _, ref_grads = differentiated(formula, torch.float64, inputs(), {"attn_mask": mask})
    torch.testing.assert_close(out.double(), ref, atol=1e-5, rtol=1e-4)
    for name, grad in grads.items():
        torch.testing.assert_close(grad.double(), ref_grads[name], atol=1e-5, rtol=1e-4)


def test_tiles_outside_the_window_are_not_read() -> None:
    """Forward and backward: what lies there is NaN, and 0 * NaN would show."""
    query, key, value = (random(1, 1, 128, 16, seed=seed).float() for seed in range(3))
    results = []
    for rubbish in (0.0, float("nan")):
        for tensor in (key, value):
            tensor[:, :, :48] = rubbish
        leaves = [query[:, :, 64:].clone(), key.clone(), value.clone()]
        leaves = [tensor.requires_grad_() for tensor in leaves]
        out = attnplug.scaled_dot_product_attention(
            *leaves, window_size=(16, 0), causal_variant=LOWER_RIGHT, impl="flash_triton"
        )
        grad_q, grad_k, grad_v = torch.autograd.grad(out.sum(), leaves)
        results.append((out, grad_q, grad_k[:, :, 48:], grad_v[:, :, 48:]))
    assert all(torch.equal(one, other) and one.isfinite().all() for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("allow", ["legacy", "new"])
def test_both_ways_to_allow_tf32_are_read(allow: str) -> None:
    """PyTorch refuses to be asked in the one way once it was told in the other."""
    tensors = [tensor.float() for tensor in inputs()]
    try:
        if allow == "legacy":
            torch.set_float32_matmul_precision("high")
        else:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        problem = read(attnplug.SDPAParams(*tensors, scale=1.0), machine_of(tensors[0].device))
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
    assert problem.flags["PRECISION"] == "tf32"
    assert read(attnplug.SDPAParams(*tensors, scale=1.0), problem.machine).flags["PRECISION"] == "ieee"


def test_memory_beyond_the_used_keys_is_never_read_into_a_result() -> None:
    query, key, value = (tensor.float() for tensor in inputs())
    used = torch.tensor([11], dtype=torch.int32)
    results = []
    for rubbish in (0.0, float("nan")):
        tensors = [query.clone(), key.clone(), value.clone()]
        tensors[1][:, :, 11:] = tensors[2][:, :, 11:] = rubbish
        leaves = [tensor.requires_grad_() for tensor in tensors]
        out = attnplug.scaled_dot_product_attention(*leaves, enable_gqa=True, seqused_k=used, impl="flash_triton")
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


DECODING: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal, lower right": {"is_causal": True, "causal_variant": LOWER_RIGHT},
    "window, alibi, softcap, sinks": {
        "window_size": (50, 0),
        "causal_variant": LOWER_RIGHT,
        "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4]),
        "softcap": 3.0,
        "sinks": random(4),
    },
    "boolean mask": {"attn_mask": coin(1, 4, 3, 70, chance=0.1)},
    "additive mask of -inf": {"attn_mask": random(1, 4, 3, 70).masked_fill(coin(4, 3, 1), -INF)},
    "used keys": {"seqused_k": torch.tensor([66, 3], dtype=torch.int32)},
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in DECODING), ("plain", torch.float16), ("boolean mask", torch.float16)],
    ids=str,
)
def test_few_queries_against_many_keys_are_right(case: str, dtype: torch.dtype) -> None:
    """Keys are split among programs, and heads that share keys are packed into one tile."""
    batch = 2 if case == "used keys" else 1
    assert_call_right(inputs(batch=batch, heads=4, kv_heads=2, queries=3, keys=70, size=16), dtype, **DECODING[case])


def test_a_nan_under_a_softcap_is_felt_in_its_row_alone() -> None:
    query, key, value = (torch.randn(1, 2, 40, 16) for _ in range(3))
    query[0, 1, 20, 3] = torch.nan
    out = attnplug.scaled_dot_product_attention(query, key, value, softcap=5.0, impl="flash_triton")
    assert out.isnan().any(-1).nonzero().tolist() == [[0, 1, 20]]
