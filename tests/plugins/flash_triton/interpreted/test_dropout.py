"""Dropout, whose mask is read off results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import attnplug
from interpreted_calls import KEYS, QUERIES, inputs, random


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
