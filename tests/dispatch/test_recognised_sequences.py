"""Packed sequences that are like a call before run at once: what is not quite like it must be seen all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import attnplug
from attnplug import ImplSpec, SDPAParams
from repeated import (
    EVERYTHING,
    PAGES,
    STARTS,
    TOKENS,
    Change,
    K,
    Packs,
    Q,
    Subclass,
    V,
    assert_same,
    forget,
    nested,
    outcome,
    row,
)


def packed(*given: Any, **options: Any) -> Change:
    """Return a call of two sequences of four and five tokens, with other first arguments, or with `options`."""
    usual = TOKENS, TOKENS, TOKENS, STARTS, STARTS, 5, 5
    return lambda: ((*given, *usual[len(given) :]), options)


PACKED: dict[str, Change] = {
    "nothing": packed(),
    "other lengths": packed(TOKENS, TOKENS, TOKENS, row(0, 1, 9), row(0, 1, 9), 8, 8),
    "a larger longest": packed(TOKENS, TOKENS, TOKENS, STARTS, STARTS, 6, 7),
    "starts of keys of their own": packed(TOKENS, TOKENS, TOKENS, STARTS, row(0, 3, 9), 5, 6),
    "starts on another device": packed(TOKENS, TOKENS, TOKENS, STARTS.to("meta")),
    "starts of numbers apart": packed(TOKENS, TOKENS, TOKENS, STARTS.repeat_interleave(2)[::2]),
    "a longest that is a bool": packed(TOKENS, TOKENS, TOKENS, STARTS, STARTS, 5, True),
    "a longest below zero": packed(TOKENS, TOKENS, TOKENS, STARTS, STARTS, 5, -1),
    "fewer tokens": packed(TOKENS[:7], TOKENS[:7], TOKENS[:7], row(0, 4, 7), row(0, 4, 7)),
    "more sequences": packed(TOKENS, TOKENS, TOKENS, row(0, 4, 6, 9), row(0, 4, 6, 9)),
    "no tokens": packed(TOKENS[:0], TOKENS[:0], TOKENS[:0], row(0, 0), row(0, 0)),
    "no keys": packed(TOKENS, TOKENS[:0], TOKENS[:0], STARTS, row(0, 0, 0), 5, 0),
    "no sequences": packed(TOKENS, TOKENS, TOKENS, row(0), row(0)),
    "fewer values than keys": packed(TOKENS, TOKENS, TOKENS[:8]),
    "fewer heads": packed(TOKENS[:, :2], TOKENS[:, :2], TOKENS[:, :2]),
    "fewer key heads": packed(TOKENS, TOKENS[:, :2], TOKENS[:, :2]),
    "another head size": packed(TOKENS[..., :4], TOKENS[..., :4], TOKENS[..., :4]),
    "a sequence beyond the tokens": packed(TOKENS, TOKENS, TOKENS, row(0, 4, 10), row(0, 4, 10), 6, 6),
    "a sequence that ends before it starts": packed(TOKENS, TOKENS, TOKENS, row(0, 5, 4), row(0, 5, 4)),
    "a sequence longer than the longest": packed(TOKENS, TOKENS, TOKENS, STARTS, STARTS, 4, 4),
    "starts of another dtype": packed(TOKENS, TOKENS, TOKENS, STARTS.long()),
    "keys of fewer sequences": packed(TOKENS, TOKENS, TOKENS, STARTS, row(0, 9), 5, 9),
    "no starts": packed(TOKENS, TOKENS, TOKENS, None),
    "no starts of keys": packed(TOKENS, TOKENS, TOKENS, STARTS, None),
    "a longest that is no number": packed(TOKENS, TOKENS, TOKENS, STARTS, STARTS, None),
    "four dimensions": packed(Q, K, V),
    "pages": packed(
        TOKENS, PAGES, PAGES, STARTS, None, seqused_k=row(4, 5), block_table=row(0, 3, 1, 2, 4, 5).view(2, 3)
    ),
    "pages without a table": packed(TOKENS, PAGES, PAGES, STARTS, None, seqused_k=row(4, 5)),
    "pages with starts, without a table": packed(TOKENS, PAGES, PAGES, STARTS, row(0, 2, 4)),
    "used lengths": packed(seqused_k=row(1, 2)),
    "used lengths that are too long": packed(seqused_k=row(1, 6)),
    "a nested key": packed(TOKENS, nested()),
    "a nested value": packed(TOKENS, TOKENS, nested()),
    "nested starts": packed(TOKENS, TOKENS, TOKENS, nested()),
    "a sparse key": packed(TOKENS, TOKENS.to_sparse()),
    "a key that is none": packed(TOKENS, None),
    "a subclass": packed(TOKENS.as_subclass(Subclass)),
    "fake tensors": lambda: packed(*[FakeTensorMode().from_tensor(TOKENS)] * 3)(),
    "a gradient": packed(TOKENS.clone().requires_grad_()),
    "a causal mask": packed(is_causal=True),
    "a number for a bool": packed(is_causal=1),
    "a scale below zero": packed(scale=-1.0),
    "not a number": packed(scale=float("nan")),
    "a window": packed(window_size=(1, 1)),
    "a window of numbers": packed(window_size=(1.0, 1.0)),
    "a softcap": packed(softcap=2.0),
    "slopes": packed(alibi_slopes=torch.ones(4)),
    "sinks": packed(sinks=torch.ones(4)),
    "an lse": packed(return_lse=True),
    "everything dropped": packed(dropout_p=1.0),
}


@pytest.fixture(params=["math_ref", "packs"])
def impl(request: pytest.FixtureRequest) -> Any:
    attnplug.register_impl(ImplSpec(name="packs", kernel=Packs(), backend=None, capabilities=EVERYTHING))
    yield request.param
    attnplug.unregister_impl("packs")


@pytest.mark.parametrize("change", PACKED)
def test_packed_sequences_after_others_are_decided_as_they_are_alone(change: str, impl: str) -> None:
    expected = {}
    for name in (change, "nothing"):
        forget()
        expected[name] = outcome(PACKED[name], impl, attnplug.varlen_attn)
    forget()
    for name in ("nothing", "a window", "a causal mask", "an lse", "used lengths", "pages", "fewer tokens") * 3:
        outcome(PACKED[name], impl, attnplug.varlen_attn)
    for name in (change, "nothing") * 3:
        assert_same(outcome(PACKED[name], impl, attnplug.varlen_attn), expected[name])


def test_packed_sequences_are_cast_to_the_dtype_of_autocast_whatever_was_cast_before() -> None:
    given, options = packed(*[TOKENS.bfloat16()] * 3)()
    for dtype in (torch.bfloat16, torch.float16) * 3:
        with torch.autocast("cpu", dtype):
            assert attnplug.varlen_attn(*given, **options, impl="math_ref").dtype is dtype


def test_packed_sequences_without_queries_or_keys_reach_no_kernel() -> None:
    lengths = []

    def forward(params: SDPAParams) -> tuple[Tensor, None]:
        lengths.append((params.query.shape[0], params.key.shape[0]))
        return params.query.clone(), None

    packed_alone = attnplug.Capabilities(features=(attnplug.Feature.VARLEN,), dense=False)
    attnplug.register_impl(ImplSpec(name="counts", kernel=forward, backend=None, capabilities=packed_alone))
    for queries, keys in ((9, 9), (9, 9), (9, 9), (9, 0), (0, 9)):
        starts = [row(0, 4, 9) if tokens else row(0, 0, 0) for tokens in (queries, keys)]
        out = attnplug.varlen_attn(TOKENS[:queries], TOKENS[:keys], TOKENS[:keys], *starts, 5, 5, impl="counts")
        assert out.any() or 0 in (queries, keys)
    attnplug.unregister_impl("counts")
    assert lengths == [(9, 9)] * 3
