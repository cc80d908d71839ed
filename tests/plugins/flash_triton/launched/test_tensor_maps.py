"""Kernels that take tensor maps, or memory of their own, launched by Triton's launcher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles nothing under TRITON_INTERPRET=1", allow_module_level=True)

from triton.backends.nvidia import driver as nvidia
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from attnplug_flash_triton import plans
from written_launches import Driver

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
