"""What adapters make of pages that a kernel reads whole."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnplug

pytest.importorskip("attnplug_adapters", reason="attnplug-adapters is not installed")
from adapters_on_standins import register, standin
from attnplug_adapters import specs
from attnplug_adapters.flash_attn3 import FlashAttn3
from attnplug_adapters.flash_attn4 import FlashAttn4

POOLS: dict[str, tuple[Callable[[], list[torch.Tensor]], bool]] = {
    "keys and values apart": (lambda: [torch.randn(5, 96, 2, 16).half() for _ in range(2)], False),
    "keys and values in turn": (lambda: [*torch.randn(5, 2, 96, 2, 16).half().unbind(1)], False),
    "heads first": (lambda: [torch.randn(5, 2, 96, 16).half().transpose(1, 2) for _ in range(2)], False),
    "layers, keys and values in turn, heads first": (
        lambda: [*torch.randn(5, 3, 2, 2, 96, 16).half()[:, 1].transpose(2, 3).unbind(1)],
        False,
    ),
    "a row between pages": (lambda: [torch.randn(5, 97, 2, 16).half()[:, 1:] for _ in range(2)], True),
    "values otherwise than keys": (
        lambda: [torch.randn(5, 96, 2, 16).half(), torch.randn(5, 192, 2, 16).half()[:, :96]],
        True,
    ),
    "pages of a prime number of keys": (lambda: [torch.randn(5, 67, 2, 16).half() for _ in range(2)], False),
    "such pages, apart by no whole number of keys": (
        lambda: [torch.randn(5, 67 * 32 + 8).half()[:, : 67 * 32].view(5, 67, 2, 16) for _ in range(2)],
        True,
    ),
    "one page": (lambda: [torch.randn(1, 96, 2, 16).half() for _ in range(2)], False),
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    ("adapter", "library", "capabilities", "function"),
    [
        (FlashAttn3, "flash_attn3", specs.FLASH_ATTN3, "_flash_attn_forward"),
        (FlashAttn4, "flash_attn4", specs.FLASH_ATTN4, "flash_attn_varlen_func"),
    ],
)
def test_pages_that_are_cut_are_copied_only_where_they_must_be(
    adapter: Any, library: str, capabilities: Any, function: str, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool may be most of a GPU's memory."""
    module, given = standin(library), list[torch.Tensor]()
    run = getattr(module, function)

    def noting(*arguments: Any, **options: Any) -> Any:
        bound = inspect.signature(run).bind(*arguments, **options).arguments
        given.extend((bound["k"], bound["v"]))
        return run(*arguments, **options)

    monkeypatch.setattr(module, function, functools.wraps(run)(noting))
    register(adapter(module), capabilities)
    make, is_copied = POOLS[pool]
    key, value = make()
    pages, size = key.shape[:2]
    table = torch.tensor([[3, 1], [0, 4]] if pages > 1 else [[0, 0], [0, 0]], dtype=torch.int32)
    used = torch.tensor([size + 5 if pages > 1 else 50, 7], dtype=torch.int32)
    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    options: dict[str, Any] = dict(cu_seq_q=starts, cu_seq_k=None, max_q=5, max_k=2 * size, is_causal=True)
    options |= dict(seqused_k=used, block_table=table)
    tensors = torch.randn(8, 2, 16).half(), key, value
    found = attnplug.varlen_attn(*tensors, **options, impl="emulated")
    torch.testing.assert_close(found, attnplug.varlen_attn(*tensors, **options, impl="math_ref"), rtol=1e-2, atol=1e-2)
    memory = [tensor.untyped_storage().data_ptr() for tensor in (key, value)]
    assert ([tensor.untyped_storage().data_ptr() for tensor in given] != memory) == is_copied
