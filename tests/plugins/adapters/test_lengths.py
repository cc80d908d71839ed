"""Lengths, pages, sinks and slopes that do not lie side by side in memory, which most libraries refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnplug
from attnplug.testing import Call

pytest.importorskip("attnplug_adapters", reason="attnplug-adapters is not installed")
from adapters_on_standins import register, standin
from attnplug_adapters import specs
from attnplug_adapters.flash_attn2 import FlashAttn2
from attnplug_adapters.flash_attn3 import FlashAttn3
from attnplug_adapters.flash_attn4 import FlashAttn4
from attnplug_adapters.flashinfer import FlashInfer
from attnplug_adapters.sage_attention import SageAttention
from attnplug_adapters.xformers import XFormers

NUMBERS = "cu_seq_q", "cu_seq_k", "seqused_k", "block_table", "sinks", "alibi_slopes"
ADAPTERS: list[tuple[Any, str, Any, str]] = [
    (FlashAttn2, "flash_attn2", specs.FLASH_ATTN2, "float16"),
    (FlashAttn3, "flash_attn3", specs.FLASH_ATTN3, "bfloat16"),
    (FlashAttn4, "flash_attn4", specs.FLASH_ATTN4, "float16"),
    (SageAttention, "sage2", specs.SAGE_ATTENTION, "float16"),
    (XFormers, "xformers", specs.XFORMERS, "float32"),
    (FlashInfer, "flashinfer", specs.FLASHINFER, "float16"),
]
CALLS: list[dict[str, Any]] = [
    dict(lengths_q=(3, 5), lengths_k=(9, 4)),
    dict(lengths_q=(3, 5), lengths_k=(9, 4), used=(7, 4)),
    dict(lengths_q=(3, 5), lengths_k=(300, 4), page_size=256),
    dict(lengths_q=(3,), lengths_k=(9,), page_size=256),  # one page of one sequence: any stride is contiguous
    dict(queries=5, keys=9, used=(7, 4)),
]


def every_second(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor + 1], -1)[..., 0]


def in_columns(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor + 1], 0)[0] if tensor.dim() == 1 else tensor.mT.contiguous().mT


@pytest.mark.parametrize("layout", [every_second, in_columns], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize(("adapter", "library", "capabilities", "dtype"), ADAPTERS, ids=[each[1] for each in ADAPTERS])
def test_numbers_that_lie_apart_in_memory_are_those_that_lie_side_by_side(
    adapter: Any, library: str, capabilities: Any, dtype: str, layout: Callable[[Tensor], Tensor]
) -> None:
    register(adapter(standin(library)), capabilities)
    taken = 0
    for fields in CALLS:
        for more in ({}, {"sinks": True}, {"alibi": "bh"}):
            for gradients in ((), ("query", "key", "value", *more.keys() & {"sinks"})):
                kind: dict[str, Any] = fields | more
                call = Call(**kind, causal_variant="LOWER_RIGHT", head_size=64, dtype=dtype, gradients=gradients)
                inputs, apart = call.make(), call.make()
                for name, tensor in apart.arguments.items():
                    if name in NUMBERS and tensor is not None:
                        apart.arguments[name] = layout(tensor)
                if attnplug.can_use_impl("emulated", call.params(inputs)):
                    expected, found = call.run("emulated", inputs), call.run("emulated", apart)
                    torch.testing.assert_close(found.out, expected.out)
                    torch.testing.assert_close(found.gradients, expected.gradients)
                    taken += 1
    assert taken > 0
