"""What a block (a scope, a recording, a binding) put in place is gone when it is left, however it is left."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from types import FrameType
from typing import Any

import pytest
import torch.nn.functional as F

import attnplug
import forked
from attending import DEFAULT, FLASH, MATH, Attention, Q, ran, ran_in


def in_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=60)


# --- left out of order, twice, elsewhere, never ---


def scoped(name: str) -> Iterator[str]:
    with attnplug.sdpa_kernel(name):
        while True:
            yield ran()


@pytest.mark.parametrize("first", [0, 1])
def test_generators_may_end_in_any_order(first: int) -> None:
    generators = [scoped(MATH), scoped(FLASH)]
    assert [next(generator) for generator in generators] == [MATH, FLASH]
    generators.pop(first).close()
    assert ran() == (FLASH, MATH)[first]
    generators.pop().close()
    assert ran() == DEFAULT


def test_of_equal_scopes_the_one_that_is_left_goes() -> None:
    """Left by value, the first would take the last away and show the one between."""
    first, between, last = (attnplug.sdpa_kernel(name) for name in (MATH, FLASH, MATH))
    for scope in (first, between, last):
        scope.__enter__()
    first.__exit__()
    assert ran() == MATH
    last.__exit__()
    assert ran() == FLASH
    between.__exit__()
    assert ran() == DEFAULT


@pytest.mark.parametrize("how", ["closed", "collected", "closed in another thread"])
def test_a_generator_that_ends_early_takes_its_scope_along(how: str) -> None:
    generator: Any = scoped(MATH)
    assert next(generator) == ran() == MATH
    if how == "closed in another thread":
        in_thread(generator.close)
    elif how == "closed":
        generator.close()
    else:
        del generator
        gc.collect()
    assert ran() == DEFAULT


def test_a_scope_that_is_left_in_another_thread_leaves_the_other_alone() -> None:
    scope = attnplug.sdpa_kernel(MATH)
    scope.__enter__()

    def elsewhere() -> list[str]:
        with attnplug.sdpa_kernel(FLASH):
            scope.__exit__()
            return [ran()]

    assert in_thread(elsewhere) == [FLASH]
    assert ran() == DEFAULT


def test_a_scope_whose_thread_has_ended_can_be_left() -> None:
    scope = attnplug.sdpa_kernel(MATH)
    in_thread(scope.__enter__)
    scope.__exit__()
    assert ran() == DEFAULT


def test_a_scope_that_two_other_threads_are_in_is_refused_and_left_in_neither() -> None:
    scope, ready, done = attnplug.sdpa_kernel(MATH), threading.Barrier(3), threading.Event()

    def work() -> str:
        with scope:
            ready.wait(60)
            done.wait(60)
            return ran()

    with ThreadPoolExecutor(2) as pool:
        working = [pool.submit(work) for _ in range(2)]
        ready.wait(60)
        try:
            with pytest.raises(attnplug.ScopeError, match="several threads are in"):
                scope.__exit__()
        finally:
            done.set()
        assert [work.result(60) for work in working] == [MATH, MATH]


def test_a_scope_that_another_thread_is_in_too_is_left_out_of_order_in_its_own_thread_alone() -> None:
    scope, entered, done = attnplug.sdpa_kernel(MATH), threading.Event(), threading.Event()

    def work() -> str:
        with scope:
            entered.set()
            done.wait(60)
            return ran()

    with ThreadPoolExecutor(1) as pool:
        scope.__enter__()
        working = pool.submit(work)
        entered.wait(60)
        try:
            with attnplug.sdpa_kernel(FLASH):
                scope.__exit__()
                assert ran() == FLASH
            assert ran() == DEFAULT
        finally:
            done.set()
        assert working.result(60) == MATH


def test_leaving_what_was_not_entered_is_refused() -> None:
    scope, recording = attnplug.sdpa_kernel(MATH), attnplug.record()
    with scope, recording:
        pass
    for block in (scope, recording):
        with pytest.raises(attnplug.ScopeError, match="is left, but it was not entered"):
            block.__exit__()
    assert ran() == DEFAULT


def test_one_scope_may_be_entered_again_inside_itself() -> None:
    scope = attnplug.sdpa_kernel(MATH)
    with scope, attnplug.sdpa_kernel(FLASH):
        with scope:
            assert ran() == MATH
        assert ran() == FLASH
    assert ran() == DEFAULT


def test_a_recording_is_entered_once_at_a_time() -> None:
    recording = attnplug.record()
    with recording, pytest.raises(attnplug.ScopeError, match="entered already"):
        recording.__enter__()
    with recording as calls:
        attnplug.scaled_dot_product_attention(Q, Q, Q)
    assert len(calls) == 1


def test_recordings_may_end_in_any_order_and_in_any_thread() -> None:
    one, other = attnplug.record(), attnplug.record()
    calls, others = one.__enter__(), other.__enter__()
    one.__exit__()
    attnplug.scaled_dot_product_attention(Q, Q, Q)
    in_thread(other.__exit__)
    attnplug.scaled_dot_product_attention(Q, Q, Q)
    assert (len(calls), len(others)) == (0, 1)


def test_what_nobody_can_leave_any_more_is_left() -> None:
    """As a context manager of `contextlib` is that was entered by hand and forgotten."""
    scope, recording = attnplug.sdpa_kernel(MATH), attnplug.record()
    scope.__enter__(), recording.__enter__()
    assert ran() == MATH
    del scope, recording
    gc.collect()
    assert ran() == DEFAULT


WATCHING: dict[str, Callable[[], Any]] = {
    "a recording": attnplug.record,
    "a capture": attnplug.capture,
    "a summary": attnplug.summary,
    "a verification": lambda: attnplug.verify(1.0, reference=MATH),
}


@pytest.mark.parametrize("name", WATCHING)
def test_what_watches_goes_with_a_block_that_nobody_can_leave_any_more(name: str) -> None:
    """As when an interrupt comes at the first instruction of its end; `conftest.py` sees that nothing watches on."""
    block = WATCHING[name]()
    block.__enter__()
    attnplug.scaled_dot_product_attention(Q, Q, Q)
    gone = weakref.ref(block)
    del block
    gc.collect()
    assert gone() is None


def test_a_patch_and_a_binding_go_with_a_block_that_nobody_can_leave_any_more() -> None:
    before, module = F.scaled_dot_product_attention, Attention()
    patch, binding = attnplug.patch_torch(), attnplug.bind(module, MATH)
    with copy.deepcopy(patch):  # a copy is of no patch
        patch.__enter__(), binding.__enter__()
        assert ran_in(lambda: module(Q)) == [MATH] and F.scaled_dot_product_attention is not before
    assert F.scaled_dot_product_attention is not before
    del patch, binding
    gc.collect()
    assert ran_in(lambda: module(Q)) == [DEFAULT] and F.scaled_dot_product_attention is before


def test_what_was_never_a_block_stays_though_its_handle_is_forgotten() -> None:
    module = Attention()
    attnplug.bind(module, MATH)
    gc.collect()
    assert ran_in(lambda: module(Q)) == [MATH]
    program = """if True:
        import gc, torch, attnplug
        attnplug.patch_torch()
        gc.collect()
        query = torch.randn(1, 2, 4, 8)
        with attnplug.record() as calls:
            torch.nn.functional.scaled_dot_product_attention(query, query, query)
        print(len(calls))
    """
    assert forked.run(program).stdout == "1\n"


def test_the_end_of_a_process_says_nothing_of_blocks_that_it_is_in() -> None:
    program = """if True:
        import torch, attnplug
        blocks = [attnplug.patch_torch(), attnplug.bind(torch.nn.Linear(2, 2), "aten_math"), attnplug.summary()]
        blocks += [attnplug.sdpa_kernel("aten_math"), attnplug.record(), attnplug.verify(1.0, "aten_math")]
        for block in blocks:
            block.__enter__()
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_copies_of_a_block_that_is_entered_are_not_and_leave_nothing(copied: Callable[[Any], Any]) -> None:
    scope, recording, capturing = attnplug.sdpa_kernel(MATH), attnplug.record(), attnplug.capture()
    with scope, recording as calls, capturing as cases:
        for block in (scope, recording, capturing):
            with copied(block):  # a copy is another block
                pass
        gc.collect()
        attnplug.scaled_dot_product_attention(Q, Q, Q)
    assert [call.impl for call in calls] == [MATH] and len(cases) == 1 and ran() == DEFAULT


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, BaseException])
def test_an_exception_of_any_kind_leaves_every_block(error: type[BaseException]) -> None:
    def fail() -> None:
        raise error

    module = Attention(fail)
    attnplug.bind(module, MATH)
    decorated = attnplug.sdpa_kernel(MATH)(fail)
    with pytest.raises(error), attnplug.sdpa_kernel(FLASH), attnplug.record():
        module(Q)
    with pytest.raises(error), ExitStack() as stack:
        stack.enter_context(attnplug.sdpa_kernel(FLASH))
        decorated()
    assert ran() == DEFAULT


# --- interrupts ---


INTERRUPTS = 500


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers that interrupt")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_at_any_moment_leave_nothing() -> None:
    """A notebook's stop button, pressed again and again: in scopes, bindings, decorators and all that watches."""
    inner, outer = Attention(), Attention()
    outer.before = lambda: inner(Q)
    handles = [attnplug.bind(outer, FLASH), attnplug.bind(inner, MATH)]
    decorated = attnplug.sdpa_kernel(FLASH)(lambda: outer(Q))

    def blocks() -> None:
        while True:
            with attnplug.sdpa_kernel(MATH), attnplug.record(), attnplug.summary(), attnplug.verify(1e-9, MATH):
                decorated()

    def interrupt(_: int, frame: FrameType | None) -> None:
        while frame is not None and frame.f_code is not blocks.__code__:
            frame = frame.f_back
        if frame is not None:  # and not where this test counts: a second one may come before the timer is stopped
            raise KeyboardInterrupt

    with attnplug.sdpa_kernel(MATH):
        decorated()  # kernels are imported before: an interrupted import may leave Python's own lock taken
    before = signal.signal(signal.SIGALRM, interrupt)
    draw, wrong = random.Random(0), []
    try:
        for _ in range(INTERRUPTS):
            # again after a while, because Python swallows what is raised while it finalizes an object
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(20e-6, 400e-6), 0.1)
            with suppress(KeyboardInterrupt):
                blocks()
            signal.setitimer(signal.ITIMER_REAL, 0)
            with attnplug.record() as calls:
                attnplug.scaled_dot_product_attention(Q, Q, Q)
            wrong += [call.impl for call in calls if call.impl != DEFAULT]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        for handle in handles:
            handle.remove()
    assert not wrong


# --- all at once ---


def _work(seed: int, stop: threading.Event, wrong: list[str]) -> None:
    """Enter and leave scopes in any order, and look after each step whether the innermost is the one that runs."""
    draw, entered = random.Random(seed), []
    while not stop.is_set() or entered:
        if entered and (stop.is_set() or draw.random() < 0.5):
            entered.pop(draw.randrange(len(entered)))[1].__exit__()
        else:
            name = draw.choice([MATH, FLASH, DEFAULT])
            scope = attnplug.sdpa_kernel(name)
            scope.__enter__()
            entered.append((name, scope))
        expected = entered[-1][0] if entered else DEFAULT
        if (found := ran()) != expected:
            wrong.append(f"{found} instead of {expected}")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_threads_patches_registrations_and_forks_do_not_disturb_each_other() -> None:
    stop, wrong, ends = threading.Event(), [], []
    with ThreadPoolExecutor(6) as pool:
        working = [pool.submit(_work, seed, stop, wrong) for seed in range(6)]
        try:
            for turn in range(6):
                with attnplug.patch_torch():
                    attnplug.register_impl(attnplug.ImplSpec(name=f"one_of_many_{turn}", kernel=ran, backend=None))
                    child = os.fork()
                    if child == 0:
                        signal.alarm(30)
                        try:
                            with attnplug.sdpa_kernel(MATH), attnplug.patch_torch():
                                os._exit(ran() != MATH)
                        finally:
                            os._exit(2)  # what fails here must not wait for threads that a fork does not have
                    ends.append(os.waitpid(child, 0)[1])
                    attnplug.unregister_impl(f"one_of_many_{turn}")
        finally:
            stop.set()
        for work in working:
            work.result(60)
    assert not wrong and ends == [0] * 6
    assert ran() == DEFAULT
