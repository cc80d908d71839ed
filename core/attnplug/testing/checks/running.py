"""Running more than once, in two threads, and under autocast."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import attnplug
from attnplug import Feature
from attnplug._accuracy import Outcome
from attnplug.testing._call import Call, compare, run
from attnplug.testing._checks import check
from attnplug.testing._failure import failing, failure
from attnplug.testing._subject import Subject
from attnplug.testing.checks.varlen import PAGE_SIZES, packed

REPEATS, ROUNDS = 3, 8


@check()
def check_calls_do_not_depend_on_earlier_calls(subject: Subject) -> None:
    """A call gives the same after others of its shape, of other shapes, and with other numbers."""
    calls = [subject.call(seed=seed, keys=keys) for keys in (40, 70) for seed in (1, 2)]
    subject.compare(*calls, *calls)


@check()
def check_calls_that_repeat_another(subject: Subject) -> None:
    """Calls that differ in their numbers alone, lengths among them, or in where tensors start, are right each time."""
    kinds: list[dict[str, Any]] = [{}, {"scale": 0.3}]
    if subject.has(Feature.CAUSAL):
        kinds.append({"is_causal": True})
    if subject.has(Feature.GQA):
        kinds.append({"heads": 4, "kv_heads": 2})
    for kind in kinds:
        layouts = ("contiguous", "contiguous", "offset", "misaligned", "contiguous")
        for gradients in dict.fromkeys(((), subject.gradients)):
            calls = (subject.call(layout=at, seed=seed, gradients=gradients, **kind) for seed, at in enumerate(layouts))
            subject.compare(*calls)
    if subject.has(Feature.VARLEN):
        _compare_repeated_sequences(subject)


def _compare_repeated_sequences(subject: Subject) -> None:
    """Compare calls of as many tokens each time, in sequences of other lengths; the longest ones are the same."""
    lengths = [((5, 40, 17), (9, 70, 33)), ((40, 17, 5), (33, 9, 70)), ((17, 5, 40), (70, 33, 9))]
    kinds: list[dict[str, Any]] = [{"gradients": gradients} for gradients in dict.fromkeys(((), subject.gradients))]
    if subject.has(Feature.SINKS):
        kinds.append({"sinks": True})
    if subject.has(Feature.PAGED):
        kinds += ({"page_size": size} for size in PAGE_SIZES)
    for kind in kinds:
        subject.compare(*(packed(subject, *each, seed=seed, **kind) for seed, each in enumerate(lengths * 2)))


@check(Feature.DETERMINISTIC)
def check_deterministic(subject: Subject) -> None:
    """Repeated runs give equal bits, of gradients too, whether or not PyTorch is told to insist on it."""
    call, inputs = subject.one(_of_many_sums(subject))
    _assert_repeats(call, [run(subject.name, call, inputs) for _ in range(REPEATS)])
    with _determinism_asked_for():
        _assert_repeats(call, [run(subject.name, call, inputs) for _ in range(REPEATS)])


@check(may_decline=True)
def check_deterministic_algorithms(subject: Subject) -> None:
    """Under torch.use_deterministic_algorithms(True), runs give equal bits, or are declined or refused."""
    call = _of_many_sums(subject)
    with _determinism_asked_for():
        call, inputs = subject.one(call)
        try:
            outcomes = [call.run(subject.name, inputs) for _ in range(REPEATS)]
        except RuntimeError as error:
            if "determinis" not in str(error):
                raise
            subject.declined.append(str(error))
        else:
            _assert_repeats(call, outcomes)


def _of_many_sums(subject: Subject) -> Call:
    """Return a call whose sums are of more than two parts; two are the same in any order.

    Keys are in three tiles of 64 or, in a full run, of 128, and groups have four heads.
    """
    heads = {"heads": 4, "kv_heads": 1} if subject.has(Feature.GQA) else {"heads": 2}
    lengths = {"queries": 300, "keys": 400} if subject.full else {"queries": 20, "keys": 150}
    return subject.call(**heads, **lengths, batch=1, gradients=subject.gradients)


@contextmanager
def _determinism_asked_for() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(_WORKSPACE)
    os.environ[_WORKSPACE] = workspace or ":4096:8"  # else PyTorch refuses all products on a GPU
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        if workspace is None:
            del os.environ[_WORKSPACE]


_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def _assert_repeats(call: Call, outcomes: list[Outcome]) -> None:
    first, *others = outcomes
    for again in others:
        if not torch.equal(first.out, again.out):
            raise failure(call, "out differs between two runs")
        for name, gradient in first.gradients.items():
            if not torch.equal(gradient, again.gradients[name]):
                raise failure(call, f"the gradient of {name} differs between two runs")


@check()
def check_two_threads_at_once(subject: Subject) -> None:
    """Two threads that call at the same time, with other shapes and numbers, do not disturb each other."""
    calls = [subject.call(seed=1, batch=1, gradients=subject.gradients), subject.call(seed=2, queries=9, keys=70)]
    taken = subject.taken(calls)
    if not taken:
        return
    failures: list[BaseException] = []
    start = threading.Barrier(len(taken))

    def work(position: int) -> None:
        call, inputs = taken[position]
        try:
            start.wait()
            outcomes = [call.run(subject.name, inputs) for _ in range(ROUNDS)]
            for outcome in outcomes:
                compare(subject.name, call, inputs, outcome)
        except Exception as error:  # the thread that waits for this one raises it
            failures.append(error)

    threads = [threading.Thread(target=work, args=(position,)) for position in range(len(taken))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failure(None, f"with two threads at once: {failures[0]}")


@check(dtypes="float32")
def check_autocast(subject: Subject) -> None:
    """Under autocast, float32 inputs are computed, and out is, in autocast's dtype; gradients are float32."""
    names = ("float16", "bfloat16") if subject.device.startswith("cuda") else ("bfloat16", "float16")
    lower = next((name for name in names if Subject(subject.record, subject.device, name, False).parts), None)
    if lower is None:
        subject.uncovered.append("declares no half precision dtype")
        return
    low_call = subject.call(dtype=lower, gradients=subject.gradients)
    low_call, low_inputs = subject.one(low_call)
    call = low_call.but(dtype="float32")
    inputs = call.make()
    for name in ("query", "key", "value"):  # float32 numbers that the lower dtype holds exactly
        inputs.arguments[name] = low_inputs.arguments[name].float()
    inputs.grad_out = low_inputs.grad_out.float()
    arguments, leaves = call.with_leaves(inputs)
    with failing(call, f"under autocast to {lower}: "):
        with torch.autocast(torch.device(subject.device).type, dtype=getattr(torch, lower)):
            out = attnplug.scaled_dot_product_attention(**arguments, impl=subject.name)
        gradients = call.backward(inputs, out, None, leaves)
    for name, gradient in gradients.items():
        if gradient.dtype != torch.float32:
            raise failure(call, f"under autocast: the gradient of {name} is {gradient.dtype}, not float32")
    lowered = {name: gradient.to(getattr(torch, lower)) for name, gradient in gradients.items()}
    compare(subject.name, low_call, low_inputs, Outcome(out.detach(), None, lowered))
