"""math_ref's dropout is random, and is the same in forward and in every derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnplug


def sdpa(*args: Any, **kwargs: Any) -> Any:
    return attnplug.scaled_dot_product_attention(*args, impl="math_ref", **kwargs)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def kept(shape: tuple[int, int, int], keys: int, dropout_p: float) -> Tensor:
    """Return which probabilities dropout keeps: equal logits and the identity as value make out show it."""
    query, key = torch.zeros(*shape, 2), torch.zeros(*shape[:2], keys, 2)
    torch.manual_seed(0)
    out = sdpa(query, key, torch.eye(keys).expand(*shape[:2], keys, keys), dropout_p=dropout_p)
    scaled = out * keys * (1 - dropout_p)
    torch.testing.assert_close(scaled, scaled.round(), atol=1e-4, rtol=0)
    return scaled.round()


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_share_it_should_everywhere(dropout_p: float) -> None:
    mask = kept((4, 4, 64), 128, dropout_p)
    assert set(mask.unique().tolist()) == {0, 1}
    for dims in ((0, 1, 2, 3), (2, 3), (0, 1, 3), (0, 1, 2)):  # all, each head, each query, each key
        share = mask.mean(dims)
        count = mask.numel() / share.numel()
        assert (share - (1 - dropout_p)).abs().max() < 5 * (dropout_p * (1 - dropout_p) / count) ** 0.5


def test_dropout_of_one_row_or_key_says_nothing_of_another() -> None:
    mask = kept((2, 2, 128), 512, 0.5)
    for table in (mask.reshape(512, 512), mask.reshape(512, 512).T):
        correlation = torch.corrcoef(table).fill_diagonal_(0) * 512**0.5
        assert correlation.abs().max() < 6
        assert abs(correlation.square().mean() - 1) < 0.05
    flat = mask.flatten() * 2 - 1
    for shift in (1, 2, 3, 64, 511, 512, 513, 128 * 512, 2 * 128 * 512):
        assert abs((flat * flat.roll(shift)).mean()) < 5 / flat.numel() ** 0.5


def test_dropout_does_not_depend_on_how_a_call_is_split() -> None:
    many, keys = random(1, 1, 40, 4), random(1, 1, 20_000, 4)
    results = []
    for query in (many, many[:, :, :4]):
        torch.manual_seed(0)
        results.append(sdpa(query, keys, keys, dropout_p=0.2))
    torch.testing.assert_close(results[0][:, :, :4], results[1])


def test_derivatives_use_the_dropout_of_forward() -> None:
    tensors = [random(1, 2, 3, 4), random(1, 2, 5, 4, seed=1), random(1, 2, 5, 4, seed=2)]

    def function(*tensors: Tensor) -> Tensor:
        torch.manual_seed(0)
        return sdpa(*tensors, dropout_p=0.4)

    factors = kept((1, 2, 3), 5, 0.4).double() / 0.6
    query, key, value = tensors
    ref = (torch.softmax(query @ key.mT / 2, -1) * factors) @ value
    torch.testing.assert_close(function(*tensors), ref)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)
