"""What a statement of capabilities lacks of a call, in words: of several alternatives, the one for the call speaks."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import attnplug
from attnplug import Capabilities, Feature, ImplSpec, SDPAParams


def forward(params: SDPAParams) -> tuple[Tensor, None]:
    assert params.alibi_slopes is None or params.alibi_slopes.dtype is params.lse_dtype
    return params.value.clone(), None


def reasons(capabilities: Capabilities, params: SDPAParams) -> tuple[str, ...]:
    """Return why an implementation with these capabilities does not take a call."""
    kernel = SimpleNamespace(forward=forward, composite=True)
    spec = ImplSpec(name="stated", kernel=kernel, backend=None, capabilities=capabilities)
    attnplug.register_impl(spec, replace=True)
    return attnplug.can_use_impl("stated", params).reasons


def call(size: int = 8, dtype: torch.dtype = torch.float32, mask: Tensor | None = None) -> SDPAParams:
    query = torch.zeros(1, 2, 4, size, dtype=dtype)
    return SDPAParams(query, query, query, mask)


@pytest.mark.parametrize(
    ("accepted", "size", "reason"),
    [
        (range(16, 129, 8), 8, "head size 8 is below 16"),
        (range(16, 129, 8), 136, "head size 136 is above 128"),
        (range(16, 129, 8), 20, "head size 20 is not a multiple of 8"),
        (range(128, 15, -8), 20, "head size 20 is not a multiple of 8"),
        (range(16, 129, 8), 128, None),
        ((64, 32), 48, "head size 48 is not one of 32, 64"),
    ],
)
def test_a_head_size_is_declined_in_words(accepted: Collection[int], size: int, reason: str | None) -> None:
    assert reasons(Capabilities(head_sizes=accepted), call(size)) == (() if reason is None else (reason,))


def test_of_several_alternatives_the_one_for_the_dtype_of_the_call_speaks() -> None:
    float32 = Capabilities(dtypes=("float32",), head_sizes=(16,), features={Feature.BOOLEAN_MASK})
    either = float32 | Capabilities(dtypes=("bfloat16",), head_sizes=(8,))
    mask = torch.ones(4, 4, dtype=torch.bool)
    assert reasons(either, call(mask=mask)) == ("head size 8 is not one of 16",)
    lacks_mask = (f"does not support {Feature.BOOLEAN_MASK.value}",)
    assert reasons(either, call(dtype=torch.bfloat16, mask=mask)) == lacks_mask


def test_a_mask_wants_a_gradient_only_where_gradients_are_recorded() -> None:
    masked = Capabilities(features={Feature.ADDITIVE_MASK})
    params = call(mask=torch.zeros(1, 1, 4, 4, requires_grad=True))
    assert reasons(masked, params) == (f"does not support {Feature.MASK_GRADIENT.value}",)
    with torch.no_grad():
        assert reasons(masked, params) == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_kernels_get_slopes_in_the_dtype_of_sums_whatever_their_own(dtype: torch.dtype) -> None:
    assert reasons(Capabilities(features={Feature.ALIBI}), call()) == ()
    query = torch.zeros(1, 2, 4, 8, dtype=dtype)
    for given in (torch.bfloat16, torch.float64, torch.float32):
        slopes = torch.ones(2, dtype=given)
        attnplug.scaled_dot_product_attention(query, query, query, alibi_slopes=slopes, impl="stated")


def test_float64_slopes_of_a_float64_call_are_not_rounded() -> None:
    query, slopes = torch.zeros(1, 1, 2, 8, dtype=torch.float64), torch.tensor([1 / 3], dtype=torch.float64)
    attend = functools.partial(attnplug.scaled_dot_product_attention, impl="math_ref")
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    for function in (attend, attend, compiled):
        _, lse = function(query, query, query, alibi_slopes=slopes, return_lse=True)
        expected = math.log1p(math.exp(-1 / 3))
        assert abs(lse.view(-1).tolist()[0] - expected) < 1e-14


def test_head_sizes_are_not_asked_of_nested_tensors() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2, length, 8) for length in (3, 5)], layout=torch.jagged)
    stated = Capabilities(head_sizes=(16,), features={Feature.NESTED})
    assert reasons(stated, SDPAParams(nested, nested, nested)) == ()
