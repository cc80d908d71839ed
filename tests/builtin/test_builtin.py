"""The built-in implementations give what the contract's formulas give, wherever they accept a call."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.testing._internal.common_methods_invocations import op_db

import attnplug
from accuracy import GRADIENT, assert_lse_right, assert_right, plain, plain_in_each_order
from reference import attention

BUILTIN = ("torch", "aten_flash", "aten_math")
# PyTorch's samples reach 9, so that their logits, and with them the rounding of any other order, reach 200.
CLOSE = dict(atol=5e-4, rtol=1e-4)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def additive(mask: torch.Tensor | None, is_causal: bool, queries: int, keys: int) -> torch.Tensor | None:
    """Return everything that hides keys as one mask in float64."""
    total = torch.zeros(queries, keys, dtype=torch.float64)
    if is_causal:
        total.masked_fill_(torch.ones(queries, keys, dtype=torch.bool).triu(1), float("-inf"))
    if mask is None:
        return total
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    return total + mask


@pytest.mark.parametrize("impl", BUILTIN)
@settings(max_examples=40)
@given(data=st.data())
def test_forward_is_right_for_every_call_that_is_accepted(impl: str, data: st.DataObject) -> None:
    sizes = st.integers(1, 9)
    batch, kv_heads, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    queries, keys, size, value_size = (data.draw(sizes) for _ in range(4))
    dtype = data.draw(st.sampled_from(DTYPES))
    kind = data.draw(st.sampled_from(["none", "bool", "floating"]))
    is_causal = data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    heads = kv_heads * groups
    broadcast = [data.draw(st.sampled_from([1, full])) for full in (batch, heads, queries, keys)]

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    outs, refs, lows = [], [], []
    for _ in range(16):  # a call may be one number, whose error is a matter of luck
        query = make(batch, heads, queries, size)
        key, value = make(batch, kv_heads, keys, size), make(batch, kv_heads, keys, value_size)
        mask = None
        if kind != "none":
            mask = make(*broadcast) if kind == "floating" else torch.rand(broadcast, generator=generator) > 0.4
        arguments = dict(attn_mask=mask, is_causal=is_causal, enable_gqa=True)
        if not attnplug.explain(query, key, value, **arguments, impl=impl).chosen:
            return
        outs.append(attnplug.scaled_dot_product_attention(query, key, value, **arguments, impl=impl))
        refs.append(torch.from_numpy(attention(query, key, value, **arguments)[0]))
        expanded = [tensor.repeat_interleave(groups, 1) for tensor in (key, value)]
        hidden = additive(mask, is_causal, queries, keys).to(dtype)
        lows.append(tuple(each.nan_to_num(0.0) for each in plain_in_each_order(query, *expanded, hidden)))
    out, ref = torch.stack(outs), torch.stack(refs)
    if dtype == torch.float64:  # the reference is no better than what it judges
        torch.testing.assert_close(out, ref)
    else:
        assert_right(out, ref, tuple(map(torch.stack, zip(*lows, strict=True))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_flash_gives_the_lse_of_every_row(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 3, 5, 8).to(dtype) for _ in range(3))
    mask = torch.rand(2, 1, 5, 5) > 0.5
    mask[0, :, 2] = False
    for arguments in ({}, {"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask, "is_causal": True}):
        _, lse = attnplug.scaled_dot_product_attention(
            query, key, value, **arguments, return_lse=True, impl="aten_flash"
        )
        _, ref = attention(query, key, value, **arguments)
        assert_lse_right(lse, ref, dtype)


@pytest.mark.parametrize("impl", BUILTIN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_are_right(impl: str, dtype: torch.dtype, is_causal: bool) -> None:
    tensors = [torch.randn(2, 2, n, 8).to(dtype) for n in (7, 9, 9)]
    grad_out = torch.randn(2, 2, 7, 8).to(dtype)

    def gradients(function: object, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(function(*leaves), leaves, grad_out.to(inputs[0].dtype))

    def formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return plain(query, key, value, additive(None, is_causal, 7, 9).to(query.dtype))

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attnplug.scaled_dot_product_attention(query, key, value, is_causal=is_causal, impl=impl)

    ref = gradients(formula, *(tensor.double() for tensor in tensors))
    low = gradients(formula, *tensors)
    for actual, right, plainly in zip(gradients(call, *tensors), ref, low, strict=True):
        if dtype == torch.float64:  # the reference is no better than what it judges
            torch.testing.assert_close(actual, right)
        else:
            assert_right(actual, right, plainly, GRADIENT)


def test_flash_never_drops_the_tangent_of_a_mask() -> None:
    query = torch.randn(1, 2, 4, 8)
    mask = torch.nn.Parameter(torch.randn(4, 4))

    def attend(each: torch.Tensor) -> torch.Tensor:
        return attnplug.scaled_dot_product_attention(query, query, query, each, impl="aten_flash")

    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(attend, (mask.detach(),), (mask.detach(),))
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward AD"):
        attend(forward_ad.make_dual(mask, mask.detach()))


@pytest.mark.parametrize("impl", [None, "torch", "aten_math"])
def test_a_mask_may_be_a_parameter(impl: str | None) -> None:
    query = torch.randn(1, 2, 4, 8)
    mask = torch.nn.Parameter(torch.randn(4, 4))
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, query, mask)
    for _ in range(2):
        torch.testing.assert_close(
            attnplug.scaled_dot_product_attention(query, query, query, mask, impl=impl), expected
        )


@pytest.mark.parametrize("impl", ["torch", "aten_math"])
def test_the_mask_gets_its_gradient(impl: str) -> None:
    query, key, value = (torch.randn(2, 2, 4, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.randn(1, 2, 1, 4, dtype=torch.float64, requires_grad=True)

    def call(mask: torch.Tensor) -> torch.Tensor:
        return attnplug.scaled_dot_product_attention(query, key, value, mask, impl=impl)

    assert torch.autograd.gradcheck(call, (mask,))


@pytest.mark.parametrize("impl", ["torch", "aten_math", "aten_flash"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_pytorch_s_own_samples_give_pytorch_s_results(impl: str, requires_grad: bool) -> None:
    info = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    for sample in info.sample_inputs("cpu", torch.float32, requires_grad=requires_grad):
        arguments = (sample.input, *sample.args)
        if not attnplug.explain(*arguments, **sample.kwargs, impl=impl).chosen:
            continue
        torch.manual_seed(0)
        expected = torch.nn.functional.scaled_dot_product_attention(*arguments, **sample.kwargs)
        torch.manual_seed(0)
        actual = attnplug.scaled_dot_product_attention(*arguments, **sample.kwargs, impl=impl)
        assert actual.shape == expected.shape
        if sample.kwargs.get("dropout_p"):  # another implementation draws differently
            continue
        torch.testing.assert_close(actual, expected, **CLOSE)
        if requires_grad:
            grad = torch.randn_like(expected)
            for one, other in zip(
                torch.autograd.grad(actual, arguments, grad),
                torch.autograd.grad(expected, arguments, grad),
                strict=True,
            ):
                torch.testing.assert_close(one, other, **CLOSE)


def test_the_default_is_pytorch_s_function_bit_for_bit() -> None:
    info = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    for sample in info.sample_inputs("cpu", torch.float32):
        torch.manual_seed(0)
        expected = torch.nn.functional.scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs)
        for impl in (None, "torch"):
            torch.manual_seed(0)
            actual = attnplug.scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs, impl=impl)
            assert torch.equal(actual, expected)


def test_nested_tensors_run_as_they_do_in_pytorch() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, n, 8) for n in (3, 5)])
    expected = torch.nn.functional.scaled_dot_product_attention(nested, nested, nested)
    actual = attnplug.scaled_dot_product_attention(nested, nested, nested)
    assert all(torch.equal(one, other) for one, other in zip(actual.unbind(), expected.unbind(), strict=True))
    with pytest.raises(attnplug.NoImplementationError, match="nested tensors"):
        attnplug.scaled_dot_product_attention(nested, nested, nested, impl="aten_math")


@pytest.mark.parametrize("variant", ["upper_left", "lower_right"])
def test_pytorch_s_causal_bias_is_a_mask(variant: str) -> None:
    from torch.nn.attention import bias

    query, key, value = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    mask = getattr(bias, f"causal_{variant}")(3, 5)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    with attnplug.sdpa_kernel(["torch", "math_ref"]):
        actual = attnplug.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", BUILTIN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_it_does_for_pytorch_s_function(impl: str, dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype):
        out = attnplug.scaled_dot_product_attention(query, key, value, torch.zeros(6, 6), impl=impl)
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, torch.zeros(6, 6))
    assert out.dtype == expected.dtype == dtype
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert all(grad.dtype == torch.float32 for grad in grads)
    with torch.autocast("cpu", dtype):  # which leaves float64 alone
        out = attnplug.scaled_dot_product_attention(query.double(), key.double(), value.double(), impl=impl)
        expected = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert out.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (1, 0, 3, 8), (1, 2, 0, 8)])
def test_empty_inputs_give_empty_results(shape: tuple[int, ...]) -> None:
    query = torch.randn(shape, requires_grad=True)
    out = attnplug.scaled_dot_product_attention(query, query, query)
    assert out.shape == shape
    out.sum().backward()
    assert (query.grad == 0).all()


def test_no_keys_give_zero_and_a_lse_of_minus_infinity() -> None:
    query = torch.randn(1, 4, 3, 8, requires_grad=True)
    key = torch.randn(1, 2, 0, 8, requires_grad=True)
    arguments = dict(enable_gqa=True, return_lse=True)
    out, lse = attnplug.scaled_dot_product_attention(query, key, key, **arguments)
    assert out.shape == (1, 4, 3, 8) and (out == 0).all()
    assert lse.shape == (1, 4, 3) and (lse == -torch.inf).all()
    out.sum().backward()
    assert (query.grad == 0).all()
    sinks = torch.randn(4)
    _, lse = attnplug.scaled_dot_product_attention(query, key, key, sinks=sinks, **arguments)
    assert torch.equal(lse, sinks[None, :, None].expand(1, 4, 3))
    before = sinks.clone()
    lse.add_(1)  # the caller's own, as any result
    assert torch.equal(sinks, before)


def test_tokens_of_no_sequence_have_no_sink_where_no_sequence_has_a_key() -> None:
    query, nothing = torch.randn(5, 2, 8), torch.randn(0, 2, 8)
    starts = torch.tensor([0, 2, 3], dtype=torch.int32)
    sinks = torch.tensor([1.0, 2.0], requires_grad=True)
    _, lse = attnplug.varlen_attn(
        query, nothing, nothing, starts, torch.zeros_like(starts), 2, 0, sinks=sinks, return_lse=True
    )
    hidden = float("-inf")
    assert lse.tolist() == [[1.0, 1.0, 1.0, hidden, hidden], [2.0, 2.0, 2.0, hidden, hidden]]
    assert torch.autograd.grad(lse[:, :3].sum(), sinks)[0].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("name", ["attn_mask", "sinks"])
def test_no_keys_give_every_argument_a_gradient_of_zero(name: str) -> None:
    query, key = torch.randn(1, 4, 3, 8, dtype=torch.bfloat16), torch.randn(1, 4, 0, 8, dtype=torch.bfloat16)
    given = torch.full((3, 1) if name == "attn_mask" else (4,), -torch.inf, requires_grad=True)
    out = attnplug.scaled_dot_product_attention(query, key, key, **{name: given})
    assert out.dtype == query.dtype and (out == 0).all()
    out.sum().backward()
    assert (given.grad == 0).all()


def test_lse_without_a_gradient_says_so_instead_of_dropping_it() -> None:
    query = torch.randn(1, 2, 4, 8, requires_grad=True)
    out, lse = attnplug.scaled_dot_product_attention(query, query, query, return_lse=True, impl="aten_flash")
    with pytest.raises(attnplug.GradientError, match="aten_flash.*no gradient through lse"):
        (out.sum() + lse.sum()).backward()


def test_the_math_family_has_second_derivatives() -> None:
    inputs = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    with attnplug.sdpa_kernel("aten_math"):
        assert torch.autograd.gradgradcheck(attnplug.scaled_dot_product_attention, inputs)


@pytest.mark.parametrize("impl", [None, *BUILTIN])
def test_a_float32_mask_is_added_to_float64_logits(impl: str | None) -> None:
    """PyTorch's CPU kernel accepts such a mask and reads its bytes as float64."""
    query, key, value = (torch.randn(1, 2, 4, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.randn(4, 4)
    out = attnplug.scaled_dot_product_attention(query, key, value, mask, impl=impl)
    torch.testing.assert_close(out, torch.from_numpy(attention(query, key, value, mask)[0]))


@pytest.mark.parametrize("impl", [None, *BUILTIN])
@pytest.mark.parametrize("rank", [3, 4])
def test_a_mask_may_have_one_dimension(impl: str | None, rank: int) -> None:
    query = torch.randn((1, 2, 4, 8)[4 - rank :])
    mask = torch.tensor([True, False, True, True])
    out = attnplug.scaled_dot_product_attention(query, query, query, mask, impl=impl)
    torch.testing.assert_close(out, attnplug.scaled_dot_product_attention(query, query, query, mask[None], impl=impl))


@pytest.mark.parametrize("impl", [None, *BUILTIN])
def test_the_last_dimension_may_be_strided(impl: str | None) -> None:
    """PyTorch's CPU kernel assumes that it is not, and does not look."""
    query, key, value = (torch.randn(1, 2, 4, 16)[..., ::2] for _ in range(3))
    out = attnplug.scaled_dot_product_attention(query, key, value, impl=impl)
    torch.testing.assert_close(out.double(), torch.from_numpy(attention(query, key, value)[0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gpu", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize(("size", "dropout"), [(192, 0.1), (200, 0.0), (224, 0.1), (256, 0.0), (256, 0.1)])
def test_flash_declines_the_backward_that_small_gpus_do_not_have(
    gpu: tuple[int, int], size: int, dropout: float
) -> None:
    with FakeTensorMode():
        query = torch.empty(1, 2, 16, size, dtype=torch.float16, device="cuda", requires_grad=True)
    params = attnplug.SDPAParams(query, query, query, dropout=dropout)
    small = gpu in ((8, 6), (8, 9), (12, 0))
    lacks = small and (192 < size <= 224 or (size == 256 and dropout > 0))
    verdict = attnplug.can_use_impl("aten_flash", params, compute_capability=gpu)
    assert verdict.accepted != lacks
    if lacks:
        assert verdict.reasons[0].startswith(f"has no backward for head size {size}")
    with torch.no_grad():
        assert attnplug.can_use_impl("aten_flash", params, compute_capability=gpu)


@pytest.mark.parametrize("impl", ["aten_flash", "aten_math"])
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_a_scale_of_zero_or_below_hides_what_a_causal_mask_hides(impl: str, scale: float) -> None:
    """PyTorch's flash kernel on CPU hides keys before it scales, and gives NaN."""
    query, key, value = (torch.randn(1, 2, 7, 8, requires_grad=True) for _ in range(3))
    out = attnplug.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, impl=impl)
    expected = torch.nn.functional.scaled_dot_product_attention(scale * query, key, value, is_causal=True, scale=1.0)
    torch.testing.assert_close(out, expected)
    found = torch.autograd.grad(out.square().sum(), (query, key, value))
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), (query, key, value)))


def test_nested_tensors_that_pytorch_cannot_run_are_declined_with_a_reason() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, n, 8) for n in (3, 5)])
    with pytest.raises(attnplug.NoImplementationError, match="no kernel for strided nested tensors"):
        attnplug.scaled_dot_product_attention(nested, nested, nested, is_causal=True, impl="torch")
