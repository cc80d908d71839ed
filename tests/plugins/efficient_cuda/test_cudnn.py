"""`cudnn` without a GPU: the plugin's code on an emulated cuDNN."""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch

import attnplug
from cuda_calls import (
    BANDS,
    INF,
    LENGTHS,
    LOWER_RIGHT,
    MASKS,
    assert_same,
    emulate,
    install_cudnn,
    install_sequences,
    make_mask,
    pytorch,
    seen_by,
    tensors,
)
from cuda_kernels_emulated import Cudnn, CudnnSequences
from reference import attention

from attnplug_efficient_cuda import operators  # isort: skip


@pytest.fixture(params=[3, 4], ids=["lse of 3 dimensions", "lse of 4 dimensions"])
def emulated_cudnn(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Cudnn:
    install_cudnn(monkeypatch, 91900)
    kernel = Cudnn(lse_rank=request.param)
    emulate(monkeypatch, "cudnn", kernel)
    return kernel


@pytest.fixture
def emulated_sequences(monkeypatch: pytest.MonkeyPatch) -> CudnnSequences:
    install_cudnn(monkeypatch, 92500)
    install_sequences(monkeypatch)
    kernel = CudnnSequences()
    emulate(monkeypatch, "cudnn", kernel)
    return kernel


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_dense_calls_are_those_of_pytorch(
    emulated_cudnn: Cudnn, kv_heads: int, heads_first: bool, is_causal: bool
) -> None:
    query, key, value = tensors(heads=4, kv_heads=kv_heads, value_size=16, dtype=torch.float16, heads_first=heads_first)
    call = {"query": query, "key": key, "value": value, "is_causal": is_causal}
    assert_same(call, seen_by(5, 7, is_causal=is_causal), 4e-3)


def test_no_tensor_of_a_backward_is_kept_beyond_it(emulated_cudnn: Cudnn, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph, of `reduce-overhead` for one, refuses to run what keeps memory of its own pool."""
    given: list[weakref.ref[torch.Tensor]] = []
    run = emulated_cudnn.backward

    def backward(*tensors: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        given.extend(weakref.ref(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor))
        return run(*tensors, **options)

    monkeypatch.setattr(operators, "cudnn_backward", backward)
    leaves = tensors(dtype=torch.float16)
    out = attnplug.scaled_dot_product_attention(*leaves, is_causal=True, impl="emulated")
    grads = torch.autograd.grad(out.sum(), leaves)
    assert len(given) == 8 and all(grad.isfinite().all() for grad in grads)
    del out, leaves, grads
    assert [tensor() for tensor in given if tensor() is not None] == []


@pytest.mark.parametrize(("kind", "shape"), MASKS, ids=str)
def test_masks_are_those_of_pytorch_and_rows_without_keys_are_zero(
    emulated_cudnn: Cudnn, kind: str, shape: tuple[int, ...]
) -> None:
    query, key, value = tensors(heads=4, kv_heads=2, dtype=torch.float16)
    mask = make_mask(kind, shape, torch.float16).detach()
    assert_same({"query": query, "key": key, "value": value, "attn_mask": mask}, seen_by(5, 7), 4e-3)


@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("lengths", [pair for pair in LENGTHS if 1 not in pair], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_bands_of_unequal_lengths_are_those_of_pytorch(
    emulated_cudnn: Cudnn, band: dict[str, Any], lengths: tuple[int, int], masked: bool
) -> None:
    query, key, value = tensors(queries=lengths[0], keys=lengths[1], batch=1, dtype=torch.float16)
    call = {"query": query, "key": key, "value": value, **band}
    if masked:
        call["attn_mask"] = make_mask("bool", lengths)
    assert_same(call, seen_by(*lengths, **band), 4e-3)


def test_an_expanded_gradient_and_expanded_keys_get_memory_of_their_own(emulated_cudnn: Cudnn) -> None:
    query, key, value = tensors(dtype=torch.float16, heads=4, kv_heads=1)
    wide = [tensor.expand(-1, 4, -1, -1) for tensor in (key, value)]
    attnplug.scaled_dot_product_attention(query, *wide, impl="emulated").sum().backward()
    assert query.grad is not None and key.grad is not None and value.grad is not None
    torch.testing.assert_close(value.grad.sum(2), torch.full((2, 1, 8), 20.0, dtype=torch.float16), atol=0.2, rtol=0)


def test_strict_determinism_is_an_error_of_its_own_in_a_backward_decided_before(emulated_cudnn: Cudnn) -> None:
    query, key, value = tensors(dtype=torch.float16)
    out = attnplug.scaled_dot_product_attention(query, key, value, impl="emulated")
    try:
        torch.use_deterministic_algorithms(True)
        with pytest.raises(RuntimeError, match="no deterministic form"):
            out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scales_that_the_kernel_cannot_take_are_converted(emulated_cudnn: Cudnn, scale: float) -> None:
    query, key, value = tensors(dtype=torch.float16, queries=7)
    out = attnplug.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, impl="emulated")
    wide = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(scale * wide[0], *wide[1:], is_causal=True, scale=1.0)
    torch.testing.assert_close(out.double(), expected, atol=4e-3, rtol=4e-3)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (query, key, value), grad)
    right = torch.autograd.grad(expected, wide, grad.double())
    for got, want in zip(found, right, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-2, rtol=1e-2)


LENGTHS_Q, LENGTHS_K = [3, 0, 5, 4, 1, 2], [4, 2, 2, 4, 0, 6]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("is_causal", "grad"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize("first", [0, 1], ids=["lengths as they are", "lengths out of step"])
def test_each_sequence_is_as_by_itself(
    emulated_sequences: CudnnSequences, kv_heads: int, is_causal: bool, grad: bool, first: int
) -> None:
    starts_q, starts_k = (
        torch.tensor([0] * first + [0, *lengths]).cumsum(0, dtype=torch.int32)[first:]
        for lengths in (LENGTHS_Q, LENGTHS_K)
    )
    query = torch.randn(int(starts_q[-1]) + 2, 4, 8, dtype=torch.float16, requires_grad=grad)
    key, value = (
        torch.randn(int(starts_k[-1]) + 3, kv_heads, size, dtype=torch.float16, requires_grad=grad) for size in (8, 16)
    )
    options: dict[str, Any] = {"is_causal": is_causal, "enable_gqa": True, "return_lse": True, "impl": "emulated"}
    out, lse = attnplug.varlen_attn(query, key, value, starts_q, starts_k, 5, 6, **options)
    pieces = []
    for (begin, end), (first_key, last_key) in zip(pairwise(starts_q), pairwise(starts_k), strict=True):
        q, k, v = query[begin:end], key[first_key:last_key], value[first_key:last_key]
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        lengths = q.shape[2], k.shape[2]
        seen = seen_by(*lengths, is_causal=is_causal, causal_variant=LOWER_RIGHT)
        piece = pytorch(q, k, v, None, seen) if lengths[1] else torch.zeros(1, 4, lengths[0], 16, dtype=torch.float64)
        pieces.append(piece[0].transpose(0, 1))
        _, right = attention(q, k, v, is_causal=is_causal, causal_variant=2, enable_gqa=True)
        torch.testing.assert_close(lse[:, begin:end].double(), torch.as_tensor(right[0]), atol=1e-3, rtol=1e-3)
    expected = torch.cat([*pieces, torch.zeros(2, 4, 16, dtype=torch.float64)])
    torch.testing.assert_close(out.double(), expected, atol=4e-3, rtol=4e-3)
    assert (lse[:, -2:] == -INF).all()
    if grad:
        grad_out = torch.randn_like(out)
        found = torch.autograd.grad(out, (query, key, value), grad_out)
        right_grads = torch.autograd.grad(expected, (query, key, value), grad_out.double())
        for got, want in zip(found, right_grads, strict=True):
            torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)


def test_packed_tensors_out_of_step_and_shared_ones_are_copied(emulated_sequences: CudnnSequences) -> None:
    storage = torch.randn(3, 2 * 8 * 8 + 4, dtype=torch.float16)
    query, key, value = (row[4:].view(8, 2, 8) for row in storage)
    value = value[:, :1].expand(-1, 2, -1)
    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    out = attnplug.varlen_attn(query, key, value, starts, starts, 5, 5, impl="emulated")
    clones = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (query, key, value))
    assert torch.equal(out, attnplug.varlen_attn(*clones, starts, starts, 5, 5, impl="emulated"))
