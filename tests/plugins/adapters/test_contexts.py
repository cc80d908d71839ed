"""A library that makes tensor maps on the host finds the thread with a CUDA context, whichever thread it is."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import attnplug

pytest.importorskip("attnplug_adapters", reason="attnplug-adapters is not installed")
from adapters_on_standins import register, standin
from attnplug_adapters import specs
from attnplug_adapters.flash_attn3 import FlashAttn3
from attnplug_adapters.flash_attn4 import FlashAttn4
from attnplug_adapters.flashinfer import FlashInfer
from attnplug_adapters.sage_attention import SageAttention

CASES = [
    (FlashAttn3, "flash_attn3", specs.FLASH_ATTN3, ("_flash_attn_forward", "_flash_attn_backward")),
    (FlashAttn4, "flash_attn4", specs.FLASH_ATTN4, ("flash_attn_func", "_flash_attn_bwd")),
    (FlashInfer, "flashinfer", specs.FLASHINFER, ("single_prefill_with_kv_cache",)),
    (SageAttention, "sage2", specs.SAGE_ATTENTION, ("sageattn",)),
]


@pytest.mark.parametrize(("adapter", "name", "capabilities", "functions"), CASES)
def test_a_thread_that_never_called_cuda_is_given_its_context_before_the_library_is_called(
    adapter: Any, name: str, capabilities: Any, functions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    library, bound, called = standin(name), list[int](), list[tuple[str, bool]]()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: bound.append(threading.get_ident()))

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            called.append((function.__name__, threading.get_ident() in bound))
            return function(*arguments, **options)

        return run

    for each in functions:
        setattr(library, each, noting(getattr(library, each)))
    register(adapter(library), capabilities)
    inputs = [torch.randn(1, 2, 64, 64, dtype=torch.float16) for _ in range(3)]
    if len(functions) > 1:
        inputs = [tensor.requires_grad_() for tensor in inputs]

    def call() -> None:
        out = attnplug.scaled_dot_product_attention(*inputs, impl="emulated")
        if out.requires_grad:
            out.sum().backward()

    for _ in range(2):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(call).result()
            thread.submit(call).result()
    assert {*called} == {(each, True) for each in functions} and len(called) == 4 * len(functions)
    assert len(bound) == 2  # once for each thread
