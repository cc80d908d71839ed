"""What a call costs on the host: small ones, so that the GPU has nothing to do.

On a GPU, or with PyTorch's CUDA build and `without_gpu.py`: each implementation that has a launch of its own, against
PyTorch's function. With a build for the CPU flash_triton is timed with Triton's driver stubbed: real kernels are
compiled for a Hopper GPU, and only what would load and launch them is replaced, so that what is timed is all that
Python does, from attnplug's call on.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import attnplug
import harness
from attnplug import Capabilities, CausalVariant, Feature, ImplSpec, SDPAParams
from attnplug_flash_triton import impl, launches
from attnplug_flash_triton.problem import Machine
from harness import Result, alternate

HOPPER = Machine("sm_90", 132)
LAYERS = 32
NO_GPU = "no GPU"
"""The name of the device of `without_gpu.py`."""
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
    if torch.cuda.is_available():
        with torch.no_grad():
            yield from on_gpu(3 if quick else 100)
    else:
        yield from stubbed(3 if quick else 300)


def on_gpu(turns: int) -> Iterator[Result]:
    """Time each implementation against PyTorch's functions: a call, one of a decode loop, forward and backward.

    The same of packed sequences, and of a training step on a batch whose sizes are new.
    """
    theirs = "F.scaled_dot_product_attention"
    available = {record.name for record in attnplug.list_impls() if record.status == "available"}
    ours = [name for name in ("flash_triton", "cudnn", "efficient_cuda", "aten_flash") if name in available]
    functions: dict[str, Any] = {theirs: sdpa, "default": attnplug.scaled_dot_product_attention}
    functions |= {name: partial(attnplug.scaled_dot_product_attention, impl=name) for name in ours}
    limit = None if torch.cuda.get_device_name() == NO_GPU else 1.3  # of CUDA's time, too
    few = -(-turns // 4)  # turns of many calls: cuDNN makes a plan for each new length
    yield from against(
        functions,
        (
            ("on the host", one_call, 20, turns, 1, limit),
            ("forward and backward", forward_and_backward, 10, turns, 1, None),
            ("a call of a decode loop", decode_loop, 1, few, LAYERS, None),
        ),
    )
    functions = {"torch.nn.attention.varlen": varlen_attn}
    functions |= {name: partial(attnplug.varlen_attn, impl=name) for name in ours if takes_packed(name)}
    yield from against(
        functions,
        (
            ("packed", packed_call, 20, turns, 1, None),
            ("packed, forward and backward", packed_forward_and_backward, 10, turns, 1, None),
            ("packed, forward and backward of a layer of one step", packed_step, 1, few, LAYERS, None),
            ("packed, a call of a decode loop", packed_decode_loop, 1, few, LAYERS, None),
        ),
    )


def against(
    functions: dict[str, Any], kinds: Iterable[tuple[str, Any, int, int, int, float | None]]
) -> Iterator[Result]:
    """Time functions against the first of them, and give the time of one of so many layers."""
    theirs, *ours = functions
    for kind, prepared, calls, turns, layers, limit in kinds:
        candidates = {name: prepared(function) for name, function in functions.items()}
        times = alternate(candidates, turns, calls, dict.fromkeys(candidates, finished))
        for name in ours:
            details = {"us": times.microseconds(name) / layers, "of it": times.microseconds(theirs) / layers}
            yield Result(f"{name} / {theirs}, {kind}", times.ratio(name, theirs), "ratio", limit=limit, details=details)


def one_call(function: Any) -> Any:
    tensors = torch.randn(3, 1, 1, 16, 64, dtype=torch.bfloat16, device="cuda").unbind()
    return lambda: function(*tensors)


def decode_loop(function: Any) -> Any:
    """Return what decodes one token in a model of so many layers: each token has a key more than the one before."""
    query = torch.randn(1, 8, 1, 64, dtype=torch.bfloat16, device="cuda")
    keys, values = torch.randn(2, 1, 8, 8192, 64, dtype=torch.bfloat16, device="cuda").unbind()
    lengths = itertools.cycle(range(256, 8192))

    def token() -> None:
        length = next(lengths)
        key, value = keys[:, :, :length], values[:, :, :length]
        for _ in range(LAYERS):
            function(query, key, value)

    return token


def forward_and_backward(function: Any) -> Any:
    tensors = [torch.randn(1, 2, 128, 64, dtype=torch.bfloat16, device="cuda").requires_grad_() for _ in range(3)]
    grad = torch.randn(1, 128, 2, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2)

    def both() -> Any:
        with torch.enable_grad():
            return torch.autograd.grad(function(*tensors, is_causal=True), tensors, grad)

    return both


def starts(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


def takes_packed(name: str) -> bool:
    tokens = torch.randn(8, 1, 64, dtype=torch.bfloat16, device="cuda").requires_grad_()
    of_sequences = dict(cu_seq_q=starts(8), cu_seq_k=starts(8), max_q=8, max_k=8)
    params = SDPAParams(tokens, tokens, tokens, causal_variant=CausalVariant.LOWER_RIGHT, **of_sequences)
    return attnplug.can_use_impl(name, params).accepted


def packed_call(function: Any) -> Any:
    tokens = torch.randn(3, 32, 1, 64, dtype=torch.bfloat16, device="cuda").unbind()
    lengths = starts(16, 16)
    return lambda: function(*tokens, lengths, lengths, 16, 16)


def packed_forward_and_backward(function: Any) -> Any:
    tokens = [torch.randn(128, 2, 64, dtype=torch.bfloat16, device="cuda").requires_grad_() for _ in range(3)]
    grad, lengths = torch.randn(128, 2, 64, dtype=torch.bfloat16, device="cuda"), starts(48, 80)

    def both() -> Any:
        with torch.enable_grad():
            return torch.autograd.grad(function(*tokens, lengths, lengths, 80, 80), tokens, grad)

    return both


def packed_step(function: Any) -> Any:
    """Return what trains a model of so many layers on one batch, which has other sizes than those before it."""
    *tokens, grads = torch.randn(4, 4096, 2, 64, dtype=torch.bfloat16, device="cuda").unbind()
    batches = itertools.cycle([(number, starts(16, number - 16)) for number in range(4096, 512, -3)])

    def step() -> None:
        number, lengths = next(batches)
        with torch.enable_grad():
            for _ in range(LAYERS):
                leaves = [each[:number].detach().requires_grad_() for each in tokens]
                out = function(*leaves, lengths, lengths, number - 16, number - 16)
                torch.autograd.grad(out, leaves, grads[:number])

    return step


def packed_decode_loop(function: Any) -> Any:
    """Return what decodes one token of each of eight sequences, whose keys are packed."""
    query, keys = (torch.randn(size, 8, 64, dtype=torch.bfloat16, device="cuda") for size in (8, 8 * 2048))
    each = starts(*[1] * 8)
    lengths = itertools.cycle([(length, each * length) for length in range(256, 2048)])

    def token() -> None:
        length, of_keys = next(lengths)
        for _ in range(LAYERS):
            function(query, keys[: 8 * length], keys[: 8 * length], each, of_keys, 1, length)

    return token


@contextmanager
def finished() -> Iterator[None]:
    """Wait for the GPU outside the clock, so that no call waits for those before it."""
    yield
    torch.cuda.synchronize()


def stubbed(turns: int) -> Iterator[Result]:
    driver.set_active(Stub())
    os.environ["FLASH_TRITON_HOPPER"] = "0"  # tensor maps, which those kernels take, only a driver can make
    impl.machine_of = lambda device: HOPPER  # CPU tensors, launched as if they were on the GPU
    roles = "forward", "backward", "prepare", "prepare_backward"
    kernel = SimpleNamespace(**{role: getattr(impl, role) for role in roles})
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


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
