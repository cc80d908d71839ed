"""math_ref does all that the contract says of one call, and its gradients are those of what it computes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import attnplug
from accuracy import GRADIENT, assert_lse_right, assert_right, plain
from attnplug import CausalVariant, Feature
from reference import attention as expected

LOWER_RIGHT = CausalVariant.LOWER_RIGHT
INF = float("inf")


def sdpa(*args: Any, **kwargs: Any) -> Any:
    return attnplug.scaled_dot_product_attention(*args, impl="math_ref", **kwargs)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def inputs(batch: int = 2, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    shapes = (batch, heads, 3, 3), (batch, kv_heads, 5, 3), (batch, kv_heads, 5, 2)
    return [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


SEEN = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool).view(1, 1, 3, 5)
HIDING = torch.zeros(1, 1, 3, 5, dtype=torch.float64).masked_fill(~SEEN, -INF)
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.7},
    "boolean mask that hides a row": {"attn_mask": SEEN},
    "additive mask": {"attn_mask": random(2, 1, 3, 5)},
    "additive mask for all queries": {"attn_mask": random(4, 1, 5)},
    "additive mask of -inf": {"attn_mask": HIDING},
    "causal": {"is_causal": True},
    "causal and mask": {"is_causal": True, "attn_mask": random(3, 5)},
    "causal, lower right": {"is_causal": True, "causal_variant": LOWER_RIGHT},
    "window": {"window_size": (1, 0)},
    "window, lower right, one side": {"window_size": (-1, 0), "causal_variant": LOWER_RIGHT},
    "window ahead": {"window_size": (0, 2)},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": random(4)},
    "sinks and a hidden row": {"sinks": random(4), "attn_mask": SEEN},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
    "alibi for each sequence, lower right": {"alibi_slopes": torch.rand(2, 4), "causal_variant": LOWER_RIGHT},
    "seqused_k": {"seqused_k": int32(0, 3), "is_causal": True},
    "seqused_k, lower right": {"seqused_k": int32(4, 2), "is_causal": True, "causal_variant": LOWER_RIGHT},
    "everything": {
        "attn_mask": random(2, 4, 3, 5),
        "sinks": random(4),
        "softcap": 2.0,
        "window_size": (2, 1),
        "is_causal": True,
        "causal_variant": LOWER_RIGHT,
        "alibi_slopes": torch.rand(4),
        "seqused_k": int32(5, 2),
    },
}
each_feature = pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES.keys())


@each_feature
def test_each_feature_gives_what_its_formula_says(options: dict[str, Any]) -> None:
    out, lse = sdpa(*inputs(), enable_gqa=True, return_lse=True, **options)
    ref_out, ref_lse = expected(*inputs(), enable_gqa=True, **options)
    np.testing.assert_allclose(out.detach(), ref_out, rtol=1e-12, atol=1e-13)
    assert_lse_right(lse, ref_lse, torch.float64)


@each_feature
def test_first_and_second_derivatives_are_those_of_the_result(options: dict[str, Any]) -> None:
    tensors, function = differentiable(inputs(1, 2, 1) if fits_one(options) else inputs(), options)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def fits_one(options: dict[str, Any]) -> bool:
    """Whether the options do not ask for two sequences or four heads; smaller is faster."""
    shapes = [option.shape for option in options.values() if isinstance(option, Tensor)]
    return all(shape[-4:] == (1, 1, 3, 5) or shape == (3, 5) for shape in shapes)


def differentiable(tensors: list[Tensor], options: dict[str, Any]) -> tuple[list[Tensor], Callable[..., Any]]:
    """Return the inputs that have gradients, and out and the finite part of lse as a function of them."""
    names = [name for name, option in options.items() if isinstance(option, Tensor) and option.requires_grad]

    def function(query: Tensor, key: Tensor, value: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        given = {**options, **dict(zip(names, more, strict=True))}
        out, lse = sdpa(query, key, value, enable_gqa=True, return_lse=True, **given)
        return out, lse.masked_fill(lse == -INF, 0)

    return [*tensors, *(options[name] for name in names)], function


@settings(max_examples=25)
@given(st.data())
def test_features_combine_as_the_formulas_do(data: st.DataObject) -> None:
    size = st.integers(1, 7)
    batch, kv_heads, group = (data.draw(st.integers(1, 3), name) for name in ("batch", "kv heads", "group"))
    queries, keys = data.draw(size, "queries"), data.draw(size, "keys")
    heads = kv_heads * group
    query = random(batch, heads, queries, data.draw(size, "head size"))
    key = random(batch, kv_heads, keys, query.shape[3], seed=1)
    value = random(batch, kv_heads, keys, data.draw(size, "value head size"), seed=2)
    mask_shape = [data.draw(st.sampled_from((1, full))) for full in (batch, heads, queries, keys)]
    bias = random(*mask_shape, seed=3)
    options = {
        "attn_mask": data.draw(st.sampled_from((None, bias, bias > 0, bias.masked_fill(bias > 0, -INF)))),
        "is_causal": data.draw(st.booleans()),
        "causal_variant": data.draw(st.sampled_from(CausalVariant)),
        "window_size": (data.draw(st.integers(-1, 3)), data.draw(st.integers(-1, 3))),
        "softcap": data.draw(st.sampled_from((0.0, 0.8))),
        "sinks": data.draw(st.sampled_from((None, random(heads)))),
        "alibi_slopes": data.draw(st.sampled_from((None, torch.rand(heads), torch.rand(batch, heads)))),
        "seqused_k": data.draw(st.sampled_from((None, int32(*range(keys, keys - batch, -1)).clamp(min=0)))),
    }
    out, lse = sdpa(query, key, value, enable_gqa=True, return_lse=True, **options)
    ref_out, ref_lse = expected(query, key, value, enable_gqa=True, **options)
    np.testing.assert_allclose(out.detach(), ref_out, rtol=1e-10, atol=1e-12)
    assert_lse_right(lse, ref_lse, torch.float64)
    grads = torch.autograd.grad(out.sum() + lse[lse > -INF].sum(), (query, key, value))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_low_precision_is_as_accurate_as_the_contract_asks(dtype: torch.dtype, masked: bool) -> None:
    shapes = [(2, 4, 65, 64), (2, 4, 113, 64), (2, 4, 113, 64), (2, 1, 65, 113)]
    shapes = shapes if masked else shapes[:3]
    tensors = [random(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    out, lse = sdpa(*tensors, return_lse=True)
    low, ref = plain(*tensors), F.scaled_dot_product_attention(*wide)
    assert_right(out, ref, low)
    assert_lse_right(lse, expected(*wide)[1], dtype)
    grad_out = random(*out.shape, dtype=dtype).detach()
    grads, low_grads, ref_grads = (
        torch.autograd.grad(result, given, grad_out.to(result.dtype))
        for result, given in ((out, tensors), (low, tensors), (ref, wide))
    )
    for actual, ref_grad, low_grad in zip(grads, ref_grads, low_grads, strict=True):
        assert_right(actual, ref_grad, low_grad, GRADIENT)


@pytest.mark.parametrize("shape", [(2, 4, 2, 300, 300), (1, 4, 2, 512, 520), (1, 2, 1, 40, 20_000)])
def test_a_call_of_many_parts_equals_pytorch(shape: tuple[int, ...]) -> None:
    """So many logits that they are computed a few sequences, heads or queries at a time."""
    batch, heads, kv_heads, queries, keys = shape
    query, key = random(batch, heads, queries, 8), random(batch, kv_heads, keys, 8)
    value, bias, sinks = random(batch, kv_heads, keys, 4), random(1, heads, 1, keys), random(heads)
    tensors = (query, key, value, bias, sinks)
    options = {"is_causal": True, "causal_variant": LOWER_RIGHT, "enable_gqa": True}
    actual = sdpa(query, key, value, bias, sinks=sinks, **options)

    # A sink is a key that is zero, whose bias is the sink and whose value is zero.
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    full = bias.expand(batch, heads, queries, keys).masked_fill(~seen, -INF)
    full = torch.cat([full, sinks.view(1, heads, 1, 1).expand(batch, heads, queries, 1)], dim=-1)
    key_0, value_0 = (F.pad(tensor, (0, 0, 0, 1)) for tensor in (key, value))
    ref = F.scaled_dot_product_attention(query, key_0, value_0, full, enable_gqa=True)
    torch.testing.assert_close(actual, ref)

    def first(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out.cos().sum(), tensors, create_graph=True)

    def second(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum((grad**2).sum() for grad in grads), tensors)

    grads, ref_grads = first(actual), first(ref)
    torch.testing.assert_close(grads, ref_grads)
    torch.testing.assert_close(second(grads), second(ref_grads))


@pytest.mark.parametrize("hidden", ["boolean mask", "mask of -inf", "causal", "no key used"])
def test_rows_that_see_no_key_give_zero(hidden: str) -> None:
    query, key, value = inputs(1, 1, 1)
    mask = torch.zeros(1, 1, 3, 5, dtype=torch.float64, requires_grad=True)
    if hidden == "mask of -inf":
        mask = HIDING.clone().requires_grad_()
    options: dict[str, Any] = {"attn_mask": mask}
    if hidden == "boolean mask":
        options = {"attn_mask": SEEN}
    elif hidden == "causal":
        key, value = key[:, :, :1], value[:, :, :1]
        options = {"is_causal": True, "causal_variant": LOWER_RIGHT}
    elif hidden == "no key used":
        options["seqused_k"] = int32(0)
    out, lse = sdpa(query, key, value, return_lse=True, **options)
    assert out[0, 0, 1].tolist() == [0, 0]
    assert lse[0, 0, 1] == -INF

    # What comes back for such a row may be NaN: the derivative of log(exp(-inf)), for one.
    grad_out, grad_lse = torch.ones_like(out), torch.ones_like(lse)
    grad_out[0, 0, 1], grad_lse[0, 0, 1] = torch.nan, torch.nan
    wanted = [query, key, value, *([mask] if options.get("attn_mask") is mask else [])]
    grads = torch.autograd.grad((out, lse), wanted, (grad_out, grad_lse), create_graph=True)
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][0, 0, 1].any()
    assert not any(grad[0, 0, 1].any() for grad in grads[3:])
    for again in torch.autograd.grad(sum((grad**2).sum() for grad in grads), wanted):
        assert again.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_logits_do_not_overflow(dtype: torch.dtype) -> None:
    query, key, value = (random(1, 2, 8, 64, seed=seed, dtype=dtype) for seed in range(3))
    out, lse = sdpa(query * 100, key * 100, value, return_lse=True)
    assert lse.abs().max() > 1000
    grads = torch.autograd.grad(out.sum() + lse.sum(), (query, key, value))
    assert all(tensor.isfinite().all() for tensor in (out, lse, *grads))


def test_what_unused_keys_hold_reaches_no_result_and_no_gradient() -> None:
    query, key, value = inputs(2, 2, 2)
    mask = random(2, 1, 3, 5)
    used = int32(2, 5)
    poisoned = [tensor.detach().clone() for tensor in (query, key, value, mask)]
    poisoned[1][0, :, 2:], poisoned[2][0, :, 2:], poisoned[3][0, ..., 2:] = torch.nan, INF, torch.nan
    results = []
    for tensors in ((query, key, value, mask), [tensor.requires_grad_() for tensor in poisoned]):
        out, lse = sdpa(*tensors, seqused_k=used, is_causal=True, causal_variant=LOWER_RIGHT, return_lse=True)
        results.append((out, lse, *torch.autograd.grad(out.sin().sum() + lse[lse > -INF].sum(), tensors)))
    clean, actual = results
    torch.testing.assert_close(actual, clean, rtol=0, atol=0)
    assert not actual[3][0, :, 2:].any() and not actual[4][0, :, 2:].any()


def test_repeated_runs_give_equal_bits() -> None:
    tensors = [random(2, 2, 70, 16, dtype=torch.float16) for _ in range(3)]
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        out = sdpa(*tensors, dropout_p=0.1)
        runs.append((out, *torch.autograd.grad(out.sum(), tensors)))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_dense_forward_traces_in_one_graph_for_every_length() -> None:
    from torch._dynamo.testing import CompileCounter

    def function(query: Tensor, key: Tensor) -> Tensor:
        options = {"is_causal": True, "causal_variant": LOWER_RIGHT, "window_size": (3, 0), "softcap": 2.0}
        return sdpa(query, key, key, **options)

    counter = CompileCounter()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for queries, keys in ((3, 5), (4, 6), (7, 9), (20, 40)):
        query, key = random(2, 2, queries, 8).detach(), random(2, 2, keys, 8).detach()
        torch.testing.assert_close(compiled(query, key), function(query, key))
    assert counter.frame_count <= 2


def test_compiled_gradients_are_those_of_eager() -> None:
    query, key, value = inputs()
    tensors = (query, key, value, FEATURES["everything"]["attn_mask"], FEATURES["everything"]["sinks"])

    def function(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
        options = {**FEATURES["everything"], "attn_mask": mask, "sinks": sinks}
        return sdpa(query, key, value, enable_gqa=True, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(run(*tensors).sin().sum(), tensors) for run in (compiled, function)]
    torch.testing.assert_close(*results)


def test_a_small_call_writes_into_nothing() -> None:
    """A checkpoint may save what every operator returns, and a function may be functionalized, then differentiated."""
    query = torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True)

    def attended(query: Tensor) -> Tensor:
        return sdpa(query, query, query, is_causal=True).sin().sum()

    (expected,) = torch.autograd.grad(attended(query), query)
    saving = partial(create_selective_checkpoint_contexts, lambda *given, **options: CheckpointPolicy.MUST_SAVE)
    out = checkpoint(attended, query, use_reentrant=False, context_fn=saving)
    torch.testing.assert_close(torch.autograd.grad(out, query)[0], expected)
    torch.testing.assert_close(torch.func.grad(torch.func.functionalize(attended))(query.detach()), expected)


@pytest.mark.parametrize("rows", [2**19, 4])
def test_vmap_may_have_a_dimension_of_one_input_alone(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnplug_math_ref.blocks._LOGITS", rows)  # one part, and several
    query, key, value = inputs()
    mask = random(3, 5)
    given: list[Tensor] = [query, key, value, mask]
    for position in range(4):
        many = [torch.stack([tensor, tensor * 2]) if each == position else tensor for each, tensor in enumerate(given)]
        dims = tuple(0 if each == position else None for each in range(4))
        mapped = torch.vmap(lambda *tensors: sdpa(*tensors, enable_gqa=True), dims)(*many)
        for row in range(2):
            one = [tensor[row] if each == position else tensor for each, tensor in enumerate(many)]
            torch.testing.assert_close(mapped[row], sdpa(*one, enable_gqa=True))
    out = sdpa(*given, enable_gqa=True)
    directions = torch.stack([torch.ones_like(out), torch.arange(out.numel()).view(out.shape).double()])
    batched = torch.autograd.grad(out, given, directions, is_grads_batched=True, retain_graph=True)
    for row in range(2):
        expected_row = torch.autograd.grad(out, given, directions[row], retain_graph=True)
        torch.testing.assert_close([each[row] for each in batched], list(expected_row))


def test_only_nested_tensors_are_left_out() -> None:
    (record,) = (record for record in attnplug.list_impls() if record.name == "math_ref")
    assert set(Feature) - record.capabilities.features == {Feature.NESTED}
    assert record.backend == attnplug.SDPBackend.MATH
    assert record.distribution == "attnplug-math-ref"


def test_announcing_the_plugin_imports_no_torch() -> None:
    code = "import sys, attnplug_math_ref as p; p.attnplug_register_impls(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
