"""What flash_triton does that only a card can show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnplug
from accuracy import GRADIENT, assert_lse_right, assert_right
from attnplug import CausalVariant

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

SHAPES = [(1, 1), (64, 128), (239, 1), (799, 3), (113, 203), (384, 256), (1023, 1024), (1024, 1023), (2048, 2048)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def attend(*tensors: Tensor, **arguments: Any) -> Any:
    return attnplug.scaled_dot_product_attention(*tensors, enable_gqa=True, impl="flash_triton", **arguments)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def plain(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    logits = query @ key.mT * query.shape[-1] ** -0.5
    if causal:
        queries, keys = logits.shape[-2:]
        hidden = torch.ones(queries, keys, dtype=torch.bool, device="cuda").triu(1 + keys - queries)
        logits = logits.masked_fill(hidden, float("-inf"))
    lse = logits.logsumexp(-1)
    return torch.softmax(logits, -1).nan_to_num(0.0) @ value, lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [64, 72, 128, 256])
@pytest.mark.parametrize("lengths", SHAPES, ids=str)
def test_out_lse_and_gradients_are_right(dtype: torch.dtype, causal: bool, size: int, lengths: tuple[int, int]) -> None:
    queries, keys = lengths
    if causal and queries > keys:
        pytest.skip("rows without keys are NaN in the plain formula's gradient; the interpreter's tests have them")
    tensors = [random(1, 4, queries, size), random(1, 2, keys, size, seed=1), random(1, 2, keys, size, seed=2)]
    tensors = [tensor.to(dtype) for tensor in tensors]
    weights = random(1, 4, queries, size, seed=3).to(dtype)
    results = []
    for kind in (None, torch.float64, dtype):
        leaves = [tensor.to(kind or dtype).detach().requires_grad_() for tensor in tensors]
        if kind is None:
            out, lse = attend(*leaves, is_causal=causal, causal_variant=CausalVariant.LOWER_RIGHT, return_lse=True)
        else:
            out, lse = plain(*leaves, causal)
        results.append((out, lse, *torch.autograd.grad(out, leaves, weights.to(out.dtype))))
    ours, ref, low = results
    assert_right(ours[0], ref[0], low[0])
    assert_lse_right(ours[1], ref[1], dtype)
    for grad, ref_grad, low_grad in zip(ours[2:], ref[2:], low[2:], strict=True):
        assert_right(grad, ref_grad, low_grad, GRADIENT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 128, 256])
def test_small_integers_are_exact(dtype: torch.dtype, size: int) -> None:
    """With equal logits every probability is 1 / keys, a power of two: a product that is off by one bit shows."""
    keys = 1024
    query, key = torch.zeros(2, 4, 512, size, dtype=dtype, device="cuda"), random(2, 4, keys, size, dtype=dtype)
    value = torch.randint(-2, 3, (2, 4, keys, size), device="cuda").to(dtype)
    ref = value.double().mean(2, keepdim=True).expand(2, 4, 512, size).to(dtype)
    assert torch.equal(attend(query, key, value), ref)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_runs_give_equal_bits(dtype: torch.dtype) -> None:
    tensors = [random(2, 8, 1000, 64, dtype=dtype, seed=seed).requires_grad_() for seed in range(3)]
    runs = []
    for _ in range(3):
        out = attend(*tensors, is_causal=True)
        runs.append((out, *torch.autograd.grad(out, tensors, torch.ones_like(out))))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


def test_a_captured_graph_replays() -> None:
    tensors = [random(1, 4, 256, 64, seed=seed) for seed in range(3)]
    attend(*tensors, is_causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(*tensors, is_causal=True)
    for seed, tensor in enumerate(tensors):
        tensor.copy_(random(1, 4, 256, 64, seed=seed + 5))
    graph.replay()
    assert torch.equal(out, attend(*tensors, is_causal=True))


def test_offsets_beyond_32_bits_are_right() -> None:
    """More than 2**31 elements of keys, of which the last head must equal a call of its own."""
    heads, keys, size = 132, 2**17, 128
    key = torch.empty(1, heads, keys, size, dtype=torch.bfloat16, device="cuda")
    key.normal_()
    assert key.numel() > 2**31
    query = random(1, heads, 16, size)
    out = attend(query, key, key)
    assert torch.equal(out[:, -1:], attend(query[:, -1:], key[:, -1:], key[:, -1:]))


def test_forward_and_backward_compile_without_a_graph_break() -> None:
    tensors = [random(1, 4, 256, 64, seed=seed).requires_grad_() for seed in range(3)]
    out = torch.compile(attend, fullgraph=True)(*tensors, is_causal=True)
    ref = attend(*tensors, is_causal=True)
    assert torch.equal(out, ref)
    for grad, ref_grad in zip(
        torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(ref.sum(), tensors), strict=True
    ):
        assert torch.equal(grad, ref_grad)
