"""What is prepared for calls, and for their backward, launches what they themselves would launch."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles nothing under TRITON_INTERPRET=1", allow_module_level=True)


from attnplug import SDPAParams
from attnplug_flash_triton import config, impl
from written_launches import Driver, numbered, prepared, shifted_like, tensors


def test_what_is_prepared_launches_what_forward_launches_with_the_tensors_that_it_is_given(gpu: Driver) -> None:
    first, second = tensors(32, 32), tensors(32, 32)
    run = prepared(SDPAParams(*first, is_causal=True, scale=0.1))
    impl.forward(SDPAParams(*second, is_causal=True, scale=0.1))
    for _ in range(2):
        run(*second)
    pointers = [tensor.data_ptr() for tensor in second]
    launches = [numbered([launch]) for launch in gpu.launched]
    assert launches[0] == launches[1] == launches[2] and len(launches) == 3
    assert all([item for item in launch[3:] if item in pointers] == pointers for launch in gpu.launched)


@contextmanager
def tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


def test_what_is_prepared_leaves_tensors_that_start_elsewhere_to_forward(gpu: Driver) -> None:
    query, key, value = tensors(32, 32)
    shifted = shifted_like(query)
    for first in (query, shifted):
        run = prepared(SDPAParams(first, key, value, scale=0.1))
        assert run(shifted, key, value) is run(query, shifted, value) is run(query, key, shifted) is None
        assert run(query, key, value) is not None
    assert impl.prepare(SDPAParams(query, key, value, dropout=0.5, scale=0.1)) is None


def test_what_is_prepared_follows_settings_as_forward_does(gpu: Driver) -> None:
    given = tensors(32, 32, dtype=torch.float32)
    run, launched = prepared(SDPAParams(*given, scale=0.1)), []
    for around in (nullcontext, tf32, nullcontext, tf32, tiles_of_16, nullcontext):
        with around():
            for each in (lambda: run(*given), lambda: impl.forward(SDPAParams(*given, scale=0.1))):
                gpu.launched.clear()
                each()
                launched.append([(launch[0], launch[1]) for launch in gpu.launched])
    assert launched[::2] == launched[1::2]
    assert launched[0] == launched[4] == launched[10] != launched[2] == launched[6] != launched[8] != launched[0]


@contextmanager
def tiles_of_16() -> Iterator[None]:
    cell = config.Cell(config.FORWARD, config.SINGLE, 64, config.PLAIN)
    before = config.use(config.table_of("sm_90").but(cell, config.Tiles(16, 16, 1, 1)))
    try:
        yield
    finally:
        config.use(before)


def test_what_is_prepared_keeps_no_tensor_alive() -> None:
    given = tensors(32, 32)
    run, kept = prepared(SDPAParams(*given, scale=0.1)), [weakref.ref(tensor) for tensor in given]
    run(*given)
    given.clear()
    gc.collect()
    assert [reference() for reference in kept] == [None, None, None]


def of_backward(dtype: torch.dtype = torch.float16) -> list[Tensor]:
    """Return query, key, value, a gradient, out, lse and what else forward saves."""
    query, key, value = tensors(32, 32, dtype=dtype)
    rows = [torch.zeros(query.shape[:-1]) for _ in range(3 if dtype is torch.float32 else 1)]
    return [query, key, value, torch.randn_like(query), torch.randn_like(query), *rows]


def prepared_backward(given: list[Tensor], **options: Any) -> Any:
    return impl.prepare_backward(SDPAParams(*given[:3], scale=0.1, **options), *given[3:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_what_is_prepared_for_backward_launches_what_backward_launches(gpu: Driver, dtype: torch.dtype) -> None:
    first, second = of_backward(dtype), of_backward(dtype)
    run = prepared_backward(first, is_causal=True)
    query, key, value, grad_out, out, lse, *statistics = second
    impl.backward(SDPAParams(query, key, value, is_causal=True, scale=0.1), grad_out, None, out, lse, *statistics)
    each = len(gpu.launched)
    for _ in range(2):
        grads = run(*second)
        assert [grad.shape for grad in grads] == [query.shape, key.shape, value.shape]
    launches = [numbered(gpu.launched[start : start + each]) for start in range(0, 3 * each, each)]
    assert launches[0] == launches[1] == launches[2] and len(gpu.launched) == 3 * each >= 6
    pointers = {tensor.data_ptr() for tensor in second}
    launched = [{item for launch in gpu.launched[start : start + each] for item in launch[3:] if isinstance(item, int)}
                for start in (each, 2 * each)]  # fmt: skip
    assert all(len(pointers - given) == len(statistics) // 2 for given in launched)  # with statistics no lse is read


LAYOUTS = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "heads within tokens": lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
    "batches within heads": lambda tensor: tensor.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "part of longer rows": lambda tensor: torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]],
    "part of more tokens": lambda tensor: torch.cat([tensor, tensor], 2)[:, :, : tensor.shape[2]],
    "expanded heads": lambda tensor: tensor[:, :1].expand_as(tensor),
}


@pytest.mark.parametrize("shape", [(2, 3, 32, 64), (1, 3, 32, 64), (2, 1, 1, 64)], ids=str)
@pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS)
def test_gradients_are_laid_out_as_pytorch_lays_out_what_is_like_their_tensors(
    gpu: Driver, lay_out: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    query, key, value = (lay_out(torch.zeros(shape, dtype=torch.float16)) for _ in range(3))
    grad_out, out, lse = torch.zeros_like(query), torch.zeros_like(query), torch.zeros(shape[:-1])
    grads = impl.backward(SDPAParams(query, key, value, scale=0.1), grad_out, None, out, lse)
    assert [grad.stride() for grad in grads[:3]] == [torch.empty_like(each).stride() for each in (query, key, value)]


@pytest.mark.parametrize("number", range(6))
def test_what_is_prepared_for_backward_leaves_tensors_that_start_elsewhere_to_backward(
    gpu: Driver, number: int
) -> None:
    given = of_backward()
    run = prepared_backward(given)
    assert run(*given) is not None
    aligned = [*given]
    given[number] = shifted_like(given[number])
    later = prepared_backward(given)
    assert run(*given) is None and later(*given) is None and later(*aligned) is not None


def test_what_is_prepared_for_backward_follows_settings_as_backward_does(
    gpu: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(impl, "family_for", recording(asked := []))
    half, single = of_backward(), of_backward(torch.float32)
    run, wide = prepared_backward(half), prepared_backward(single)
    for around, count in ((nullcontext, 2), (tf32, 3), (deterministic, 5), (nullcontext, 5), (deterministic, 5)):
        with around():
            assert run(*half) is not None is not wide(*single)
        assert len(asked) == count  # for a plan that there was not yet
    config.use(config.use(config.table_of("sm_90")))
    assert run(*half) is not None and len(asked) == 6


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def recording(asked: list[Any]) -> Any:
    def family_for(params: SDPAParams, machine: Any) -> Any:
        asked.append(params.query.dtype)
        return impl.launches

    return family_for


def test_what_is_prepared_for_backward_keeps_no_tensor_alive(gpu: Driver) -> None:
    given = of_backward()
    run, kept = prepared_backward(given), [weakref.ref(tensor) for tensor in given]
    grads = run(*given)
    assert len(grads) == 3
    given.clear()
    gc.collect()
    assert [reference() for reference in kept] == [None] * 6
