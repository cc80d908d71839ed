"""`bind_cuda_context` gives each thread its CUDA context once, wherever a kernel asks for it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import attnplug


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The threads that are bound, each with its device."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append((threading.get_ident(), device)))
    return found


def in_a_new_thread(function: Any, *arguments: Any) -> Any:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *arguments).result()


def twice() -> int:
    attnplug.bind_cuda_context()
    attnplug.bind_cuda_context()
    return threading.get_ident()


def test_each_thread_is_bound_once_for_its_device(bound: list[tuple[int, int]]) -> None:
    threads = [in_a_new_thread(twice) for _ in range(2)]
    assert bound == [(thread, 1) for thread in threads]


def test_a_thread_that_asked_before_there_was_a_context_is_bound_later(
    bound: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def before_and_after() -> None:
        with monkeypatch.context() as before:
            before.setattr(torch.cuda, "is_initialized", lambda: False)
            attnplug.bind_cuda_context()
        assert not bound
        attnplug.bind_cuda_context()

    in_a_new_thread(before_and_after)
    assert len(bound) == 1


def test_a_trace_does_not_break_at_it(bound: list[tuple[int, int]]) -> None:
    def function(x: Tensor) -> Tensor:
        attnplug.bind_cuda_context()
        return x + 1

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert in_a_new_thread(compiled, torch.zeros(1)).item() == 1
    assert len(bound) == 1
