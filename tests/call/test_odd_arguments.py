"""Arguments that are odd, and what is made of them wherever they are looked at: every route says the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as sdpa

import attnplug
from attnplug import Capabilities, ImplSpec, SDPAParams
from attnplug.testing import check_impl

Q = torch.randn(1, 2, 4, 8)
ROUTES = [None, "torch", "aten_math"]
attend = attnplug.scaled_dot_product_attention


NESTED = torch.nested.nested_tensor([Q[0]])  # of the layout of dense tensors


def of_one_dimension_more(tensor: Tensor) -> Tensor:
    return torch.nested.nested_tensor([tensor[0], tensor[0]], layout=torch.jagged)


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Q.to_sparse(), Q, Q), ValueError, "query: expected a dense tensor, got one of layout torch.sparse_coo"),
        ((Q, Q.to_sparse(), Q), ValueError, "key: expected a dense tensor"),
        ((Q, of_one_dimension_more(Q), of_one_dimension_more(Q)), ValueError, "all three nested or none"),
        ((of_one_dimension_more(Q), Q, Q), ValueError, "all three nested or none"),
        ((Q[0], of_one_dimension_more(Q[0]), Q[0]), ValueError, "all three nested or none"),
        ((NESTED, Q, Q), ValueError, "all three nested or none"),
        ((Q, NESTED, Q), ValueError, "all three nested or none"),
        ((Q, Q, NESTED), ValueError, "all three nested or none"),
        ((Q[0, 0], Q[0, 0].to_sparse(), Q[0, 0]), ValueError, "key: expected a dense tensor"),
        ((Q[None], Q[None].to_sparse(), Q[None]), ValueError, "key: expected a dense tensor"),
        ((Q[0], Q[0], Q[0].to_mkldnn()), ValueError, "value: expected a dense tensor"),
        ((Q[0, 0, 0], Q[0, 0, 0], Q[0, 0, 0]), ValueError, "query: expected at least 2 dimensions"),
        ((Q[0], Q[0], Q[0], torch.zeros(3, 1, 4, 4)), ValueError, "attn_mask: shape .* does not broadcast"),
        (([1.0], [1.0], [1.0]), TypeError, "query: expected a torch.Tensor, got list"),
        (([1.0], [1.0], [1.0], torch.ones(4, 4)), TypeError, "query: expected a torch.Tensor, got list"),
        ((Q, Q, Q, [1.0]), TypeError, "attn_mask: expected a torch.Tensor or None, got list"),
    ],
)
def test_what_is_no_dense_tensor_is_an_error_that_says_so(
    arguments: Any, error: type[Exception], message: str, impl: str | None
) -> None:
    attend(Q, Q.clone(), Q.clone(), impl=impl)  # like which a call is recognised from now on
    for function in (attend, attnplug.explain):
        with pytest.raises(error, match=message):
            function(*arguments, impl=impl)


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_a_mask_may_have_dimensions_of_size_1_before_those_of_the_call(rank: int, impl: str | None) -> None:
    """As PyTorch's function takes it from 2.14 on."""
    query = Q[(0,) * (4 - rank)]
    inner = torch.randn(*query.shape[:-1], 4)
    mask, expected = inner[None, None], sdpa(query, query, query, inner)
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    for function in (attend, attend, compiled):
        torch.testing.assert_close(function(query, query, query, mask, impl=impl), expected)


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3, 4), (2, 1, 3, 2)])
def test_calls_of_any_rank_are_right_again_and_again(leading: tuple[int, ...], impl: str | None) -> None:
    for length in (5, 9):
        query, key, value = (torch.randn(*leading, size, 8) for size in (5, length, length))
        apart = [tensor.transpose(0, -3) for tensor in (query, key, value)] if len(leading) > 1 else [query, key, value]
        for options in ({}, {"is_causal": True}, {"attn_mask": torch.randn(5, length)}):
            for given in ([query, key, value], apart):
                expected = sdpa(*given, **options)
                torch.testing.assert_close(attend(*given, **options, impl=impl), expected)
        out, lse = attend(query, key, value, return_lse=True)
        assert (out.shape, lse.shape) == (query.shape, query.shape[:-1])
        torch.testing.assert_close(lse, (query @ key.mT / 8**0.5).logsumexp(-1))


@pytest.mark.parametrize("impl", [None, "math_ref"])
def test_causal_biases_are_right_again_and_again(impl: str | None) -> None:
    for length in (4, 6):
        key = torch.randn(1, 2, length, 8)
        for bias in (causal_lower_right(4, length), causal_upper_left(4, length)):
            torch.testing.assert_close(attend(Q, key, key, bias, impl=impl), sdpa(Q, key, key, bias))
    with pytest.raises(ValueError, match=r"CausalBias for lengths \(4, 5\), the call has \(4, 4\)"):
        attend(Q, Q, Q, causal_lower_right(4, 5), impl=impl)


@pytest.mark.parametrize("impl", ROUTES)
def test_grouping_where_there_is_nothing_to_group_changes_nothing(impl: str | None) -> None:
    flat, one = torch.randn(4, 8), torch.randn(1, 1, 4, 8)
    for query, key in ((flat, flat), (one, Q), (Q, Q), (Q[0], Q[0])):
        expected = attend(query, key, key)
        torch.testing.assert_close(attend(query, key, key, enable_gqa=True, impl=impl), expected)


def test_a_kernel_of_any_form_is_told_of_groups_only_where_there_are_some() -> None:
    told = []

    class AnyForm:
        any_form = composite = True

        @staticmethod
        def forward(params: SDPAParams) -> Any:
            told.append(params.enable_gqa)
            return params.query.clone(), None

    attnplug.register_impl(
        ImplSpec(name="any_form", kernel=AnyForm, backend=None, capabilities=Capabilities(features=("GQA",)))
    )
    for query, key in ((Q, Q), (Q[0], Q[0]), (Q, Q[:, :1]), (Q[0], Q[0, :1])):
        attend(query, key, key, enable_gqa=True, impl="any_form")
    assert told == [False, False, True, True]


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor, lambda value: torch.tensor(value).double()])
def test_numbers_of_numpy_and_of_pytorch_are_numbers(kind: Any, impl: str | None) -> None:
    expected = attend(Q, Q, Q, scale=0.25, impl=impl)
    torch.testing.assert_close(attend(Q, Q, Q, scale=kind(0.25), impl=impl), expected)
    torch.manual_seed(0)
    expected = attend(Q, Q, Q, dropout_p=0.5, impl=impl)
    torch.manual_seed(0)
    assert torch.equal(attend(Q, Q, Q, dropout_p=kind(0.5), impl=impl), expected)


def test_a_scale_that_numpy_computes_is_a_number_in_compiled_code() -> None:
    starts = torch.tensor([0, 1, 4], dtype=torch.int32)

    def scaled(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale: Any = 1 / np.sqrt(query.shape[-1])
        tokens = query[0].transpose(0, 1)
        packed = attnplug.varlen_attn(tokens, tokens, tokens, starts, starts, 3, 3, scale=scale)
        return attend(query, query, query, scale=scale), packed

    found, packed = torch.compile(scaled, backend="eager", fullgraph=True)(Q)
    torch.testing.assert_close(found, attend(Q, Q, Q))
    torch.testing.assert_close(packed, scaled(Q)[1])


@pytest.mark.parametrize("impl", [None, "math_ref"])
@pytest.mark.parametrize("side", [2**31, 2**62, 2**63, 2**70, np.int64(2**40)])
def test_a_window_wider_than_any_sequence_is_open(side: Any, impl: str | None) -> None:
    if "math_ref" not in attnplug.list_flash_attention_impls():
        pytest.skip("math_ref is not installed")
    expected = attend(Q, Q, Q, window_size=(-1, 0), impl=impl)
    for _ in range(2):  # decided, and then kept
        torch.testing.assert_close(attend(Q, Q, Q, window_size=(side, 0), impl=impl), expected)
    torch.testing.assert_close(
        attend(Q, Q, Q, window_size=(0, side), impl=impl), attend(Q, Q, Q, window_size=(0, -1), impl=impl)
    )


@pytest.mark.parametrize("wrong", [None, 0, 1, "yes"])
def test_return_lse_is_a_bool_everywhere(wrong: Any) -> None:
    for impl in ROUTES:
        for function in (attend, attnplug.explain):
            with pytest.raises(TypeError, match="return_lse: expected a bool"):
                function(Q, Q, Q, return_lse=wrong, impl=impl)


@pytest.mark.parametrize("wrong", [5, 0, True, ["torch"]])
def test_a_name_is_a_string_everywhere(wrong: Any) -> None:
    params = attnplug.SDPAParams(Q, Q, Q)
    for ask in (
        lambda: attend(Q, Q, Q, impl=wrong),
        lambda: attnplug.explain(Q, Q, Q, impl=wrong),
        lambda: attnplug.can_use_impl(wrong, params),
        lambda: attnplug.activate_flash_attention_impl(wrong),
        lambda: attnplug.unregister_impl(wrong),
    ):
        with pytest.raises(TypeError, match="expected the name of an implementation"):
            ask()


@pytest.mark.parametrize("number", [2.0**63, 1e30, -1e30])
@pytest.mark.parametrize("impl", ["aten_math", "aten_flash", "math_ref"])
def test_a_float_may_be_larger_than_any_int_of_64_bits(impl: str, number: float) -> None:
    query = Q / 1e15
    expected = attend(query.double(), query.double() * number, query.double(), scale=1.0, impl="aten_math").float()
    torch.testing.assert_close(attend(query, query, query, scale=number, impl=impl), expected)
    if impl == "math_ref":
        capped = attend(Q, Q, Q, softcap=abs(number), impl=impl)
        torch.testing.assert_close(capped, attend(Q, Q, Q, impl=impl), rtol=1e-3, atol=1e-3)


def test_nothing_is_made_on_the_default_device_where_the_call_is_on_another() -> None:
    pages, table = torch.randn(4, 2, 3, 8), torch.tensor([[0, 1, 2], [1, 2, 3]], dtype=torch.int32)
    query, starts = torch.randn(8, 3, 8), torch.tensor([0, 3, 8], dtype=torch.int32)
    used = torch.tensor([3, 5], dtype=torch.int32)

    def attend_pages() -> Tensor:
        return attnplug.varlen_attn(query, pages, pages, starts, None, 5, 5, seqused_k=used, block_table=table)

    expected = attend_pages()
    with torch.device("meta"):
        assert torch.equal(attend_pages(), expected)
        report = check_impl("aten_math", device="cpu", dtype="float32", checks=["check_values"])
    assert report.passed, report.summary()
