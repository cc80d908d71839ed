"""What a call costs on the host, with one head of 16 queries and keys.

On a GPU: each implementation that has a launch of its own, against PyTorch's function. Without one flash_triton is
timed with Triton's driver stubbed: real kernels are compiled for a Hopper GPU, and only what would load and launch them
is replaced, so that what is timed is all that Python does, from attnplug's call on. Of `efficient_cuda` and `cudnn`
PyTorch's operators are replaced, by functions that return what was made before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import attnplug
import harness
from attnplug import Capabilities, Feature, ImplSpec
from attnplug_efficient_cuda import cudnn, efficient, operators
from attnplug_flash_triton import impl, launches
from attnplug_flash_triton.problem import Machine
from harness import Result, alternate

HOPPER = Machine("sm_90", 132)
AIMS = {"forward, to the driver": 25.0}
"""Microseconds, where the machine has nothing else to do."""


class Stub:
    """Stands for Triton's driver of a Hopper GPU: loads nothing, launches nothing."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            load_binary=lambda *args: (0, 0, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        return lambda *args: None


def measure(quick: bool) -> Iterator[Result]:
    torch.set_num_threads(1)
    yield from (on_gpu if torch.cuda.is_available() else stubbed)(3 if quick else 300)


def on_gpu(turns: int) -> Iterator[Result]:
    query, key, value = torch.randn(3, 1, 1, 16, 64, dtype=torch.bfloat16, device="cuda")
    theirs = "F.scaled_dot_product_attention"
    available = {record.name for record in attnplug.list_impls() if record.status == "available"}
    ours = [name for name in ("flash_triton", "cudnn", "efficient_cuda", "aten_flash") if name in available]
    candidates: dict[str, Any] = {theirs: lambda: sdpa(query, key, value)}
    for name in ours:
        candidates[name] = lambda name=name: attnplug.scaled_dot_product_attention(query, key, value, impl=name)
    with torch.no_grad():
        times = alternate(candidates, turns, 20, dict.fromkeys(candidates, finished))
    for name in ours:
        details = {"us": times.microseconds(name), "of it": times.microseconds(theirs)}
        yield Result(f"{name} / {theirs}, on the host", times.ratio(name, theirs), "ratio", limit=1.3, details=details)


@contextmanager
def finished() -> Iterator[None]:
    """Wait for the GPU outside the clock, so that no call waits for those before it."""
    yield
    torch.cuda.synchronize()


def stubbed(turns: int) -> Iterator[Result]:
    driver.set_active(Stub())
    os.environ["FLASH_TRITON_HOPPER"] = "0"  # tensor maps, which those kernels take, only a driver can make
    impl.machine_of = lambda device: HOPPER  # CPU tensors, launched as if they were on the GPU
    kernel = SimpleNamespace(forward=impl.forward, backward=impl.backward, prepare=impl.prepare)
    capabilities = Capabilities(features={Feature.GQA, Feature.VARLEN, Feature.LSE})
    attnplug.register_impl(ImplSpec(name="stubbed", kernel=kernel, backend=None, capabilities=capabilities))
    query, key, value, grad = torch.randn(4, 1, 1, 16, 64, dtype=torch.bfloat16)
    params = attnplug.SDPAParams(query, key, value, scale=0.125)
    tensors = {"query": query, "key": key, "value": value}
    plan, device = launches.forward(params, HOPPER), query.device
    plan.run(tensors, device)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]

    def with_backward() -> Any:
        out = attnplug.scaled_dot_product_attention(*leaves, impl="stubbed")
        return torch.autograd.grad(out, leaves, grad)

    with torch.no_grad():
        times = alternate(
            {
                "forward, to the driver": lambda: attnplug.scaled_dot_product_attention(
                    query, key, value, impl="stubbed"
                ),
                "  of it, the kernel": lambda: impl.forward(params),
                "  of it, a plan that is kept": lambda: plan.run(tensors, device),
                "a plan that is not kept": lambda: launches.forward(params, HOPPER).run(tensors, device),
                "F.scaled_dot_product_attention on the CPU": lambda: sdpa(query, key, value),
            },
            turns,
            20,
        )
    for name in times.seconds:
        yield Result(name, times.microseconds(name), "us", aim=AIMS.get(name))
    times = alternate({"forward and backward, to the driver": with_backward}, turns, 10)
    for name in times.seconds:
        yield Result(name, times.microseconds(name), "us")
    yield from other_calls(turns)
    yield from to_the_operators(turns)


def other_calls(turns: int) -> Iterator[Result]:
    """Time a step of decoding, whose keys are split among programs, and packed sequences, to the driver."""
    query = torch.randn(1, 32, 1, 128, dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, 8, 2048, 128, dtype=torch.bfloat16)
    tokens = torch.randn(32, 1, 64, dtype=torch.bfloat16)
    starts = torch.tensor([0, 16, 32], dtype=torch.int32)
    candidates = {
        "decoding, to the driver": lambda: attnplug.scaled_dot_product_attention(
            query, key, value, enable_gqa=True, impl="stubbed"
        ),
        "packed sequences, to the driver": lambda: attnplug.varlen_attn(
            tokens, tokens, tokens, starts, starts, 16, 16, impl="stubbed"
        ),
    }
    with torch.no_grad():
        times = alternate(candidates, turns, 20)
    for name in candidates:
        yield Result(name, times.microseconds(name), "us")


def to_the_operators(turns: int) -> Iterator[Result]:
    """Time `efficient_cuda` and `cudnn` with PyTorch's operators replaced."""
    query, key, value = torch.randn(3, 1, 1, 16, 64, dtype=torch.bfloat16)
    out, lse, seed = torch.empty_like(query), torch.empty(1, 1, 32), torch.zeros((), dtype=torch.long)
    found = {
        "_scaled_dot_product_efficient_attention": (out, lse, seed, seed),
        "_scaled_dot_product_cudnn_attention": (out, lse[..., :16], None, None, 16, 16, seed, seed, None),
    }
    operators.bound = lambda name: lambda *args, **options: found[name]
    operators.efficient_forward = lambda *args, **options: (out.transpose(1, 2), lse, seed, seed, 16, 16)
    operators.cudnn_forward = lambda *args, **options: found["_scaled_dot_product_cudnn_attention"]
    candidates: dict[str, Any] = {}
    for name, kernel in (("efficient_cuda", efficient), ("cudnn", cudnn)):
        given = SimpleNamespace(forward=kernel.forward, backward=kernel.backward, prepare=kernel.prepare)
        capabilities = Capabilities(features={Feature.LSE})
        attnplug.register_impl(ImplSpec(name=f"{name}_stubbed", kernel=given, backend=None, capabilities=capabilities))
        candidates[f"{name}, to the operator"] = lambda name=f"{name}_stubbed": attnplug.scaled_dot_product_attention(
            query, key, value, impl=name
        )
    with torch.no_grad():
        times = alternate(candidates, turns, 20)
    for name in candidates:
        yield Result(name, times.microseconds(name), "us")


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
