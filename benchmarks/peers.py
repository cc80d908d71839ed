"""The kernels that flash_triton is measured against on a GPU, each by its own operator.

Without a GPU `--quick` runs the same code on tiny CPU tensors, to see that it runs: `aten_flash` stands for
flash_triton, and PyTorch's function for cuDNN.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

HAS_GPU = torch.cuda.is_available()
DEVICE, OURS = ("cuda", "flash_triton") if HAS_GPU else ("cpu", "aten_flash")
COLUMNS, TOKENS = 2048, 16_384

Attend = Callable[..., Tensor]

OF_PYTORCH = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "PyTorch's flash": SDPBackend.FLASH_ATTENTION}
INSTALLED = {
    "FlashAttention 3": ("flash_attn_interface", "fa3_fwd_interface"),
    "FlashAttention 2": ("flash_attn",),
}
"""The modules, in order of preference, whose `flash_attn_func` takes `(B, S, H, E)`."""


def needed(quick: bool, script: str) -> None:
    """End the program where there is no GPU, unless it is only to be seen that it runs."""
    if not HAS_GPU and not quick:
        sys.exit(f"{script} needs a GPU")


def inputs(size: int, length: int, count: int, requires_grad: bool = False) -> list[Tensor]:
    """Return tensors `(B, H, S, size)` of 16k tokens with 2048 columns of all heads; of a few, without a GPU."""
    shape = (TOKENS // length, COLUMNS // size, length, size) if HAS_GPU else (1, 2, 32, size)
    return [torch.randn(shape, dtype=torch.bfloat16, device=DEVICE, requires_grad=requires_grad) for _ in range(count)]


def of_pytorch() -> dict[str, Attend]:
    """Return PyTorch's kernels, each as a function of query, key, value and `is_causal`."""
    if not HAS_GPU:
        return {"cuDNN": sdpa}

    def alone(backend: SDPBackend) -> Attend:
        def attend(*tensors: Tensor, **options: Any) -> Tensor:
            with sdpa_kernel([backend]):
                return sdpa(*tensors, **options)

        return attend

    return {name: alone(backend) for name, backend in OF_PYTORCH.items()}


def installed() -> dict[str, Attend]:
    """Return the kernels of other packages that are there, as functions like those of `of_pytorch`; forward only."""
    found: dict[str, Attend] = {}
    for name, modules in INSTALLED.items():
        module = next((each for each in modules if importlib.util.find_spec(each) is not None), None)
        if module is None or not HAS_GPU:
            continue
        function = importlib.import_module(module).flash_attn_func

        def attend(*tensors: Tensor, is_causal: bool = False, function: Any = function) -> Tensor:
            out = function(*(tensor.transpose(1, 2) for tensor in tensors), causal=is_causal)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        found[name] = attend
    return found


def finish() -> None:
    """Wait for the GPU."""
    if HAS_GPU:
        torch.cuda.synchronize()
