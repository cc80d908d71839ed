"""Running more than once, in two threads, and under autocast."""

from __future__ import annotations

import threading

import torch

import attnplug
from attnplug import Feature
from attnplug.testing._call import Outcome
from attnplug.testing._checks import check
from attnplug.testing._compare import compare, failure, run
from attnplug.testing._subject import Subject

REPEATS, ROUNDS = 3, 8


@check()
def check_calls_do_not_depend_on_earlier_calls(subject: Subject) -> None:
    """A call gives the same after others of its shape, of other shapes, and with other numbers."""
    calls = [subject.call(seed=seed, keys=keys) for keys in (40, 70) for seed in (1, 2)]
    subject.compare(*calls, *calls)


@check(Feature.DETERMINISTIC)
def check_deterministic(subject: Subject) -> None:
    """Repeated runs give equal bits, of gradients too."""
    fields = {"heads": 4, "kv_heads": 2} if subject.has(Feature.GQA) else {"heads": 4}
    call, inputs = subject.one(subject.call(queries=150, keys=170, **fields, gradients=subject.gradients))
    first = run(subject.name, call, inputs)
    for _ in range(REPEATS):
        again = run(subject.name, call, inputs)
        if not torch.equal(first.out, again.out):
            raise failure(subject.name, call, "out differs between two runs")
        for name, gradient in first.gradients.items():
            if not torch.equal(gradient, again.gradients[name]):
                raise failure(subject.name, call, f"the gradient of {name} differs between two runs")


@check()
def check_two_threads_at_once(subject: Subject) -> None:
    """Two threads that call at the same time, with other shapes and numbers, do not disturb each other."""
    calls = [subject.call(seed=1, queries=30, gradients=subject.gradients), subject.call(seed=2, keys=70)]
    taken = subject.taken(calls)
    failures: list[BaseException] = []
    start = threading.Barrier(len(taken))

    def work(position: int) -> None:
        call, inputs = taken[position]
        try:
            start.wait()
            outcomes = [call.run(subject.name, inputs) for _ in range(ROUNDS)]
            for outcome in outcomes:
                compare(subject.name, call, inputs, outcome)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(position,)) for position in range(len(taken))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failure(subject.name, None, f"with two threads at once: {failures[0]}")


@check(only_dtype="float32")
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
    try:
        with torch.autocast(torch.device(subject.device).type, dtype=getattr(torch, lower)):
            out = attnplug.scaled_dot_product_attention(**arguments, impl=subject.name)
        gradients = call.backward(inputs, out, None, leaves)
    except Exception as error:
        raise failure(subject.name, call, f"under autocast to {lower}: {type(error).__name__}: {error}") from error
    for name, gradient in gradients.items():
        if gradient.dtype != torch.float32:
            raise failure(
                subject.name, call, f"under autocast: the gradient of {name} is {gradient.dtype}, not float32"
            )
    lowered = {name: gradient.to(getattr(torch, lower)) for name, gradient in gradients.items()}
    compare(subject.name, low_call, low_inputs, Outcome(out.detach(), None, lowered))
