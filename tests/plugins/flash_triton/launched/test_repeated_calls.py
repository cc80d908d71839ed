"""A call like one before it launches what Triton itself would launch, without Triton's way there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles nothing under TRITON_INTERPRET=1", allow_module_level=True)

from triton.runtime import driver

from attnplug import CausalVariant, SDPAParams
from attnplug_flash_triton import config, impl, plans
from written_launches import HOPPER, Driver, numbered, packed, tensors


def features(query: Tensor, key: Tensor, value: Tensor) -> SDPAParams:
    mask = torch.zeros(1, 1, query.shape[2], key.shape[2], requires_grad=True)
    return SDPAParams(query, key, value, mask, 0.25, scale=0.1, softcap=2.0, sinks=torch.zeros(2), window_size=(7, -1))


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
