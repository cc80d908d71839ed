"""flash_triton computes what the contract says, in Triton's interpreter.

Triton decides between compiler and interpreter when kernels are defined, so these tests need a process of
their own: test_flash_triton.py starts one. By hand: `TRITON_INTERPRET=1 pytest` with this file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnplug
from accuracy import GRADIENT, assert_lse_right, assert_right
from attnplug import CausalVariant
from attnplug_flash_triton.problem import machine_of, read
from interpreter import patched_once
from reference import attention as expected

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, from test_flash_triton.py"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of divisions by 0 that are then left out
]

LOWER_RIGHT = CausalVariant.LOWER_RIGHT
INF = float("inf")
QUERIES, KEYS = 20, 37  # two and three tiles of 16, each with a rest


@pytest.fixture(autouse=True, scope="module")
def _small_tiles() -> Any:
    """Tiles of 16, so that short sequences have several."""
    if not INTERPRETED:
        yield
        return
    from attnplug_flash_triton import config

    with patched_once():
        before = config.use(config.Table.uniform(config.INTERPRETER, config.Tiles(16, 16, 1, 1)))
        yield
        config.use(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def coin(*shape: int, chance: float = 0.5) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape))) < chance


def inputs(
    batch: int = 1, heads: int = 2, kv_heads: int = 1, queries: int = QUERIES, keys: int = KEYS, size: int = 24
) -> list[Tensor]:
    return [
        random(batch, heads, queries, size),
        random(batch, kv_heads, keys, size, seed=1),
        random(batch, kv_heads, keys, size - 4, seed=2),
    ]


def formula(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The contract's formula in PyTorch's operators and the inputs' dtype, for gradients and for `low`."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    scale = arguments.get("scale", query.shape[-1] ** -0.5)
    logits = query @ key.mT * scale
    if softcap := arguments.get("softcap", 0.0):
        logits = softcap * torch.tanh(logits / softcap)
    queries, keys = logits.shape[-2:]
    used = arguments.get("seqused_k")
    used = torch.full((len(query),), keys) if used is None else used.long()
    used = used.view(-1, 1, 1, 1)
    lower_right = arguments.get("causal_variant") == LOWER_RIGHT
    position, j = torch.arange(queries)[:, None] + (used - queries if lower_right else 0), torch.arange(keys)
    if (slopes := arguments.get("alibi_slopes")) is not None:
        logits = logits - slopes.to(logits.dtype).reshape(-1, query.shape[1], 1, 1) * (position - j).abs()
    seen = (j < used).expand(logits.shape)
    if (mask := arguments.get("attn_mask")) is not None:
        if mask.dtype == torch.bool:
            seen = seen & mask
        else:
            logits = logits + mask
    left, right = arguments.get("window_size", (-1, -1))
    if arguments.get("is_causal"):
        seen = seen & (j <= position)
    if left >= 0:
        seen = seen & (j >= position - left)
    if right >= 0:
        seen = seen & (j <= position + right)
    sinks = arguments.get("sinks")
    sinks = torch.full(query.shape[1:2], -INF, dtype=logits.dtype) if sinks is None else sinks
    sinks = sinks[:, None, None].expand(*logits.shape[:-1], 1)
    everything = torch.cat([logits.masked_fill(~seen, -INF), sinks.to(logits.dtype)], -1)
    top = everything.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -INF, 0)
    weights = torch.exp(everything - top)
    total = weights.sum(-1, keepdim=True)
    nothing = total == 0
    out = (weights / total.masked_fill(nothing, 1))[..., :-1] @ value
    lse = (torch.log(total.masked_fill(nothing, 1)) + top).masked_fill(nothing, -INF)
    return out, lse[..., 0]


def differentiated(
    call: Callable[..., Any], dtype: torch.dtype, tensors: list[Tensor], arguments: dict[str, Any]
) -> Any:
    """Return (out, lse, gradients by name) of `call` on copies of the arguments in `dtype`."""
    named = dict(zip(("query", "key", "value"), tensors, strict=True)) | arguments
    leaves = {
        name: tensor.to(dtype).detach().requires_grad_()
        for name, tensor in named.items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and name != "alibi_slopes"
    }
    out, lse = call(**(named | leaves))
    weights, lse_weights = random(*out.shape, seed=3).half(), random(*lse.shape, seed=4).float()
    loss = (out.double() * weights).sum() + (lse.double() * lse_weights).masked_fill(lse == -INF, 0).sum()
    loss.backward()
    return out, lse, {name: leaf.grad for name, leaf in leaves.items()}


def assert_call_right(tensors: list[Tensor], dtype: torch.dtype = torch.float32, **arguments: Any) -> None:
    def call(**named: Any) -> Any:
        return attnplug.scaled_dot_product_attention(**named, enable_gqa=True, return_lse=True, impl="flash_triton")

    rounded = [tensor.to(dtype).double() for tensor in tensors]
    for name, argument in arguments.items():
        if isinstance(argument, Tensor) and argument.dtype == torch.float64:
            arguments[name] = argument.to(dtype).double()
    out, lse, grads = differentiated(call, dtype, rounded, arguments)
    ref_out, _, ref_grads = differentiated(formula, torch.float64, rounded, arguments)
    low_out, _, low_grads = differentiated(formula, dtype, rounded, arguments)
    by_numpy, lse_by_numpy = expected(*rounded, **arguments, enable_gqa=True)
    assert_right(out.detach(), by_numpy, low_out.detach())
    assert_lse_right(lse.detach(), lse_by_numpy, dtype)
    np.testing.assert_allclose(ref_out.detach(), by_numpy, atol=1e-9)
    for name, grad in grads.items():
        assert_right(grad, ref_grads[name], low_grads[name], GRADIENT)


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


def test_strided_inputs_are_right() -> None:
    tokens = random(2, QUERIES, 3, 2, 16)
    query, key, value = (tensor.transpose(1, 2) for tensor in tokens.float().unbind(2))
    out = attnplug.scaled_dot_product_attention(query, key, value, is_causal=True, impl="flash_triton")
    copies = [tensor.contiguous() for tensor in (query, key, value)]
    assert torch.equal(out, attnplug.scaled_dot_product_attention(*copies, is_causal=True, impl="flash_triton"))


def test_rows_that_are_not_contiguous_are_right() -> None:
    query, key, value = (tensor.float() for tensor in inputs(size=16))
    strided = query.mT.contiguous().mT
    assert strided.stride(-1) != 1
    out = attnplug.scaled_dot_product_attention(strided, key, value, enable_gqa=True, impl="flash_triton")
    same = attnplug.scaled_dot_product_attention(query, key, value, enable_gqa=True, impl="flash_triton")
    assert torch.equal(out, same)


def test_gradients_of_rows_that_are_not_contiguous_are_right() -> None:
    """A gradient laid out as such an input is would have rows that a kernel cannot write."""
    wide = [tensor.float() for tensor in inputs(size=16)]
    results = []
    for lay_out in (lambda tensor: tensor.mT.contiguous().mT, lambda tensor: tensor):
        leaves = [lay_out(tensor).detach().requires_grad_() for tensor in wide]
        out = attnplug.scaled_dot_product_attention(*leaves, enable_gqa=True, impl="flash_triton")
        results.append(torch.autograd.grad(out.square().sum(), leaves))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


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


def test_two_threads_do_not_disturb_each_other() -> None:
    """Triton's interpreter keeps the program at work in a variable of the process."""
    calls = [[tensor.float() for tensor in inputs(queries=queries, size=16)] for queries in (20, 50)]

    def attend(tensors: list[Tensor]) -> Tensor:
        return attnplug.scaled_dot_product_attention(*tensors, enable_gqa=True, impl="flash_triton")

    wanted = [attend(tensors) for tensors in calls]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(attend, calls * 2))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted * 2, strict=True))


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


def test_expanded_gradient_of_out_is_right() -> None:
    query, key, value = (tensor.float().requires_grad_() for tensor in inputs())
    out = attnplug.scaled_dot_product_attention(query, key, value, enable_gqa=True, impl="flash_triton")
    out.sum().backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    formula(*wide)[0].sum().backward()
    for tensor, ref in zip((query, key, value), wide, strict=True):
        torch.testing.assert_close(tensor.grad.double(), ref.grad, atol=1e-5, rtol=1e-4)


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


def test_repeated_runs_give_equal_bits() -> None:
    def run() -> list[Tensor]:
        leaves = [tensor.float().requires_grad_() for tensor in inputs(heads=4, kv_heads=2)]
        out = attnplug.scaled_dot_product_attention(*leaves, enable_gqa=True, impl="flash_triton")
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def drop(query: Tensor, key: Tensor, value: Tensor, dropout: float, **arguments: Any) -> Any:
    return attnplug.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, enable_gqa=True, return_lse=True, impl="flash_triton", **arguments
    )


def dropout_factors(query: Tensor, key: Tensor, dropout: float, seed: int) -> Tensor:
    """Read the factors that dropout applies off the result for values that are the unit matrix."""
    keys = key.shape[2]
    unit = torch.eye(keys).expand(*key.shape[:2], keys, keys)
    torch.manual_seed(seed)
    dropped = drop(query, key, unit, dropout)[0]
    return dropped / drop(query, key, unit, 0.0)[0]


def test_dropout_zeroes_its_share_and_scales_the_rest() -> None:
    query, key, _ = (tensor.float() for tensor in inputs(size=16))
    factors = dropout_factors(query, key, 0.3, seed=5)
    kept = factors > 0
    torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / 0.7))
    assert abs(kept.float().mean().item() - 0.7) < 0.05
    assert not torch.equal(kept[:, 0], kept[:, 1])
    assert torch.equal(factors, dropout_factors(query, key, 0.3, seed=5))
    assert not torch.equal(factors, dropout_factors(query, key, 0.3, seed=6))


def test_backward_of_dropout_uses_the_forward_mask() -> None:
    tensors = inputs(size=16)
    query, key, value = (tensor.float().requires_grad_() for tensor in tensors)
    factors = dropout_factors(query.detach(), key.detach(), 0.4, seed=7)
    mask = random(1, 1, QUERIES, KEYS, seed=9).float().requires_grad_()
    torch.manual_seed(7)
    out, lse = drop(query, key, value, 0.4, attn_mask=mask)
    grads = torch.autograd.grad(out.sum() + lse.sum(), (query, key, value, mask))
    wide = [tensor.detach().double().requires_grad_() for tensor in (query, key, value, mask)]
    logits = wide[0] @ wide[1].mT * 0.25 + wide[3]
    ref = (logits.softmax(-1) * factors.double()) @ wide[2]
    ref_grads = torch.autograd.grad(ref.sum() + logits.logsumexp(-1).sum(), wide)
    torch.testing.assert_close(out.double(), ref, atol=1e-5, rtol=1e-4)
    for grad, ref_grad in zip(grads, ref_grads, strict=True):
        torch.testing.assert_close(grad.double(), ref_grad, atol=1e-5, rtol=1e-4)


def test_dropout_of_everything_gives_zero() -> None:
    query, key, value = (tensor.float() for tensor in inputs(size=16))
    out, lse = drop(query, key, value, 1.0)
    assert not out.any() and lse.isfinite().all()


VARLEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window, softcap, sinks": {"window_size": (6, 2), "softcap": 2.0, "sinks": random(2).float()},
    "alibi, used keys": {"alibi_slopes": torch.rand(4, 2), "seqused_k": torch.tensor([3, 0, 18, 0], dtype=torch.int32)},
}


@pytest.mark.parametrize("case", VARLEN)
def test_packed_sequences_are_right(case: str) -> None:
    """Lengths of zero among them, and tokens that belong to no sequence at the end."""
    arguments = VARLEN[case]
    lengths_q, lengths_k = (5, 18, 20, 0), (7, 0, 20, 4)
    bounds_q, bounds_k = (
        torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32) for x in (lengths_q, lengths_k)
    )
    leaves = [random(45, 2, 16), random(33, 1, 16, seed=1), random(33, 1, 12, seed=2)]
    leaves = [tensor.float().requires_grad_() for tensor in leaves]
    out, lse = attnplug.varlen_attn(
        *leaves, bounds_q, bounds_k, 20, 20, enable_gqa=True, return_lse=True, impl="flash_triton", **arguments
    )
    seen = lse > -INF
    weights = random(*out.shape, seed=3).float()
    grads = torch.autograd.grad((out * weights).sum() + lse[seen].sum(), leaves)
    assert not out[43:].any() and (lse[:, 43:] == -INF).all()

    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    loss = torch.zeros((), dtype=torch.float64)
    for b in range(4):
        if not lengths_q[b]:
            continue
        rows, columns = slice(bounds_q[b], bounds_q[b + 1]), slice(bounds_k[b], bounds_k[b + 1])
        one = dict(arguments, causal_variant=LOWER_RIGHT)
        for name in ("alibi_slopes", "seqused_k"):
            if name in one:
                one[name] = one[name][b : b + 1]
        parts = [wide[0][rows], wide[1][columns], wide[2][columns]]
        ref, ref_lse = formula(*(part.transpose(0, 1)[None] for part in parts), **one)
        torch.testing.assert_close(out[rows].double(), ref[0].transpose(0, 1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(lse[:, rows].double(), ref_lse[0], atol=1e-5, rtol=1e-4)
        loss = loss + (ref[0].transpose(0, 1) * weights[rows]).sum() + ref_lse[ref_lse > -INF].sum()
    for grad, ref_grad in zip(grads, torch.autograd.grad(loss, wide), strict=True):
        torch.testing.assert_close(grad.double(), ref_grad, atol=1e-5, rtol=1e-4)


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


def test_dropout_of_few_queries_is_that_of_backward() -> None:
    query, key, value = (tensor.float().requires_grad_() for tensor in inputs(heads=4, queries=3, keys=100, size=16))
    factors = dropout_factors(query.detach(), key.detach(), 0.4, seed=7)
    torch.manual_seed(7)
    out, _ = drop(query, key, value, 0.4)
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    wide = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    ref = ((wide[0] @ wide[1].mT * 0.25).softmax(-1) * factors.double()) @ wide[2]
    for grad, ref_grad in zip(grads, torch.autograd.grad(ref.sum(), wide), strict=True):
        torch.testing.assert_close(grad.double(), ref_grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("longest", [4, 20])
def test_paged_keys_are_right_whatever_memory_outside_holds(page_size: int, longest: int) -> None:
    used = torch.tensor([7, 40, 0], dtype=torch.int32)
    blocks = -(-40 // page_size)
    table = torch.randperm(3 * blocks, generator=torch.Generator().manual_seed(1)).reshape(3, blocks).int()
    key, value = (torch.full((3 * blocks, page_size, 2, size), float("nan")) for size in (16, 12))
    sequences = []
    for b in range(3):
        rows = [random(int(used[b]), 2, size, seed=b).float() for size in (16, 12)]
        sequences.append(rows)
        for at in range(int(used[b])):
            for pages, row in zip((key, value), rows, strict=True):
                pages[table[b, at // page_size], at % page_size] = row[at]
    table[0, -(-7 // page_size) :] = 10**6  # never looked up
    bounds = torch.tensor([0, longest, longest + 3, longest + 5], dtype=torch.int32)
    query = random(longest + 5, 4, 16).float()
    out, lse = attnplug.varlen_attn(
        *(query, key, value, bounds, None, longest, 40),
        seqused_k=used,
        block_table=table,
        is_causal=True,
        enable_gqa=True,
        return_lse=True,
        impl="flash_triton",
    )
    for b in range(3):
        rows = slice(bounds[b], bounds[b + 1])
        parts = [query[rows].double(), *(row.double() for row in sequences[b])]
        if not used[b]:
            assert not out[rows].any() and (lse[:, rows] == -INF).all()
            continue
        heads_first = (part.transpose(0, 1)[None] for part in parts)
        ref, ref_lse = formula(*heads_first, is_causal=True, causal_variant=LOWER_RIGHT)
        torch.testing.assert_close(out[rows].double(), ref[0].transpose(0, 1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(lse[:, rows].double(), ref_lse[0], atol=1e-5, rtol=1e-4)


def test_gradients_of_pages_are_declined_with_the_reason() -> None:
    pages, bounds = torch.randn(2, 4, 1, 16, requires_grad=True), torch.tensor([0, 2], dtype=torch.int32)
    arguments = {"seqused_k": torch.tensor([3], dtype=torch.int32), "block_table": torch.zeros(1, 1, dtype=torch.int32)}
    with pytest.raises(attnplug.NoImplementationError, match="no gradients for paged"):
        attnplug.varlen_attn(torch.randn(2, 1, 16), pages, pages, bounds, None, 2, 3, impl="flash_triton", **arguments)


def test_bfloat16_is_declined_with_the_reason() -> None:
    query = torch.randn(1, 1, 4, 16, dtype=torch.bfloat16)
    with pytest.raises(attnplug.NoImplementationError, match=r"does not support bfloat16 \(only float16, float32\)"):
        attnplug.scaled_dot_product_attention(query, query, query, impl="flash_triton")


def test_value_head_size_beyond_the_kernels_is_declined() -> None:
    query, value = torch.randn(1, 1, 4, 16), torch.randn(1, 1, 4, 300)
    with pytest.raises(attnplug.NoImplementationError, match="value head size 300"):
        attnplug.scaled_dot_product_attention(query, query, value, impl="flash_triton")


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (torch.randn(1, 1, 4, 16, dtype=torch.float64), "does not support float64"),
        (torch.randn(1, 1, 4, 4), "head size 4 is below 8"),
        (torch.randn(1, 1, 4, 512), "head size 512 is above 256"),
    ],
)
def test_what_the_kernels_do_not_do_is_declined_with_the_reason(query: Tensor, reason: str) -> None:
    with pytest.raises(attnplug.NoImplementationError, match=reason):
        attnplug.scaled_dot_product_attention(query, query, query, impl="flash_triton")
