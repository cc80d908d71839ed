"""The line that a mismatch ends with makes a call of the same kind, which fails in the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnplug
from attnplug import Feature, Mismatch, SDPAParams
from attnplug.testing import CheckFailure
from spoiled_kernels import Formula, WrongOut, Zeros, register, tensors


def test_the_line_of_a_mismatch_repeats_it() -> None:
    impl = register(WrongOut)
    mask = torch.ones(1, 1, 9, 13).bool()
    query, key, value = tensors(9, 13, dtype=torch.float64)
    found: list[Mismatch] = []
    with attnplug.verify(1.0, on_mismatch=found.append):
        attnplug.scaled_dot_product_attention(query, key, value, mask, impl=impl)
    with pytest.raises(CheckFailure, match="out: largest error"):
        exec(found[0].call)


def test_the_line_has_all_that_the_call_asks_for() -> None:
    impl = register(Zeros)
    query = torch.randn(2, 4, 5, 8, dtype=torch.float64).transpose(1, 2).contiguous().transpose(1, 2)
    key = torch.randn(2, 2, 7, 8, dtype=torch.float64)
    found: list[Mismatch] = []
    with attnplug.verify(1.0, on_mismatch=found.append):
        attnplug.scaled_dot_product_attention(
            query, key, key, is_causal=True, scale=0.5, softcap=2.0, window_size=(3, 0), enable_gqa=True,
            sinks=torch.zeros(4, dtype=torch.float64), alibi_slopes=torch.ones(2, 4), return_lse=True,
            causal_variant=attnplug.CausalVariant.LOWER_RIGHT, seqused_k=torch.tensor([4, 7], dtype=torch.int32),
            impl=impl,
        )  # fmt: skip
        packed, starts = torch.randn(9, 2, 8), torch.tensor([0, 4, 9], dtype=torch.int32)
        attnplug.varlen_attn(packed, packed, packed, starts, starts, 5, 5, is_causal=True, impl=impl)
    lines = list(
        dict.fromkeys(mismatch.call for mismatch in found)
    )  # that of the first call is said for out and for lse
    assert [line.partition("; ")[2] for line in lines] == [
        "Call(batch=2, heads=4, kv_heads=2, queries=5, keys=7, causal_variant='LOWER_RIGHT', used=(4, 7), "
        "head_size=8, dtype='float64', is_causal=True, scale=0.5, window_size=(3, 0), softcap=2.0, sinks=True, "
        "alibi='bh', layout='transposed', lse=True).check('zeros')",
        "Call(heads=2, lengths_q=(4, 5), lengths_k=(4, 5), head_size=8, dtype='float32', is_causal=True)"
        ".check('zeros')",
    ]
    for line in lines:
        with pytest.raises(CheckFailure, match="largest error"):
            exec(line)


class WrongOfKeys(Formula):
    """Wrong only where keys are not contiguous, which one query cannot fail to be."""

    @classmethod
    def forward(cls, params: SDPAParams) -> tuple[Any, ...]:
        out, lse = super().forward(params)
        return out if params.key.is_contiguous() else out * 1.001, lse


class WrongOfLong(Zeros):
    """Each sequence by itself; wrong only of those longer than 16."""

    @classmethod
    def forward(cls, params: SDPAParams) -> tuple[Any, ...]:
        assert params.cu_seq_q is not None
        lengths = params.cu_seq_q.diff().tolist()
        query, key, value = (
            each.transpose(0, 1).split(lengths, 1) for each in (params.query, params.key, params.value)
        )
        parts = []
        for q, k, v, length in zip(query, key, value, lengths, strict=True):
            part = torch.softmax(params.scale * q @ k.mT, -1) @ v
            parts.append(part * 1.01 if length > 16 else part)
        return torch.cat(parts, 1).transpose(0, 1), None


def test_the_line_repeats_what_depends_on_where_keys_lie() -> None:
    impl = register(WrongOfKeys)
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 30, 2, 8).transpose(1, 2)
    _fails_again(lambda: attnplug.scaled_dot_product_attention(query, key, key, impl=impl))


class WrongOfSlopes(Formula):
    """Wrong only where slopes are not contiguous."""

    features = Formula.features | {Feature.ALIBI}

    @staticmethod
    def probabilities(params: SDPAParams) -> tuple[Tensor, Tensor]:
        assert params.alibi_slopes is not None
        i, j = (torch.arange(tensor.shape[2]) for tensor in (params.query, params.key))
        logits = params.scale * params.query @ params.key.mT
        logits = logits - params.alibi_slopes[..., None, None] * (i[:, None] - j).abs()
        return torch.softmax(logits, -1), torch.logsumexp(logits, -1)

    @classmethod
    def forward(cls, params: SDPAParams) -> tuple[Any, ...]:
        out, lse = super().forward(params)
        assert params.alibi_slopes is not None
        return out if params.alibi_slopes.is_contiguous() else out * 1.001, lse


@pytest.mark.parametrize(
    ("slopes", "layout"),
    [
        (torch.rand(2, 3)[:, :2], "framed"),
        (torch.rand(2, 2).mT, "column-major"),
        (torch.rand(2, 4)[:, ::2], "strided"),
        (torch.rand(4)[::2], "strided"),
        (torch.rand(1).expand(2), "strided"),
    ],
)
def test_the_line_repeats_what_depends_on_where_slopes_lie(slopes: torch.Tensor, layout: str) -> None:
    impl = register(WrongOfSlopes)
    query = torch.randn(2, 2, 9, 8)
    line = _fails_again(
        lambda: attnplug.scaled_dot_product_attention(query, query, query, alibi_slopes=slopes, impl=impl)
    )
    assert f"numbers_layout={layout!r}" in line


@pytest.mark.parametrize("shape", [(9, 13), (1, 1, 9, 13), (1, 1, 1, 13)])
def test_the_line_repeats_what_depends_on_rows_that_see_no_key(shape: tuple[int, ...]) -> None:
    impl = register(Formula)  # gives NaN there
    query, key, value = tensors(9, 13)
    mask = torch.ones(shape).bool()
    mask[..., -1, :] = False
    _fails_again(lambda: attnplug.scaled_dot_product_attention(query, key, value, mask, impl=impl))


@pytest.mark.parametrize("position", [0, 50, 99])
def test_the_line_of_many_sequences_has_the_one_that_is_wrong(position: int) -> None:
    impl = register(WrongOfLong)
    lengths = torch.full((100,), 3)
    lengths[position] = 20
    starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    query = torch.randn(int(starts[-1]), 2, 8)
    line = _fails_again(lambda: attnplug.varlen_attn(query, query, query, starts, starts, 20, 20, impl=impl))
    assert len(line) < 600


def _fails_again(call: Callable[[], object]) -> str:
    """Verify a wrong call, and return the line of its mismatch, which fails when it is pasted."""
    found: list[Mismatch] = []
    with attnplug.verify(1.0, on_mismatch=found.append):
        call()
    with pytest.raises(CheckFailure, match="out: largest error"):
        exec(found[0].call, {})
    return found[0].call
