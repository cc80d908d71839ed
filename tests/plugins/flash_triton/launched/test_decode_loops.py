"""In a decode loop each length launches what a plan for that length launches, and is no work for Triton."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles nothing under TRITON_INTERPRET=1", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from attnplug import CausalVariant, SDPAParams
from attnplug_flash_triton import impl, plans
from attnplug_flash_triton.problem import Machine
from written_launches import HEADS, Driver, besides_of, numbered, paged, prepared, prepared_packed

FAMILY_FOR = impl.family_for
CACHE = torch.randn(2, 1, 2, 6000, 64).half()


def cut(length: int) -> list[Tensor]:
    """Return keys and values whose strides no length changes."""
    return [tensor[:, :, :length] for tensor in CACHE]


def whole(length: int) -> list[Tensor]:
    """Return keys and values that are contiguous."""
    return [tensor.contiguous() for tensor in cut(length)]


def odd(length: int) -> list[Tensor]:
    """Return keys and values of which only every other length has strides that are multiples of 16 bytes."""
    rows = torch.zeros(1, 2, length * 64 + 4 * (length % 2), dtype=torch.float16)
    return [rows[..., : length * 64].unflatten(2, (length, 64))] * 2


def in_columns(length: int) -> list[Tensor]:
    """Return keys and values that must be copied at every other length."""
    return [tensor.mT.contiguous().mT for tensor in cut(length)] if length % 2 else cut(length)


def decoded(length: int, keys: Any = cut, **options: Any) -> SDPAParams:
    query = torch.ones(1, HEADS[0], 1, 64, dtype=torch.float16)
    return SDPAParams(query, *keys(length), enable_gqa=True, **{"scale": 0.1, **options})


GROWING = {
    "cut": decoded,
    "whole": lambda length: decoded(length, whole),
    "odd strides": lambda length: decoded(length, odd),
    "columns": lambda length: decoded(length, in_columns),
    "causal": lambda length: decoded(length, is_causal=True, causal_variant=CausalVariant.LOWER_RIGHT),
    "used keys and sinks": lambda length: decoded(
        length, seqused_k=torch.ones(1, dtype=torch.int32), sinks=torch.zeros(4)
    ),
    "dropout": lambda length: decoded(length, dropout=0.5),
    "pages": paged,
    "pages, another at times": lambda length: paged(length, table_for(length)),
    "pages, a table in columns at times": lambda length: paged(
        length, table_for(length).mT.contiguous().mT if length % 2 else table_for(length)
    ),
}


def table_for(length: int) -> Tensor:
    """Return a table with no more pages than it needs."""
    return torch.zeros(2, -(-length // 16), dtype=torch.int32)


def forward_of(params: SDPAParams) -> list[tuple[Any, ...]]:
    """Return what a call launches, and the tensors that it fills, as they are told apart."""
    driver.active.launched.clear()
    impl.forward(params)
    return numbered(driver.active.launched)


@pytest.mark.parametrize("call", GROWING)
@pytest.mark.parametrize("family", ["plain", "hopper"])
def test_a_decode_loop_launches_at_each_length_what_a_plan_for_that_length_launches(
    call: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths that grow by one, with more and more programs for each head, and some that are far apart."""
    if family == "hopper":
        monkeypatch.setattr(impl, "family_for", FAMILY_FOR)
    lengths = [1, 2, 7, 8, *range(61, 67), *range(126, 131), 1023, 1024, 1025, 4000, 4001, 4002, 5999, 1025, 7]
    lengths = lengths[:-4] + lengths[-2:] if call.startswith("pages") else lengths
    of_loop = [forward_of(GROWING[call](length)) for length in lengths]
    split = {"combine_kernel" in str(launched) for launched in of_loop}
    assert split == {True, False}  # few keys are no work for two kernels
    for length, launched in zip(lengths, of_loop, strict=True):
        impl._plans.clear()
        impl._growing.clear()
        assert forward_of(GROWING[call](length)) == launched


def far_apart(length: int, step: int) -> SDPAParams:
    """Return a call of two queries whose keys are so many numbers apart, in no memory at all."""
    query = torch.ones(2, HEADS[0], 1, 64, dtype=torch.float16)
    keys = torch.empty_strided((2, 2, length, 64), (step, 64 * length, 64, 1), dtype=torch.float16, device="meta")
    return SDPAParams(query, keys, keys, enable_gqa=True, scale=0.1)


def test_strides_beyond_32_bits_get_the_kernel_that_takes_them() -> None:
    """Triton compiles a kernel apart for them; steps of 16 bytes are counted as one."""
    small, wide = [2**20, 2**31 - 1, 2**31 + 8], [2**31 + 1, 2**34 + 8]
    calls = [(length + step % 7, step) for length in (1, 4000) for _ in range(2) for step in (*small, *wide)]
    of_loop = [forward_of(far_apart(*call)) for call in calls]
    for call, launched in zip(calls, of_loop, strict=True):
        impl._plans.clear()
        impl._growing.clear()
        assert forward_of(far_apart(*call)) == launched
    signatures = {step: launched[0][0][1] for (_, step), launched in zip(calls, of_loop, strict=True)}
    assert ["i64" in signatures[step] for step in (*small, *wide)] == [False] * 3 + [True] * 2


def test_keys_in_more_memory_get_the_kernel_for_amd_that_reaches_them(
    gpu: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton compiles one apart for tensors in less than 2**31 bytes, which counts in 32 bits how far in they are."""
    monkeypatch.setattr(gpu, "get_current_target", lambda: GPUTarget("hip", "gfx942", 64))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(impl, "machine_of", lambda device: Machine("gfx942", 304))
    lengths = [1000, 2**24 - 1, 1001, 2**24, 2**24 + 8]  # of 128 bytes
    calls = [partial(far_apart, length, 64 * length) for length in lengths]
    of_loop = [forward_of(call()) for call in calls]
    for call, launched in zip(calls, of_loop, strict=True):
        impl._plans.clear()
        impl._growing.clear()
        plans._compiled.clear()
        assert forward_of(call()) == launched
    assert of_loop[0][0][0] == of_loop[2][0][0] != of_loop[3][0][0] == of_loop[4][0][0]


def test_a_length_that_was_not_there_before_is_no_work_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is, for its way from arguments to a kernel; the compiled one is launched with other numbers."""

    def step(length: int) -> None:
        impl.forward(decoded(length))
        prepared(decoded(length))(torch.ones(1, 4, 1, 64, dtype=torch.float16), *cut(length))

        impl.forward(paged(length, table_for(length)))
        params = paged(length, table_for(length))
        prepared_packed(params)(params.query, params.key, params.value, *besides_of(params))

    step(4400)
    binding: list[Any] = []
    monkeypatch.setattr(impl.launches.forward_kernel, "run", lambda *given, **options: binding.append(given))
    before = len(driver.active.launched)
    for length in range(4500, 4550):
        step(length)
    assert not binding
    assert len(driver.active.launched) == before + 2 * 2 * 50 * 2


def test_after_a_first_call_that_failed_the_next_one_is_what_later_lengths_are_filled_into(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def out_of_memory(*given: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "empty_strided", out_of_memory)
        impl.forward(decoded(4400))
    impl.forward(decoded(4500))
    binding: list[Any] = []
    monkeypatch.setattr(impl.launches.forward_kernel, "run", lambda *given, **options: binding.append(given))
    for length in range(4501, 4510):
        impl.forward(decoded(length))
    assert not binding


@pytest.mark.parametrize(
    "change",
    [
        lambda length: decoded(length, scale=0.2),
        lambda length: decoded(length, is_causal=True),
        lambda length: decoded(length, window_size=(3, -1)),
        lambda length: decoded(length, softcap=1.0),
        lambda length: decoded(length, seqused_k=torch.ones(1, dtype=torch.int32)),
        lambda length: SDPAParams(
            torch.ones(1, 4, 2, 64, dtype=torch.float16), *cut(length), enable_gqa=True, scale=0.1
        ),
        lambda length: SDPAParams(
            torch.ones(1, 4, 1, 64, dtype=torch.float16), *(t[:, :1] for t in cut(length)), enable_gqa=True, scale=0.1
        ),
        lambda length: SDPAParams(
            torch.ones(2, 4, 1, 64, dtype=torch.float16),
            *(t.expand(2, -1, -1, -1) for t in cut(length)),
            enable_gqa=True,
            scale=0.1,
        ),
        lambda length: decoded(length, lambda length: [cut(length)[0], cut(length)[1][..., :32]]),
        lambda length: decoded(length, attn_mask=torch.ones(1, 1, 1, length, dtype=torch.bool)),
    ],
    ids=["scale", "causal", "window", "softcap", "used", "queries", "heads of keys", "batch", "value size", "mask"],
)
def test_a_call_of_another_kind_between_those_of_a_decode_loop_gets_its_own(change: Any) -> None:
    lengths = (1030, 1040)
    alone = []
    for make in (decoded, change):
        for length in lengths:
            impl._plans.clear()
            impl._growing.clear()
            alone.append(forward_of(make(length)))
    impl._plans.clear()
    impl._growing.clear()
    mixed = {(make is change, length): forward_of(make(length)) for length in lengths for make in (decoded, change)}
    assert [mixed[kind, length] for kind in (False, True) for length in lengths] == alone


def test_what_is_prepared_at_each_length_reads_the_tensors_of_its_call(gpu: Driver) -> None:
    for length in (1024, 1100, 1101, 1102):
        params = decoded(length)
        gpu.launched.clear()
        out, lse = prepared(params)(params.query, params.key, params.value)
        assert lse is None and out.shape == params.query.shape
        given = gpu.launched[0][3:]
        assert [given[place] for place in range(3)] == [t.data_ptr() for t in (params.query, params.key, params.value)]
        assert length in given
        assert out.data_ptr() in gpu.launched[-1][3:]


def test_an_lse_is_returned_where_it_is_asked_for() -> None:
    grad = decoded(1024).query.requires_grad_()
    for length in (1024, 1100):
        key, value = cut(length)
        assert prepared(decoded(length))(grad.detach(), key, value)[1] is None
        assert prepared(decoded(length, return_lse=True))(grad.detach(), key, value)[1].shape == (1, 4, 1)
        params = SDPAParams(grad, key, value, enable_gqa=True, scale=0.1)
        assert [tensor.shape for tensor in prepared(params)(grad, key, value)] == [(1, 4, 1, 64), (1, 4, 1)]
        assert impl.forward(decoded(length))[1].shape == (1, 4, 1)


def test_each_token_of_a_decode_loop_has_memory_of_its_own() -> None:
    """What is kept for other lengths holds no memory: what one call writes, and its caller keeps, no other writes."""
    outs = [prepared(decoded(length))(decoded(length).query, *cut(length))[0] for length in range(1024, 1034)]
    assert len({out.data_ptr() for out in outs}) == 10


def test_what_is_kept_of_a_long_decode_loop_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impl, "PLANS_KEPT", 16)
    for length in range(1, 4000, 3):
        impl.forward(decoded(length))
        assert len(impl._plans) <= 16
    assert len(impl._growing) == 1
    assert len(next(iter(impl._growing.values())).plans) <= 2 * 64


def test_threads_that_decode_at_once_launch_each_their_own_length(gpu: Driver) -> None:
    for length in (1024, 1100):  # compiled
        impl.forward(decoded(length))
    gpu.launched.clear()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda length: impl.forward(decoded(length)), range(2000, 2200)))
    lengths = [length for launch in gpu.launched for length in range(2000, 2200) if length in launch[3:]]
    assert sorted({*lengths}) == [*range(2000, 2200)]
    assert len(gpu.launched) == 400
