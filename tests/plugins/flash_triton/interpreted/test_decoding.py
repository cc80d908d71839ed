"""Few queries over keys whose number changes from call to call, for which one plan is filled in again and again."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import attnplug
from attnplug.testing import assert_right
from attnplug_flash_triton import impl
from interpreted_calls import LOWER_RIGHT

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of divisions by 0 that are then left out

LENGTHS = [1, 40, 16, 130, 2, 129, 39]
"""Split among one to four programs for each head of keys, and growing and shrinking from one call to the next."""
LAYOUTS = {
    "cut": lambda tensor: tensor,
    "whole": lambda tensor: tensor.contiguous(),
    "rows first": lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
    "odd": lambda tensor: torch.cat([tensor, tensor[..., :3]], -1)[..., : tensor.shape[-1]],
    "columns": lambda tensor: tensor.mT.contiguous().mT,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True, "causal_variant": LOWER_RIGHT},
    "window, sinks": {
        "window_size": (20, 0),
        "causal_variant": LOWER_RIGHT,
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0]),
    },
    "softcap, alibi": {"softcap": 2.0, "alibi_slopes": torch.tensor([0.3, 0.7, 0.1, 0.5])},
}


def caches(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 130, size, generator=generator).to(dtype) for size in (24, 16)]


@pytest.mark.parametrize(
    ("case", "dtype"), [*zip(CASES, [torch.float16, torch.float32] * 2, strict=True)], ids=[*CASES]
)
def test_each_length_of_a_decode_loop_is_right_in_whatever_layout(case: str, dtype: torch.dtype) -> None:
    choice, cache = random.Random(case), caches(dtype)
    for queries in (1, 3):
        for length in LENGTHS:
            key, value = (LAYOUTS[choice.choice([*LAYOUTS])](tensor[:, :, :length]) for tensor in cache)
            query = torch.randn(1, 4, queries, 24).to(dtype)
            call = dict(query=query, key=key, value=value, enable_gqa=True, **CASES[case])
            if choice.random() < 0.3:
                call["seqused_k"] = torch.tensor([(length + 1) // 2], dtype=torch.int32)
            if choice.random() < 0.5:
                assert_right(call, *attnplug.scaled_dot_product_attention(**call, return_lse=True, impl="flash_triton"))
            else:
                assert_right(call, attnplug.scaled_dot_product_attention(**call, impl="flash_triton"))


@pytest.mark.usefixtures("memory_is_nan")
def test_each_length_of_a_decode_loop_over_pages_is_right() -> None:
    table = torch.randperm(80, generator=torch.Generator().manual_seed(1)).view(2, 40).int()
    key, value = (torch.randn(80, 8, 2, size) for size in (24, 16))
    for length in LENGTHS:
        call = dict(
            query=torch.randn(3, 4, 24),  # the last one is of no sequence
            key=key,
            value=value,
            cu_seq_q=torch.arange(3, dtype=torch.int32),
            cu_seq_k=None,
            max_q=1,
            max_k=length,
            seqused_k=torch.tensor([length, length // 2], dtype=torch.int32),
            block_table=table,
            is_causal=True,
            enable_gqa=True,
        )
        out, lse = attnplug.varlen_attn(**call, return_lse=True, impl="flash_triton")
        assert_right(call | {"query": call["query"][:2]}, out[:2], lse[:, :2])
        assert not out[2].any()
        assert (lse[:, 2] == -torch.inf).all()


def test_dropout_in_a_decode_loop_draws_what_it_draws_for_each_length_alone() -> None:
    query, cache = torch.randn(1, 4, 1, 24), caches(torch.float32)

    def decoded(length: int) -> Tensor:
        torch.manual_seed(length)
        given = (query, *(tensor[:, :, :length] for tensor in cache))
        return attnplug.scaled_dot_product_attention(*given, dropout_p=0.3, enable_gqa=True, impl="flash_triton")

    of_loop = [decoded(length) for length in LENGTHS]
    for length, out in zip(LENGTHS, of_loop, strict=True):
        impl._plans.clear()
        impl._growing.clear()
        assert torch.equal(decoded(length), out)
