"""What everybody who watches calls relies on: recordings, checks against a reference, metrics, profiler ranges.

No public name hangs somebody on a thread, so these tests use the private ones that all of them share.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import attnplug
from attnplug import ImplSpec, SDPAParams
from attnplug._selection.watching import RecordedCall, Watcher, add_watcher, remove_watcher, unwatched

Q = torch.randn(1, 2, 4, 8)
attend = attnplug.scaled_dot_product_attention


class Opaque:
    """A kernel that no trace looks into."""

    @staticmethod
    def forward(params: SDPAParams) -> tuple[Tensor, None]:
        return torch.softmax(params.scale * params.query @ params.key.mT, -1) @ params.value, None

    @staticmethod
    def backward(params: SDPAParams, grad_out: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        return grad_out, grad_out, grad_out


class Sees(Watcher):
    """Keeps what it is told, and the tensors."""

    sees_tensors = True

    def __init__(self) -> None:
        self.calls: list[RecordedCall] = []
        self.results: list[tuple[SDPAParams, Any]] = []

    def told(self, call: RecordedCall) -> None:
        self.calls.append(call)

    def seen(self, call: RecordedCall, params: SDPAParams, result: Any) -> None:
        self.results.append((params, result))

    @property
    def names(self) -> list[str]:
        return [call.impl for call in self.calls]


@contextmanager
def watching(watcher: Any, everywhere: bool = False) -> Iterator[Any]:
    add_watcher(watcher, everywhere)
    try:
        yield watcher
    finally:
        remove_watcher(watcher)


def in_thread(function: Callable[[], Any]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_a_watcher_sees_the_calls_of_its_thread_alone() -> None:
    with watching(Sees()) as sees:
        attend(Q, Q, Q, impl="aten_math")
        in_thread(lambda: attend(Q, Q, Q))
    attend(Q, Q, Q)
    assert sees.names == ["aten_math"]


def test_a_watcher_of_the_process_sees_threads_that_are_there_and_threads_that_come() -> None:
    ready, go = threading.Event(), threading.Event()

    def early() -> None:
        attend(Q, Q, Q)
        ready.set()
        go.wait(10)
        attend(Q, Q, Q, impl="aten_flash")

    thread = threading.Thread(target=early)
    thread.start()
    ready.wait(10)
    with watching(Sees(), everywhere=True) as sees:
        go.set()
        thread.join()
        in_thread(lambda: attend(Q, Q, Q, impl="aten_math"))
    in_thread(lambda: attend(Q, Q, Q))
    attend(Q, Q, Q)
    assert sees.names == ["aten_flash", "aten_math"]


def test_every_route_is_watched() -> None:
    routes: dict[str, Callable[[], Any]] = {
        "passthrough": lambda: attend(Q, Q, Q),
        "kept": lambda: attend(Q, Q, Q, impl="aten_flash"),
        "a mask": lambda: attend(Q, Q, Q, torch.zeros(4, 4), impl="aten_math"),
        "three dimensions": lambda: attend(Q[0], Q[0], Q[0], impl="aten_flash"),
        "patched": lambda: torch.nn.functional.scaled_dot_product_attention(Q, Q, Q),
    }
    with attnplug.patch_torch(), watching(Sees()) as sees:
        for _ in range(2):
            for call in routes.values():
                call()
    assert sees.names == ["torch", "aten_flash", "aten_math", "aten_flash", "torch"] * 2
    assert {call.device for call in sees.calls} == {"cpu"}


def test_what_is_seen_are_the_tensors_of_the_call_and_its_differentiable_result() -> None:
    query = Q.clone().requires_grad_()
    with watching(Sees()) as sees:
        out = attend(query, Q, Q, impl="aten_flash")
    ((params, result),) = sees.results
    assert params.query is query
    assert torch.equal(result[0], out)
    assert result[0].requires_grad


def test_who_stands_around_a_call_may_give_another_result() -> None:
    class Doubles(Watcher):
        def around(self, call: RecordedCall, params: SDPAParams, run: Callable[[SDPAParams], Any]) -> Any:
            out, lse = run(params)
            return out * 2, lse

    expected = attend(Q, Q, Q, impl="aten_math")
    with watching(Doubles()):
        assert torch.equal(attend(Q, Q, Q, impl="aten_math"), expected * 2)


def test_calls_that_a_watcher_makes_unwatched_are_seen_by_nobody() -> None:
    with watching(Sees()) as sees:
        with unwatched():
            attend(Q, Q, Q)
        attend(Q, Q, Q, impl="aten_math")
    assert sees.names == ["aten_math"]


def test_a_call_knows_the_bound_module_that_it_is_made_in() -> None:
    class Block(nn.Module):
        def forward(self, query: Tensor) -> Any:
            return attend(query, query, query)

    inner, outer = Block(), nn.Sequential(nn.Identity())
    outer.extend([inner, Block()])
    handles = attnplug.bind(inner, "aten_math"), attnplug.bind(outer, "aten_math")
    with attnplug.record() as calls:
        with attnplug.sdpa_kernel("aten_math"):
            attend(Q, Q, Q)
        outer(Q)
    for handle in handles:
        handle.remove()
    assert [call.module for call in calls] == ["", "Block", "Sequential"]


@pytest.mark.parametrize(("backend", "impl"), [("eager", "torch"), ("aot_eager", "aten_math"), ("inductor", "opaque")])
def test_compiled_calls_hand_over_their_tensors_where_somebody_wants_them(backend: str, impl: str) -> None:
    attnplug.register_impl(ImplSpec(name="opaque", kernel=Opaque, backend=None))
    counter = CompileCounterWithBackend(backend)
    function = torch.compile(lambda query: attend(query, query, query, impl=impl), backend=counter, fullgraph=True)
    query = Q.clone().requires_grad_()
    expected = function(query)
    for _ in range(2):
        with watching(Sees()) as sees:
            out = function(query)
        out.sum().backward()
        assert sees.names == [impl]
        ((params, result),) = sees.results
        assert torch.equal(params.query, query)
        assert torch.equal(result[0], out)
        assert torch.equal(out, expected)
    with attnplug.record() as calls:
        function(query)
    assert [call.impl for call in calls] == [impl]
    function(query)
    assert counter.frame_count == 3  # for nobody, for tensors, for calls alone
    attnplug.unregister_impl("opaque")


def test_a_watcher_of_the_process_is_told_of_calls_that_were_compiled_before_it_came() -> None:
    function = torch.compile(lambda query: attend(query, query, query), backend="eager", fullgraph=True)
    function(Q)
    with watching(Sees(), everywhere=True) as sees:
        function(Q)
        in_thread(lambda: function(Q))
    assert sees.names == ["torch", "torch"]


def test_watchers_come_and_go_while_other_threads_do_the_same() -> None:
    """Lost updates would leave a watcher behind, or take another's away."""
    stop = threading.Event()
    missed: list[str] = []

    def record() -> None:
        while not stop.is_set():
            with attnplug.record() as calls:
                attend(Q, Q, Q)
            if len(calls) != 1:
                missed.append(str(calls))

    threads = [threading.Thread(target=record) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        with watching(Sees(), everywhere=True):
            pass
    stop.set()
    for thread in threads:
        thread.join()
    assert not missed
    with attnplug.record() as calls:
        in_thread(lambda: attend(Q, Q, Q))
    assert calls == []
