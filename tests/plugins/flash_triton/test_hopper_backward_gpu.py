"""The backward kernels for Hopper on such a GPU: exact where numbers can be, and equal on repeated runs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnplug
from attnplug import SDPAParams

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a GPU of compute capability 9.0",
    ),
]


@pytest.fixture(params=[False, True], ids=["any order", "deterministic"])
def deterministic(request: pytest.FixtureRequest) -> bool:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(before)


def few(*shape: int, share: float) -> Tensor:
    """Return -1, 0 and 1, most of them 0."""
    numbers = torch.randint(-1, 2, shape, device="cuda")
    return (numbers * (torch.rand(shape, device="cuda") < share)).bfloat16()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_integers_are_exact(size: int, is_causal: bool, deterministic: bool) -> None:
    """With lse and scale multiples of log(2), probabilities are powers of two, and no product or sum is rounded."""
    from attnplug_flash_triton import impl

    torch.manual_seed(0)
    query, key = few(2, 3, 640, size, share=6 / size), few(2, 3, 896, size, share=6 / size)
    value, grad = few(2, 3, 896, size, share=0.1), few(2, 3, 640, size, share=0.1)
    out, powers = few(2, 3, 640, size, share=0.05), torch.randint(3, 6, (2, 3, 640), device="cuda")
    scale = math.log(2)
    params = SDPAParams(query, key, value, is_causal=is_causal, scale=scale)
    got = impl.backward(params, grad, None, out, powers.float() * scale)
    q, k, v, o, do = (tensor.double() for tensor in (query, key, value, out, grad))
    p = torch.exp2(q @ k.mT - powers[..., None])
    if is_causal:
        p = p.tril()
    ds = p * (do @ v.mT - (do * o).sum(-1, keepdim=True))
    assert torch.equal(ds.bfloat16().double(), ds)
    want = ((ds @ k).float() * scale, (ds.mT @ q).float() * scale, p.mT @ do)
    for actual, expected in zip(got[:3], want, strict=True):
        assert torch.equal(actual, expected.bfloat16())


@pytest.mark.parametrize("size", [64, 128, 256])
def test_repeated_runs_differ_by_the_order_of_additions_alone(size: int, deterministic: bool) -> None:
    """A race would move an element by more."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 8, 2000, size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    out = attnplug.scaled_dot_product_attention(*inputs, is_causal=True, impl="flash_triton")
    grad = torch.randn_like(out)
    first, *others = (torch.autograd.grad(out, inputs, grad, retain_graph=True) for _ in range(20))
    for other in others:
        for i, (one, two) in enumerate(zip(first, other, strict=True)):
            if deterministic or i:
                assert torch.equal(one, two)
            else:
                assert (one - two).abs().max() <= torch.finfo(one.dtype).eps * one.abs().max()
