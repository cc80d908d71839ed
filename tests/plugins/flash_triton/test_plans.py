"""A call of flash_triton like one before it launches what Triton itself would launch, without Triton's way there.

Kernels are compiled for a Hopper GPU, of which there need be none: a driver that only writes launches down stands for
its own.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles nothing under TRITON_INTERPRET=1", allow_module_level=True)

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.runtime import driver

from attnplug import CausalVariant, SDPAParams
from attnplug_flash_triton import config, impl, plans
from attnplug_flash_triton.problem import Machine

HOPPER = Machine("sm_90", 132)
FAMILY_FOR = impl.family_for


class Driver:
    """A driver of Triton that writes down what it is to launch: the compiled kernel, the grid, stream and arguments."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.stream = self.device = 0
        self.maps: list[tuple[Any, ...]] = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (0, f"{name} on {self.device}", 0, 0, 1024),
            build_signature_metadata=tuple,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
            launch=lambda *given: self.launched.append(given),
            fill_tma_descriptor_tiled=self.map_of,
            fill_tma_descriptor=self.map_of,
        )

    def map_of(self, *given: Any) -> Any:
        self.maps.append(given)
        return ("map", given[0])

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        identity = (src.fn.__name__, str(src.signature), str(src.attrs), str(src.constants))

        def launcher(*given: Any) -> None:
            x, y, z, stream, function, _metadata, _of_launch, _enter, _exit, *arguments = given
            self.launched.append(((*identity, function), (x, y, z), stream, *map(plain, arguments)))

        return launcher


def plain(argument: Any) -> Any:
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Driver:
    stub = Driver()
    monkeypatch.setattr(driver, "_active", stub)  # first, so that it is there until the last kernel is unloaded
    kernels = [getattr(impl.launches, name) for name in dir(impl.launches) if name.endswith("_kernel")]
    for kernel in kernels:  # what was compiled for another driver has its launcher
        monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    monkeypatch.setattr(impl, "machine_of", lambda device: HOPPER)
    monkeypatch.setattr(impl, "family_for", lambda params, machine: impl.launches)  # what every GPU has
    monkeypatch.setattr(impl, "_plans", {})
    monkeypatch.setattr(impl, "_growing", {})
    monkeypatch.setattr(plans, "_compiled", {})
    return stub


def tensors(*lengths: int, heads: tuple[int, int] = (2, 2), dtype: torch.dtype = torch.float16) -> list[Tensor]:
    queries, keys = lengths
    shapes = ((1, heads[0], queries, 64), (1, heads[1], keys, 64), (1, heads[1], keys, 64))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def features(query: Tensor, key: Tensor, value: Tensor) -> SDPAParams:
    mask = torch.zeros(1, 1, query.shape[2], key.shape[2], requires_grad=True)
    return SDPAParams(query, key, value, mask, 0.25, scale=0.1, softcap=2.0, sinks=torch.zeros(2), window_size=(7, -1))


def packed(query: Tensor, key: Tensor, value: Tensor) -> SDPAParams:
    ends = torch.tensor([0, 3, query.shape[2]], dtype=torch.int32)
    tokens = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    lengths = dict(cu_seq_q=ends, cu_seq_k=ends, max_q=query.shape[2], max_k=query.shape[2])
    return SDPAParams(*tokens, scale=0.1, causal_variant=CausalVariant.LOWER_RIGHT, **lengths)


CALLS = {
    "plain": lambda: SDPAParams(*tensors(32, 32), is_causal=True, scale=0.1),
    "float32": lambda: SDPAParams(*tensors(32, 32, dtype=torch.float32), scale=0.1),
    "features": lambda: features(*tensors(32, 32)),
    "sequences": lambda: packed(*tensors(32, 32)),
    "keys split": lambda: SDPAParams(*tensors(1, 4096, heads=(4, 2)), enable_gqa=True, scale=0.1),
    "not contiguous": lambda: SDPAParams(*(tensor.mT.contiguous().mT for tensor in tensors(32, 32)), scale=0.1),
}


def run(params: SDPAParams) -> list[list[tuple[Any, ...]]]:
    """Run a call forward and backward; return what each launches, pointers as ordinals."""
    launched = driver.active.launched
    launched.clear()
    out, lse, *saved = impl.forward(params)
    forward = numbered(launched)
    launched.clear()
    impl.backward(params, torch.ones_like(out), None, out, lse, *saved)
    return [forward, numbered(launched)]


def numbered(launched: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return launches with the first pointer that appears as 0, the next as 1, and so on."""
    seen: dict[int, str] = {}
    return [
        tuple(
            seen.setdefault(item, f"pointer {len(seen)}") if isinstance(item, int) and item > 2**32 else item
            for item in launch
        )
        for launch in launched
    ]


@pytest.mark.parametrize("call", CALLS)
def test_a_repeated_call_launches_what_the_first_launched(call: str) -> None:
    first, repeated = run(CALLS[call]()), run(CALLS[call]())
    assert len(impl._plans) == 2  # of forward and backward
    assert len(first[0]) >= 1 and len(first[1]) >= 2
    assert repeated == first


def test_each_argument_gets_its_own_tensor_after_a_call_of_one_tensor_for_all() -> None:
    query, key, value = tensors(32, 32)
    impl.forward(SDPAParams(query, query, query, scale=0.1))
    out, lse = impl.forward(SDPAParams(query, key, value, scale=0.1))[:2]
    given = driver.active.launched[-1][3:]
    pointers = [tensor.data_ptr() for tensor in (query, key, value, out, lse)]
    assert [item for item in given if item in pointers] == pointers
    assert len(impl._plans) == 1


def test_a_tensor_that_starts_elsewhere_gets_the_kernel_that_reads_there(gpu: Driver) -> None:
    """Triton compiles a kernel for pointers that are multiples of 16 bytes; it would fault on others."""
    query, key, value = tensors(32, 32)
    shifted = torch.empty(query.numel() + 1, dtype=query.dtype)[1:].view(query.shape)
    for tensor in (query, shifted, query, shifted):
        impl.forward(SDPAParams(tensor, key, value, scale=0.1))
    kernels = [identity for identity, *_ in gpu.launched]
    assert kernels[0] == kernels[2] != kernels[1] == kernels[3]
    assert gpu.launched[3][3] == shifted.data_ptr()


def test_a_kernel_is_launched_on_the_device_that_it_was_loaded_on(gpu: Driver) -> None:
    query, key, value = tensors(32, 32)
    for gpu.device in (0, 1, 0, 1):
        plan = impl.launches.forward(SDPAParams(query, key, value, scale=0.1), HOPPER)
        plan.run({"query": query, "key": key, "value": value}, torch.device("meta", gpu.device))
    assert [identity[-1][-4:] for identity, *_ in gpu.launched] == ["on 0", "on 1", "on 0", "on 1"]


def test_another_layout_gets_its_own_strides(gpu: Driver) -> None:
    query, key, value = tensors(32, 48)
    strided = key.transpose(1, 2).contiguous().transpose(1, 2)
    for each in (key, strided, key, strided):
        impl.forward(SDPAParams(query, each, value, scale=0.1))
    first, second, third, fourth = (numbered([launch]) for launch in gpu.launched)
    assert first == third != second == fourth


@pytest.mark.parametrize(
    "change",
    [
        dict(scale=0.2),
        dict(is_causal=True),
        dict(softcap=1.0),
        dict(window_size=(3, -1)),
        dict(causal_variant=CausalVariant.LOWER_RIGHT),
        dict(dropout=0.5),
        dict(attn_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool)),
        dict(sinks=torch.zeros(2)),
        dict(alibi_slopes=torch.zeros(2)),
        dict(seqused_k=torch.ones(1, dtype=torch.int32)),
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_a_launch_is_part_of_what_it_is_kept_under(change: dict[str, Any]) -> None:
    """Run twice each, in turns, so that the second of each comes from what is kept."""
    given = tensors(32, 32)
    launched = []
    for extra in ({}, change, {}, change):
        impl.forward(SDPAParams(*given, **{"scale": 0.1, **extra}))
        launched.append(numbered(driver.active.launched[-1:]))
    assert launched[0] == launched[2] != launched[1] == launched[3]


def prepared(params: SDPAParams) -> Any:
    run = impl.prepare(params)
    assert run is not None
    return run


def prepared_packed(params: SDPAParams) -> Any:
    run = impl.prepare_packed(params)
    assert run is not None
    return run


def besides_of(params: SDPAParams) -> tuple[Tensor | None, ...]:
    besides = params.sinks, params.alibi_slopes, params.seqused_k, params.block_table
    return params.cu_seq_q, params.cu_seq_k, *besides


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


def shifted_like(tensor: Tensor) -> Tensor:
    """Return a tensor that starts at an odd address."""
    return torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)


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


HEADS = (4, 2)
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


def paged(length: int, table: Tensor | None = None, **options: Any) -> SDPAParams:
    """Return a call of two sequences of one query each, whose keys are in pages of 16."""
    query, (key, value) = torch.ones(2, HEADS[0], 64, dtype=torch.float16), torch.randn(2, 512, 16, 2, 64).half()
    of_sequences = dict(
        cu_seq_q=torch.arange(3, dtype=torch.int32),
        seqused_k=torch.tensor([length, 1], dtype=torch.int32),
        block_table=torch.zeros(2, 256, dtype=torch.int32) if table is None else table,
    )
    options = dict(max_q=1, max_k=length, causal_variant=CausalVariant.LOWER_RIGHT) | options
    return SDPAParams(query, key, value, enable_gqa=True, scale=0.1, **of_sequences, **options)


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


def test_kernels_stay_loaded_as_long_as_they_are_launched(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else is kept of them: from 3.8 on Triton unloads what nothing refers to."""
    compiled: list[Any] = []

    def seen(launch: plans.Launch, kernel: Any, *others: Any) -> Any:
        compiled.append(weakref.ref(kernel))
        return of_launch(launch, kernel, *others)

    of_launch = plans._Compiled
    monkeypatch.setattr(plans, "_Compiled", seen)
    query, key, value = tensors(32, 32)
    impl.forward(SDPAParams(query, key, value, scale=0.1))
    impl.launches.forward_kernel.device_caches.clear()
    plans._compiled.clear()
    gc.collect()
    impl.forward(SDPAParams(query, key, value, scale=0.1))
    assert len(gpu.launched) == 2 and len(compiled) == 1 and compiled[0]() is not None


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


def test_what_is_kept_of_compiled_kernels_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "COMPILED_KEPT", 2)
    for size in (16, 24, 32, 40, 48):
        impl.forward(SDPAParams(*(tensor[..., :size] for tensor in tensors(32, 32)), scale=0.1))
        assert len(plans._compiled) <= 2


def test_float32_products_follow_pytorchs_setting() -> None:
    given = tensors(32, 32, dtype=torch.float32)
    kernels = []
    for precision in ("ieee", "tf32", "ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = precision
        try:
            impl.forward(SDPAParams(*given, scale=0.1))
        finally:
            torch.backends.cuda.matmul.fp32_precision = "none"
        kernels.append(driver.active.launched[-1][0])
    assert kernels[0] == kernels[2] != kernels[1] == kernels[3]


def test_other_tiles_are_used_from_the_next_call_on() -> None:
    params = SDPAParams(*tensors(32, 32), scale=0.1)
    cell = config.Cell(config.FORWARD, config.HALF, 64, config.PLAIN)
    impl.forward(params)
    before = config.use(config.table_of("sm_90").but(cell, config.Tiles(16, 16, 1, 1)))
    try:
        impl.forward(params)
    finally:
        config.use(before)
    first, second = driver.active.launched
    assert first[1] == (2, 1, 1) and second[1] == (4, 1, 1)


def test_each_launch_goes_to_the_current_stream(gpu: Driver) -> None:
    params = SDPAParams(*tensors(32, 32), scale=0.1)
    for gpu.stream in (0, 7, 9):
        impl.forward(params)
    assert [launch[2] for launch in gpu.launched] == [0, 7, 9]


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impl, "PLANS_KEPT", 4)
    for keys in range(20, 40):
        impl.forward(SDPAParams(*tensors(32, keys), scale=0.1))
        assert len(impl._plans) <= 4


def test_threads_share_what_is_kept_and_nothing_else(gpu: Driver) -> None:
    calls = [tensors(32, 32) for _ in range(8)]
    expected = {tuple(tensor.data_ptr() for tensor in call) for call in calls}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda call: impl.forward(SDPAParams(*call, scale=0.1)), calls * 25))
    assert len(gpu.launched) == 200
    assert {launch[3:6] for launch in gpu.launched} == expected


def test_profilers_that_listen_to_triton_hear_of_repeated_launches() -> None:
    params, heard = SDPAParams(*tensors(32, 32), scale=0.1), []
    impl.forward(params)
    impl.forward(params)
    listen = heard.append
    knobs.runtime.launch_enter_hook.add(listen)
    try:
        # The launcher calls the hooks, and the driver here has none of its own: that it is given them is what counts.
        kept = next(iter(impl._plans.values()))
        assert plans._is_watched()
        given = impl.tensors_of(params)
        launched = len(driver.active.launched)
        kept.run(given, params.query.device)
        assert len(driver.active.launched) == launched + 1
    finally:
        knobs.runtime.launch_enter_hook.remove(listen)
    assert not plans._is_watched()


def test_what_a_profiler_had_compiled_runs_for_it_alone(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    params, instrumented = SDPAParams(*tensors(32, 32), scale=0.1), []

    def compiled(run: Any, *given: Any, **options: Any) -> Any:
        kernel = run(*given, **options)
        fields = {name: getattr(kernel, name) for name in ("function", "packed_metadata", "metadata")}
        return SimpleNamespace(run=lambda *launched: instrumented.append(launched), **fields)

    kernel, listen = impl.launches.forward_kernel, list.copy
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "run", partial(compiled, kernel.run))
        knobs.runtime.launch_enter_hook.add(listen)
        try:
            for _ in range(2):
                impl.forward(params)
        finally:
            knobs.runtime.launch_enter_hook.remove(listen)
    for length in (32, 48):
        impl.forward(SDPAParams(*tensors(length, 32), scale=0.1))
    assert not instrumented and len(gpu.launched) == 4


BLOCK = (16, 64)
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name before Triton 3.9


@gluon.jit
def copy_kernel(source, target, factor):
    smem = gl.allocate_shared_memory(source.dtype, source.block_shape, source.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.expect(bar, source.block_type.nbytes)
    load_tile(source, [0, 0], bar, smem)
    mbarrier.wait(bar, 0)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, 16, gl.SliceLayout(1, layout))[:, None]
    columns = gl.arange(0, 64, gl.SliceLayout(0, layout))[None, :]
    gl.store(target + rows * 64 + columns, (smem.load(layout) * factor).to(source.dtype))


@pytest.fixture
def tritons_launcher(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Triton's own launcher make tensor maps, by the driver that writes them down."""
    caches = type(copy_kernel.device_caches)(copy_kernel.create_binder)  # another test's kernel launches by its driver
    monkeypatch.setattr(copy_kernel, "device_caches", caches)
    monkeypatch.setattr(gpu, "launcher_cls", nvidia.CudaLauncher)
    # What the driver has from libraries: those of Triton 3.7 and later, and the one that 3.6 builds for each kernel.
    monkeypatch.setattr(nvidia, "PyKernelArg", lambda **given: given, raising=False)
    monkeypatch.setattr(nvidia, "compile_module_from_src", lambda **_: gpu.utils, raising=False)
    monkeypatch.setattr(nvidia, "library_dirs", list)


def copying(source: Tensor) -> plans.Plan:
    """Return a plan that copies a tile of a tensor."""
    layout = gl.NVMMASharedLayout.get_default_for(list(BLOCK), gl.float16)
    described = plans.Descriptor("source", tuple(source.shape), source.stride(), BLOCK, layout)
    launch = plans.Launch(copy_kernel, 1, (described, "target", 2.0), {"num_warps": 4, "enable_fp_fusion": True})
    return plans.Plan((launch,), {"target": plans.New.contiguous(BLOCK, torch.float16)}, ("target",))


@pytest.mark.usefixtures("tritons_launcher")
def test_tensor_maps_are_made_once_for_a_pointer(gpu: Driver) -> None:
    one, other = torch.empty(BLOCK, dtype=torch.float16), torch.empty(BLOCK, dtype=torch.float16)
    plan = copying(one)
    for source in (one, one, other, one, other):
        plan.run({"source": source}, one.device)
    arguments = [
        list(launched[-1] if isinstance(launched[-1], (list, tuple)) else launched[13:]) for launched in gpu.launched
    ]
    assert [given[0] for given in arguments] == [("map", t.data_ptr()) for t in (one, one, other, one, other)]
    assert all(given[1:5] == [16, 64, 64, 1] for given in arguments)
    assert len(gpu.maps) == 3  # Triton's own, at the first run, and one for each pointer
    assert gpu.maps[0] == gpu.maps[1]


@pytest.mark.usefixtures("tritons_launcher")
def test_a_tensor_map_has_the_shape_and_the_strides_of_its_own_call(gpu: Driver) -> None:
    """Also where the kernel was compiled for another."""
    memory = torch.empty(64, 192, dtype=torch.float16)
    sources = memory[:16, :64], memory[:48, :64], memory.view(32, 384)[:16, :64]
    of_triton = []
    for source in sources:
        plans._compiled.clear()
        copying(source).run({"source": source}, source.device)
        of_triton.append(gpu.maps[-1])
    compiled = len(gpu.maps)
    for source in sources:
        copying(source).run({"source": source}, source.device)
    assert gpu.maps[compiled:] == of_triton and len({str(each) for each in of_triton}) == 3


@pytest.mark.usefixtures("tritons_launcher")
@pytest.mark.parametrize("scratch", [0, 128])
def test_a_kernel_with_memory_of_its_own_gets_it_anew_at_each_launch(
    gpu: Driver, monkeypatch: pytest.MonkeyPatch, scratch: int
) -> None:
    """Others are launched with what Triton's launcher passes on, and without that."""
    given_out: list[Tensor] = []
    calls: list[Any] = []
    make, launch = nvidia.CudaLauncher.__init__, nvidia.CudaLauncher.__call__

    def made(launcher: Any, src: Any, metadata: Any) -> None:
        make(launcher, src, metadata)
        launcher.global_scratch_size, launcher.global_scratch_align = scratch, 16

    def called(launcher: Any, *given: Any) -> None:
        calls.append(given)
        launch(launcher, *given)

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        given_out.append(torch.empty(size, dtype=torch.int8))
        return given_out[-1]

    monkeypatch.setattr(nvidia.CudaLauncher, "__init__", made)
    monkeypatch.setattr(nvidia.CudaLauncher, "__call__", called)
    source = torch.empty(BLOCK, dtype=torch.float16)
    before = triton.runtime._allocation._allocator.get()
    triton.set_allocator(allocate)
    try:
        plan = copying(source)
        plan.run({"source": source}, source.device)
        calls.clear()
        for gpu.stream in (0, 7):
            plan.run({"source": source}, source.device)
    finally:
        triton.set_allocator(before)
    first, *kept = gpu.launched
    assert len(kept) == 2 and [given[3] for given in gpu.launched] == [0, 0, 7]
    assert [(len(given), *given[:3], *given[4:7]) for given in kept] == [(len(first), *first[:3], *first[4:7])] * 2
    assert len(calls) == (2 if scratch else 0)
    assert len(given_out) == (3 if scratch else 0)
    assert all(any(item is own for item in given) for given, own in zip(gpu.launched, given_out, strict=False))


@pytest.mark.usefixtures("tritons_launcher")
def test_a_launcher_that_counts_programs_first_is_taken_as_it_is(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = nvidia.CudaLauncher.__call__

    def called(launcher: Any, x: int, y: int, z: int, *given: Any) -> None:
        if x * y * z > 0:
            launch(launcher, x, y, z, *given)

    monkeypatch.setattr(nvidia.CudaLauncher, "__call__", called)
    source = torch.empty(BLOCK, dtype=torch.float16)
    plan = copying(source)
    for gpu.stream in (0, 7, 0):
        plan.run({"source": source}, source.device)
    assert [given[:4] for given in gpu.launched] == [(1, 1, 1, 0), (1, 1, 1, 7), (1, 1, 1, 0)]


def test_what_only_kernels_see_are_parts_of_one_workspace(gpu: Driver) -> None:
    params = CALLS["keys split"]()
    for _ in range(2):  # the second is the plan that is kept
        gpu.launched.clear()
        impl.forward(params)
    pointers = gpu.launched[-1][3:6]  # what the kernel that adds up the parts reads
    (plan,) = impl._plans.values()
    sizes = [plan.new[name].bytes for name in ("parts", "part_tops", "part_totals")]
    for (start, size), after in zip(zip(pointers, sizes, strict=True), pointers[1:], strict=False):
        assert start + size <= after < start + size + plans.APART and (after - start) % plans.APART == 0
