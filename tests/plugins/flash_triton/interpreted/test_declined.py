"""What the kernels do not do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnplug


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
