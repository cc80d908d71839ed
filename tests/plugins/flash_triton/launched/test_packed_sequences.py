"""Packed sequences: what is prepared for them, and for their backward, and what new sizes launch."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles nothing under TRITON_INTERPRET=1", allow_module_level=True)


from attnplug import CausalVariant, SDPAParams
from attnplug_flash_triton import impl, plans
from written_launches import Driver, besides_of, numbered, packed, paged, prepared_packed, shifted_like, tensors

PACKED: dict[str, Callable[[], SDPAParams]] = {
    "sequences": lambda: packed(*tensors(32, 32)),
    "sequences, float32": lambda: packed(*tensors(32, 32, dtype=torch.float32)),
    "starts of keys of their own": lambda: replace(
        packed(*tensors(32, 32)), cu_seq_k=torch.tensor([0, 9, 32], dtype=torch.int32), softcap=2.0, is_causal=True
    ),
    "used keys": lambda: replace(packed(*tensors(32, 32)), seqused_k=torch.ones(2, dtype=torch.int32)),
    "few pages": lambda: paged(40, window_size=(7, 0)),
    "many pages": lambda: paged(4000),
    "a table in columns": lambda: paged(4000, torch.zeros(256, 2, dtype=torch.int32).mT),
}


@pytest.mark.parametrize("call", PACKED)
def test_what_is_prepared_for_sequences_launches_what_forward_launches_with_the_tensors_that_it_is_given(
    call: str, gpu: Driver
) -> None:
    first, second = PACKED[call](), PACKED[call]()
    runs = [prepared_packed(replace(first, return_lse=wanted)) for wanted in (False, True)]
    expected = impl.forward(second)[:2]
    launches = [numbered_but_new(gpu, second)]
    for run, wanted in zip(runs, (False, True), strict=True):
        for _ in range(2):
            out, lse = run(second.query, second.key, second.value, *besides_of(second))
            assert out.shape == expected[0].shape and out.dtype == expected[0].dtype
            assert lse.shape == expected[1].shape if wanted else lse is None
            launches.append(numbered_but_new(gpu, second))
    assert launches == launches[:1] * 5 and len(launches[0]) in (1, 2)


def numbered_but_new(gpu: Driver, params: SDPAParams) -> list[tuple[Any, ...]]:
    """Return what was launched, and forget it: the call's own tensors by number, and others as such."""
    own = [each for each in (params.query, params.key, params.value, *besides_of(params)) if each is not None]
    places = {tensor.data_ptr(): f"tensor {number}" for number, tensor in enumerate(own)}
    found = [
        tuple(places.get(item, "new" if item > 2**32 else item) if isinstance(item, int) else item for item in launch)
        for launch in gpu.launched
    ]
    gpu.launched.clear()
    return found


@pytest.mark.parametrize("number", [None, *range(9)])
def test_what_is_prepared_for_sequences_leaves_tensors_that_start_elsewhere_to_forward(number: int | None) -> None:
    """Also if it was prepared with such tensors."""
    params = replace(paged(4000), sinks=torch.zeros(4, dtype=torch.float16))
    names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "sinks", "alibi_slopes", "seqused_k", "block_table")
    given = [params.query, params.key, params.value, *besides_of(params)]
    first = params
    if number is not None and given[number] is not None:
        first = replace(params, **{names[number]: shifted_like(given[number])})
    run = prepared_packed(first)
    for place, tensor in enumerate(given):
        if tensor is not None:
            assert run(*given[:place], shifted_like(tensor), *given[place + 1 :]) is None
    assert run(*given) is not None
    assert impl.prepare_packed(replace(params, dropout=0.5)) is None


def test_what_is_prepared_for_sequences_keeps_no_tensor_alive() -> None:
    params = paged(4000)
    given = [params.query, params.key, params.value, *besides_of(params)]
    run, kept = prepared_packed(params), [weakref.ref(tensor) for tensor in given if tensor is not None]
    run(*given)
    given.clear()
    del params
    gc.collect()
    assert [reference() for reference in kept] == [None] * 6


def of_sequences(queries: int, keys: int, shift: bool = False, **options: Any) -> SDPAParams:
    """Return a call of two sequences in which what is part of a larger tensor lies as in a model's own."""
    query = torch.randn(queries, 3 * 2, 64).half().requires_grad_()[:, :2]
    pair = torch.randn(keys, 2, 64).half()
    key, value = (shifted_like(pair) if shift else pair).requires_grad_(), pair.clone().requires_grad_()
    starts = [torch.tensor([0, length // 3, length], dtype=torch.int32) for length in (queries, keys)]
    lengths = dict(zip(("cu_seq_q", "cu_seq_k"), starts, strict=True))
    longest = dict(max_q=queries - queries // 3, max_k=keys - keys // 3)
    return SDPAParams(
        query, key, value, scale=0.1, causal_variant=CausalVariant.LOWER_RIGHT, **{**lengths, **longest, **options}
    )


def trained(gpu: Driver, params: SDPAParams) -> list[tuple[Any, ...]]:
    """Return what forward and backward launch, each numbered apart: what forward lets go backward may get."""
    gpu.launched.clear()
    out, lse, *saved = impl.forward(params)
    forward = numbered(gpu.launched)
    gpu.launched.clear()
    impl.backward(params, torch.ones_like(out), None, out, lse, *saved)
    return forward + numbered(gpu.launched)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("wants_sinks", [None, False, True])
def test_what_is_prepared_for_backward_of_sequences_launches_what_backward_launches(
    dtype: torch.dtype, wants_sinks: bool | None, gpu: Driver
) -> None:
    def call() -> SDPAParams:
        sinks = None if wants_sinks is None else torch.zeros(2, dtype=dtype).requires_grad_(wants_sinks)
        params = of_sequences(50, 70, sinks=sinks)
        tensors = {name: getattr(params, name).detach().to(dtype) for name in ("query", "key", "value")}
        return replace(params, **{name: tensor.requires_grad_() for name, tensor in tensors.items()})

    first, second = call(), call()
    saved = [impl.forward(params) for params in (first, second)]
    grads = [torch.randn_like(out) for out, *_ in saved]
    gpu.launched.clear()
    expected = impl.backward(second, grads[1], None, *saved[1])
    launches = [numbered(gpu.launched)]
    run = impl.prepare_backward(first, grads[0], *saved[0])
    assert run is not None
    for _ in range(2):
        gpu.launched.clear()
        found = run(second.query, second.key, second.value, *besides_of(second), grads[1], *saved[1])
        launches.append(numbered(gpu.launched))
    assert launches[0] == launches[1] == launches[2]
    shapes = [[grad if grad is None else grad.shape for grad in each] for each in (found, expected[: len(found)])]
    assert shapes[0] == shapes[1] and len(found) == (5 if wants_sinks else 3)


SIZES = [(50, 50), (1, 1), (16, 16), (17, 48), (64, 1), (1, 64), (3, 200), (200, 3), (1000, 1000), (1024, 1008)]


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "window_size": (16, -1), "softcap": 1.0}], ids=str)
def test_sequences_of_new_sizes_launch_what_triton_would_and_are_no_work_for_it(
    options: dict[str, Any], gpu: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths of 1, and multiples of 16, Triton looks at unless it is told not to."""
    calls = [partial(of_sequences, *sizes, shift, **options) for shift in (False, True) for sizes in SIZES]
    calls += [partial(call, seqused_k=torch.ones(2, dtype=torch.int32)) for call in calls]
    launched = [launch for call in calls for launch in trained(gpu, call())]
    impl._plans.clear()
    kernels, worked = [*{launch[0][0]: None for launch in launched}], []
    with monkeypatch.context() as patch:
        for name in kernels:
            kernel = getattr(impl.launches, name)
            patch.setattr(kernel, "run", partial(watched, kernel.run, worked))
        known = [trained(gpu, call()) for call in calls]
    assert not worked
    for call, launched in zip(calls, known, strict=True):
        impl._plans.clear()
        plans._compiled.clear()
        assert trained(gpu, call()) == launched


def watched(run: Any, worked: list[Any], *given: Any, **options: Any) -> Any:
    worked.append(given)
    return run(*given, **options)
