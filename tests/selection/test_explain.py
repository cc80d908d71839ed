"""What is said about a decision: `explain`, `can_use_impl`, and the reasons that they give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnplug
from attending import Q, formula, register
from attnplug import Capabilities, Feature, SDPAParams


def test_explain_gives_every_reason_for_every_implementation() -> None:
    query = torch.randn(1, 2, 4, 8, requires_grad=True)
    explanation = attnplug.explain(query, query, query, softcap=3.0, return_lse=True, impl=None)
    by_name = {verdict.name: verdict for verdict in explanation.candidates}
    assert set(by_name) == set(attnplug.list_flash_attention_impls())
    assert by_name["aten_math"].reasons == ("does not support softcap", "does not support return_lse")
    assert not by_name["aten_math"].accepted
    assert explanation.chosen == "math_ref"
    assert explanation.candidates[0].name == "math_ref" and explanation.candidates[0].reasons == ()
    assert all(verdict.reasons for verdict in explanation.candidates[1:])
    for name in by_name:
        assert name in str(explanation)


def test_explain_runs_nothing_and_agrees_with_the_call() -> None:
    def must_not_run(params: SDPAParams) -> Any:
        raise AssertionError("ran")

    register("lazy", kernel=must_not_run)
    with attnplug.sdpa_kernel(["lazy", "aten_math"], set_priority=True):
        explanation = attnplug.explain(Q, Q, Q)
    assert explanation.chosen == "lazy"
    verdicts = {verdict.name: verdict for verdict in explanation.candidates}
    assert verdicts["aten_math"].accepted and verdicts["aten_math"].reasons == ("lazy comes first",)
    assert not verdicts["torch"].accepted and "outside sdpa_kernel" in verdicts["torch"].reasons[0]


def test_the_nearest_to_a_fused_kernel_is_the_one_that_declines_for_the_fewest_reasons_in_the_scope() -> None:
    half = ("bfloat16",)
    register("far", capabilities=Capabilities(dtypes=half, features=(), head_sizes=(64,)))
    register("near", capabilities=Capabilities(dtypes=half, features=()))
    register("formulas", backend=attnplug.SDPBackend.MATH, capabilities=Capabilities(features=()))
    register("outside")
    with attnplug.sdpa_kernel(["far", "formulas", "near", "aten_math"]):
        explanation = attnplug.explain(Q, Q, Q, is_causal=True)
        behind = attnplug.explain(Q.bfloat16(), Q.bfloat16(), Q.bfloat16())
    assert explanation.chosen == "aten_math" and explanation.nearest is not None
    assert explanation.nearest.name == "near" and explanation.remedy == ""
    assert "Nearest miss: near: " in str(explanation)
    assert behind.chosen == "aten_math" and behind.nearest is not None  # which comes before what a program registers
    assert behind.nearest.name == "near" and behind.remedy == "impl='near'"


def test_explain_speaks_of_variable_length_calls_too() -> None:
    tokens, starts = torch.randn(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    explanation = attnplug.explain(tokens, tokens, tokens, cu_seq_q=starts, cu_seq_k=starts, max_q=3, max_k=3)
    assert explanation.chosen == "math_ref"
    others = {verdict.name: verdict.reasons for verdict in explanation.candidates}
    assert any("varlen_attn" in reason for reason in others["aten_math"])


@pytest.mark.parametrize("named", [(), ("max_q", "max_k"), ("cu_seq_k", "max_q", "max_k")])
def test_explain_takes_a_variable_length_call_by_position_too(named: tuple[str, ...]) -> None:
    tokens, starts = torch.randn(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    call = {"cu_seq_q": starts, "cu_seq_k": starts, "max_q": 3, "max_k": 3}
    args, kwargs = [call[name] for name in call if name not in named], {name: call[name] for name in named}
    attnplug.varlen_attn(tokens, tokens, tokens, *args, **kwargs)
    told = attnplug.explain(tokens, tokens, tokens, *args, **kwargs)
    assert str(told) == str(attnplug.explain(tokens, tokens, tokens, **call))


def test_explain_takes_a_dense_call_by_position_as_the_call_does() -> None:
    mask = torch.ones(Q.shape[-2], Q.shape[-2], dtype=torch.bool)
    for args in ((None, torch.tensor(0.0)), (mask, torch.tensor(0.0)), (mask, 0.0, False)):
        attnplug.scaled_dot_product_attention(Q, Q, Q, *args)
        assert attnplug.explain(Q, Q, Q, *args).chosen == "torch"
    for function in (attnplug.scaled_dot_product_attention, attnplug.explain):
        with pytest.raises(TypeError, match="dropout_p: expected a number, got None"):
            function(Q, Q, Q, mask, None)


def test_explain_takes_pages_by_position_too() -> None:
    tokens, pages = torch.randn(5, 2, 8), torch.randn(2, 4, 2, 8)
    starts, lengths, table = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([0, 2, 5], [3, 4], [[0], [1]]))
    told = attnplug.explain(tokens, pages, pages, starts, None, 3, 4, seqused_k=lengths, block_table=table)
    assert told.chosen == "math_ref"


def test_can_use_impl_is_truthy_when_it_accepts() -> None:
    assert attnplug.can_use_impl("aten_flash", SDPAParams(Q, Q, Q, None, 0.0, True, False))
    verdict = attnplug.can_use_impl("aten_flash", SDPAParams(Q, Q, Q, None, 0.1, True, False))
    assert not verdict and verdict.reasons == ("does not support dropout",)
    with attnplug.sdpa_kernel("aten_math"):  # whatever is selected
        assert attnplug.can_use_impl("aten_flash", SDPAParams(Q, Q, Q))


@pytest.mark.parametrize(
    ("capabilities", "reason"),
    [
        (Capabilities(devices=("cuda",)), "runs on cuda; the call is on cpu"),
        (Capabilities(dtypes=("float16", "bfloat16")), "does not support float32 (only bfloat16, float16)"),
        (Capabilities(head_sizes=range(16, 257, 16)), "head size 8 is below 16"),
        (Capabilities(head_sizes=range(3, 257, 3)), "head size 8 is not a multiple of 3"),
        (Capabilities(head_sizes=range(1, 5)), "head size 8 is above 4"),
        (Capabilities(head_sizes={64, 128}), "head size 8 is not one of 64, 128"),
    ],
)
def test_a_reason_says_what_is_supported_and_what_came(capabilities: Capabilities, reason: str) -> None:
    register("picky", capabilities=capabilities)
    assert attnplug.can_use_impl("picky", SDPAParams(Q, Q, Q)).reasons == (reason,)


def test_capabilities_joined_with_or_are_alternatives() -> None:
    on_cpu = Capabilities(devices=("cpu",), features={Feature.SOFTCAP})
    on_cuda = Capabilities(devices=("cuda",), dtypes=("float16",), features={Feature.CAUSAL})
    register("both", capabilities=on_cpu | on_cuda)
    both = on_cpu | on_cuda
    assert both.devices == {"cpu", "cuda"} and both.dtypes is None
    assert both.features == {Feature.SOFTCAP, Feature.CAUSAL}
    assert attnplug.can_use_impl("both", SDPAParams(Q, Q, Q, softcap=1.0))
    assert attnplug.can_use_impl("both", SDPAParams(Q, Q, Q, is_causal=True)).reasons == ("does not support is_causal",)


def test_equal_lengths_need_neither_alignment() -> None:
    features = {Feature.CAUSAL, Feature.LOWER_RIGHT}
    register("flash_like", capabilities=Capabilities(features=features))
    longer = torch.randn(1, 2, 6, 8)
    assert attnplug.can_use_impl("flash_like", SDPAParams(Q, Q, Q, is_causal=True))
    verdict = attnplug.can_use_impl("flash_like", SDPAParams(Q, longer, longer, is_causal=True))
    assert verdict.reasons == ("does not support upper-left alignment of unequal query and key lengths",)
    # And a decision kept for equal lengths is not used for unequal ones.
    for key in (Q, longer, Q, longer):
        arguments = dict(is_causal=True, impl="flash_like")
        if key is Q:
            attnplug.scaled_dot_product_attention(Q, key, key, **arguments)
        else:
            with pytest.raises(attnplug.NoImplementationError):
                attnplug.scaled_dot_product_attention(Q, key, key, **arguments)


def test_supports_may_look_at_lengths_if_it_says_so() -> None:
    marked: list[int] = []

    class Short:
        shape_dependent = True

        @staticmethod
        def forward(params: SDPAParams) -> tuple[torch.Tensor, None]:
            marked.append(params.key.shape[2])
            return formula(params)

        @staticmethod
        def supports(params: SDPAParams) -> str | None:
            return None if params.key.shape[2] <= 8 else f"takes up to 8 keys, got {params.key.shape[2]}"

    register("short", kernel=Short)
    with attnplug.sdpa_kernel(["short", "aten_math"], set_priority=True):
        for keys, expected in ((4, "short"), (9, "aten_math"), (8, "short"), (9, "aten_math")):
            key = torch.randn(1, 2, keys, 8)
            with attnplug.record() as calls:
                attnplug.scaled_dot_product_attention(Q, key, key)
            assert calls[0].impl == expected
            reasons = {"short": ("takes up to 8 keys, got 9",)} if expected == "aten_math" else {}
            assert calls[0].passed_over == reasons
        # Calls that nobody records go a shorter way.
        for keys, runs in ((9, True), (4, False), (9, True)):
            key = torch.randn(1, 2, keys, 8)
            marked.clear()
            attnplug.scaled_dot_product_attention(Q, key, key)
            assert (marked == []) is runs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"softcp": 1.0}, "explain() got an unexpected keyword argument 'softcp'"),
        ({"cu_seq_q": torch.zeros(2, dtype=torch.int32)}, "explain() missing a required argument: 'cu_seq_k'"),
    ],
)
def test_an_argument_that_the_call_has_not_is_an_error_of_explain(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as caught:
        attnplug.explain(Q, Q, Q, **given)
    assert str(caught.value) == message
