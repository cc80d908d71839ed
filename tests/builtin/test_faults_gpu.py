"""What PyTorch gets wrong is right through attnplug, on a GPU."""

from __future__ import annotations

import math

import pytest
import torch

import attnplug
from attnplug import SDPAParams
from attnplug.testing import assert_right
from wrong_calls import BAD, PLAIN

attend = attnplug.scaled_dot_product_attention


@pytest.mark.gpu
@pytest.mark.parametrize("impl", [None, "torch", "aten_flash"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", BAD)
def test_calls_that_pytorch_gets_wrong_are_right_on_cuda(impl: str | None, dtype: str, name: str) -> None:
    call = BAD[name].but(dtype=dtype, device="cuda", gradients=("query", "key", "value"))
    inputs = call.make()
    if impl is not None and not (verdict := attnplug.can_use_impl(impl, call.params(inputs))):
        pytest.skip("; ".join(verdict.reasons))
    arguments, leaves = call.with_leaves(inputs)
    out = attend(**arguments, impl=impl)
    gradients = call.backward(inputs, out, None, leaves)
    assert_right(inputs.arguments, out.detach(), gradients=gradients, grad_out=inputs.grad_out)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", [None, "torch", "aten_flash"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dropout_of_everything_is_zero_on_cuda(impl: str | None, dtype: torch.dtype) -> None:
    leaves = [torch.randn(1, 2, 16, 64, device="cuda", dtype=dtype).requires_grad_() for _ in range(3)]
    if impl is not None and not (verdict := attnplug.can_use_impl(impl, SDPAParams(*leaves, dropout=1.0))):
        pytest.skip("; ".join(verdict.reasons))
    out = attend(*leaves, dropout_p=1.0, impl=impl)
    for tensor in (out, *torch.autograd.grad(out, leaves, torch.randn_like(out))):
        assert bool((tensor == 0).all())


@pytest.mark.gpu
@pytest.mark.parametrize("impl", [None, "torch", "cudnn"])
@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (704, 704), (1, 128)])
def test_gradients_of_logits_far_below_zero_are_finite_on_cuda(impl: str | None, queries: int, keys: int) -> None:
    query, key, value = torch.randn(3, 1, 2, keys, 64, device="cuda", dtype=torch.bfloat16) * 0.1
    query[..., 0], key[..., 0] = 1.0, -120 * math.sqrt(64)
    leaves = [tensor.requires_grad_() for tensor in (query[..., :queries, :].clone(), key, value)]
    mask = torch.ones(keys, keys, dtype=torch.bool, device="cuda").tril() if queries > 1 else None
    if impl is not None and not (verdict := attnplug.can_use_impl(impl, SDPAParams(*leaves, attn_mask=mask))):
        pytest.skip("; ".join(verdict.reasons))
    out = attend(*leaves, attn_mask=mask, impl=impl)
    assert all(bool(grad.isfinite().all()) for grad in torch.autograd.grad(out, leaves, torch.randn_like(out)))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", [None, "torch", "efficient_cuda"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("queries", [1, 65])
@pytest.mark.parametrize(("mask", "mask_dims"), [("", "bhqk"), ("additive", "b11k"), ("boolean", "bhqk")])
def test_heads_that_share_their_keys_by_a_stride_of_0_are_right_on_cuda(
    impl: str | None, dtype: str, queries: int, mask: str, mask_dims: str
) -> None:
    call = PLAIN.but(heads=80, queries=queries, keys=97, dtype=dtype, device="cuda", mask=mask, mask_dims=mask_dims)
    arguments = dict(call.make().arguments)
    arguments |= {name: arguments[name][:, :1].expand_as(arguments[name]) for name in ("key", "value")}
    given = SDPAParams(
        **{name: arguments[name] for name in ("query", "key", "value")}, attn_mask=arguments.get("attn_mask")
    )
    if impl is not None and not (verdict := attnplug.can_use_impl(impl, given)):
        pytest.skip("; ".join(verdict.reasons))
    assert_right(arguments, attend(**arguments, impl=impl))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_float32_mask_of_half_queries_is_right_on_cuda(dtype: str) -> None:
    call = PLAIN.but(dtype=dtype, device="cuda", mask="additive", mask_dtype="float32")
    inputs = call.make()
    assert_right(inputs.arguments, attend(**inputs.arguments))
    with pytest.raises(attnplug.NoImplementationError, match="reads a float32 attn_mask"):
        attend(**inputs.arguments, impl="torch")
