"""Triton's own launcher takes what a kept launch gives it, on a CUDA driver that does nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SOURCE = Path(__file__).parents[3] / "benchmarks" / "no_gpu" / "driver.c"
CALLS = """
import ctypes, sys
from concurrent.futures import ThreadPoolExecutor

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from attnplug import SDPAParams
from attnplug_flash_triton import impl
from attnplug_flash_triton.problem import Machine

class Hopper(nvidia.CudaDriver):
    def __init__(self):
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

driver.set_active(Hopper())
impl.machine_of = lambda device: Machine("sm_90", 132)
library = ctypes.CDLL(sys.argv[1])
library.first_parameter_of_last.restype = ctypes.c_longlong

def launch(run, *given):
    before = library.count_of_launches()
    run(*given)
    pointers = [tensor.data_ptr() for tensor in tensors]
    first = library.first_parameter_of_last()
    return library.count_of_launches() - before, library.programs_of_last(), first in pointers

tensors = torch.randn(3, 1, 2, 256, 64, dtype=torch.bfloat16).unbind()
params = SDPAParams(*tensors, is_causal=True, scale=0.125)
ones = torch.ones_like(tensors[0])
found = [launch(impl.forward, params) for _ in range(3)] + [launch(impl.prepare(params), *tensors) for _ in range(2)]
assert found[0][0] == 1 and found == found[:1] * 5, found
out, lse = impl.forward(params)[:2]
found = [launch(impl.backward, params, ones, None, out, lse) for _ in range(3)]
assert found[0][0] >= 2 and found == found[:1] * 3, found

# A thread of its own has no context, until PyTorch tells CUDA's runtime which device is its.
torch.cuda.is_initialized, torch.cuda.current_device = lambda: True, lambda: 0
torch.cuda.set_device = lambda device: library.cuCtxSetCurrent(ctypes.c_void_p(8))
elsewhere = [tensor.clone() for tensor in tensors]
run = impl.prepare(params)
for call, *given in ((run, *elsewhere), (impl.forward, SDPAParams(*elsewhere, is_causal=True, scale=0.125))):
    with ThreadPoolExecutor(1) as thread:
        thread.submit(call, *given).result()
impl._plans.clear()  # as for another kind of call, of which another thread compiled the kernels
with ThreadPoolExecutor(1) as thread:
    thread.submit(impl.forward, params).result()
impl.backward(params, ones, None, out, lse)
print(*sorted({type(launch.kernel).__name__ for plan in impl._plans.values() for launch in plan.launches}))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler, as Triton's launcher does")
    folder = tmp_path_factory.mktemp("driver")
    built = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", built, SOURCE], check=True)
    (folder / "libcuda.so").symlink_to(built)
    return built


@pytest.mark.slow
@pytest.mark.parametrize(("hopper", "kernels"), [("0", "JITFunction"), ("", "GluonJITFunction JITFunction")])
def test_tritons_launcher_takes_kept_and_prepared_launches(library: Path, hopper: str, kernels: str) -> None:
    found = {"TRITON_LIBCUDA_PATH": str(library.parent), "LD_LIBRARY_PATH": str(library.parent)}
    own = {"TRITON_CACHE_DIR": str(library.parent / "cache"), "FLASH_TRITON_HOPPER": hopper, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", CALLS, str(library)]
    done = subprocess.run(command, env=os.environ | found | own, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == kernels
