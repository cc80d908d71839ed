"""The one description of a call: its inverse, and that equal facts mean equal decisions, eager and compiled.

The facts and their inverse are private, and everything rests on them, so the first test is of them; the others claim
what users see.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnplug
from attnplug import Capabilities, CausalVariant, Feature, ImplSpec, SDPAParams
from attnplug._call.facts import CallFacts, Layout, example

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@st.composite
def calls(draw: st.DrawFn) -> SDPAParams:
    """Any combination of features in the form that kernels get."""

    def tensor(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.empty(shape, dtype=dtype or draw(st.sampled_from(DTYPES)))
        return made.requires_grad_(draw(st.booleans()))

    def maybe(value: Any) -> Any:
        return value if draw(st.booleans()) else None

    batch, kv_heads, queries, size, value_size = (draw(st.integers(1, 4)) for _ in range(5))
    heads, gqa = kv_heads * draw(st.integers(1, 3)), draw(st.booleans())
    heads = heads if gqa else kv_heads
    keys, dtype, varlen = queries + draw(st.integers(0, 3)), draw(st.sampled_from(DTYPES)), draw(st.booleans())
    paged = varlen and draw(st.booleans())
    starts = torch.zeros(batch + 1, dtype=torch.int32)
    rows = (keys, 2) if paged else (batch * keys,)
    return SDPAParams(
        tensor(batch * queries, heads, size, dtype=dtype)
        if varlen
        else tensor(batch, heads, queries, size, dtype=dtype),
        tensor(*rows, kv_heads, size, dtype=dtype) if varlen else tensor(batch, kv_heads, keys, size, dtype=dtype),
        tensor(*rows, kv_heads, value_size, dtype=dtype)
        if varlen
        else tensor(batch, kv_heads, keys, value_size, dtype=dtype),
        None if varlen else maybe(tensor(1, draw(st.sampled_from((1, heads))), queries, keys)),
        draw(st.sampled_from((0.0, 0.25))),
        draw(st.booleans()),
        gqa,
        scale=0.5,
        causal_variant=draw(st.sampled_from(CausalVariant)),
        window_size=draw(st.sampled_from(((-1, -1), (2, 0), (1, 3)))),
        softcap=draw(st.sampled_from((0.0, 20.0))),
        sinks=maybe(tensor(heads)),
        alibi_slopes=maybe(
            torch.empty(
                *((batch,) if draw(st.booleans()) else ()), heads, dtype=dtype if dtype is torch.float64 else None
            )
        ),
        seqused_k=maybe(torch.zeros(batch, dtype=torch.int32)),
        return_lse=draw(st.booleans()),
        cu_seq_q=starts if varlen else None,
        cu_seq_k=starts if varlen else None,
        max_q=queries if varlen else None,
        max_k=keys if varlen else None,
        block_table=torch.zeros(batch, 4, dtype=torch.int32) if paged else None,
    )


@settings(max_examples=300)
@given(calls(), st.booleans())
def test_an_example_has_the_facts_that_it_was_made_from(params: SDPAParams, with_layout: bool) -> None:
    facts = CallFacts.of(params)
    assert facts is not None
    if with_layout:
        facts = facts._replace(layout=Layout.of(params))
    made = example(facts)
    found = CallFacts.of(made)
    assert found is not None
    assert found._replace(layout=Layout.of(made) if with_layout else None) == facts


# --- what a kernel's `supports` may look at decides the same in eager and in compiled code ---


class Picky:
    """A kernel that runs anywhere, and declines what `declines` says of a call."""

    shape_dependent = True
    composite = True

    def __init__(self, declines: Any) -> None:
        self.declines = declines

    def supports(self, params: SDPAParams) -> str | None:
        return "does not like it" if self.declines(params) else None

    @staticmethod
    def forward(params: SDPAParams) -> tuple[Tensor, None]:
        return torch.full_like(params.query, 7.0), None


PICKY = {
    "strides of the queries": (
        lambda params: not params.query.is_contiguous(),
        lambda query: (query.transpose(1, 2).contiguous().transpose(1, 2), query, query, None),
    ),
    "a mask that is the same for each head": (
        lambda params: params.attn_mask is not None and params.attn_mask.shape[1] == 1,
        lambda query: (query, query, query, torch.zeros(1, 1, 4, 4)),
    ),
    "a mask that broadcasts over keys": (
        lambda params: params.attn_mask is not None and params.attn_mask.stride(-1) == 0,
        lambda query: (query, query, query, torch.zeros(1, 2, 4, 1).expand(1, 2, 4, 4)),
    ),
    "a batch of two": (
        lambda params: params.query.shape[0] == 2,
        lambda query: (query.repeat(2, 1, 1, 1), query.repeat(2, 1, 1, 1), query.repeat(2, 1, 1, 1), None),
    ),
    "a length": (lambda params: params.key.shape[-2] > 8, lambda query: (query, *2 * [query.repeat(1, 1, 3, 1)], None)),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("what", PICKY)
def test_what_a_kernel_looks_at_decides_the_same_eager_and_compiled(what: str, compiled: bool) -> None:
    declines, odd = PICKY[what]
    features = {Feature.BOOLEAN_MASK, Feature.ADDITIVE_MASK}
    attnplug.register_impl(
        ImplSpec(name="picky", kernel=Picky(declines), backend=None, capabilities=Capabilities(features=features))
    )
    try:

        def call(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            with attnplug.sdpa_kernel(["picky", "aten_math"], set_priority=True):
                return attnplug.scaled_dot_product_attention(query, key, value, mask)

        run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
        query = torch.randn(1, 2, 4, 8)
        own = query, query, query, torch.zeros(1, 2, 4, 4) if "mask" in what else None
        for _ in range(2):  # decided, then kept
            assert run(*own).eq(7.0).all()
            torch.testing.assert_close(run(*odd(query)), F.scaled_dot_product_attention(*odd(query)))
    finally:
        attnplug.unregister_impl("picky")


def test_a_flag_that_kernels_read_is_part_of_what_a_decision_is_kept_under() -> None:
    kernel = Picky(lambda params: torch.are_deterministic_algorithms_enabled())
    kernel.shape_dependent = False
    attnplug.register_impl(ImplSpec(name="picky", kernel=kernel, backend=None, priority=-99))
    query = torch.randn(1, 2, 4, 8)
    try:
        with attnplug.sdpa_kernel(["picky", "aten_math"], set_priority=True):
            assert attnplug.scaled_dot_product_attention(query, query, query).eq(7.0).all()
            torch.use_deterministic_algorithms(True)
            assert not attnplug.scaled_dot_product_attention(query, query, query).eq(7.0).any()
    finally:
        torch.use_deterministic_algorithms(False)
        attnplug.unregister_impl("picky")


# --- decisions are kept for the normal ways to call ---


def asks_once(call: Any) -> int:
    """Return how often `supports` is asked over three equal calls."""
    asked: list[SDPAParams] = []
    kernel = Picky(lambda params: asked.append(params))
    kernel.shape_dependent = False
    attnplug.register_impl(
        ImplSpec(name="picky", kernel=kernel, backend=None, capabilities=Capabilities(features=set(Feature)))
    )
    try:
        for _ in range(3):
            call()
    finally:
        attnplug.unregister_impl("picky")
    return len(asked)


QUERY = torch.randn(1, 2, 4, 8)
WAYS: dict[str, Any] = {
    "plain": lambda S: S(QUERY, QUERY, QUERY, impl="picky"),
    "three dimensions": lambda S: S(QUERY[0], QUERY[0], QUERY[0], impl="picky"),
    "a mask of two dimensions": lambda S: S(QUERY, QUERY, QUERY, torch.zeros(4, 4), impl="picky"),
    "five dimensions": lambda S: S(QUERY[None], QUERY[None], QUERY[None], impl="picky"),
    "training": lambda S: S(*(QUERY.clone().requires_grad_() for _ in range(3)), impl="picky"),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("way", WAYS)
def test_a_kernel_is_asked_once_about_equal_calls(way: str, autocast: bool) -> None:
    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            WAYS[way](attnplug.scaled_dot_product_attention)

    assert asks_once(call) == 1
