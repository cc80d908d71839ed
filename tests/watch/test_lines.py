"""The line that a mismatch ends with makes a call of the same kind, which fails in the same way."""

from __future__ import annotations

import pytest
import torch

import attnplug
from attnplug import Mismatch
from attnplug.testing import CheckFailure
from spoiled_kernels import WrongOut, Zeros, register, tensors


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
