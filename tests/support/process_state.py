"""What a test must leave as it found it, because it is the whole process's: attnplug's state and PyTorch's.

A test that leaves a scope, an activation, a bound module or an overridden operator fails another test, at times and far
away. `conftest.py` compares snapshots around each test, so that it fails itself. No public name tells of all that lies
there, so attnplug's part is read where it is kept.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.nn.attention as torch_attention
import torch.nn.functional as F

import attnplug
from attnplug._dispatch import resolver
from attnplug._selection.state import process, thread

OPERATORS = tuple(
    f"aten::{name}"
    for name in (
        "scaled_dot_product_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_backward",
    )
)
# Set by pytest, by Inductor (the last for good at its first Triton kernel, `runtime/triton_heuristics.py`), by
# scikit-learn where it is imported, and for the profiler, which reads it once.
OTHERS = (
    *("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TRITON_CACHE_DIR"),
    *("KMP_", "KINETO_LOG_LEVEL"),
)
# PyTorch's registry of implementations has no way to take a name back, nor has what follows it.
KEPT = {"listeners"}


def registered() -> dict[str, str]:
    """Return the distribution of each implementation; a record of all would ask whether each can run here."""
    attnplug.list_flash_attention_impls()  # fills the registry
    assert process.registry is not None
    return {entry.spec.name: entry.distribution for entry in process.registry if entry.distribution != "torch"}


def snapshot() -> dict[str, Any]:
    """Return the state by name, as values that can be compared. Takes about a millisecond."""
    state = {
        "registered implementations": registered(),
        "PyTorch's active implementation": torch_attention.current_flash_attention_impl(),
        "F.scaled_dot_product_attention": F.scaled_dot_product_attention,
        "F.multi_head_attention_forward": F.multi_head_attention_forward,
        "torch.backends.mha.get_fastpath_enabled": torch.backends.mha.get_fastpath_enabled,
        "the fast path": torch.backends.mha.get_fastpath_enabled(),
        "flash_sdp_enabled": torch.backends.cuda.flash_sdp_enabled(),
        "mem_efficient_sdp_enabled": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math_sdp_enabled": torch.backends.cuda.math_sdp_enabled(),
        "cudnn_sdp_enabled": torch.backends.cuda.cudnn_sdp_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch._C._is_any_autocast_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 products": torch.get_float32_matmul_precision(),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "working directory": os.getcwd(),
    }
    state |= {f"kernels of {operator}": torch._C._dispatch_dump(operator) for operator in OPERATORS}
    state |= {f"os.environ[{name!r}]": value for name, value in os.environ.items() if not name.startswith(OTHERS)}
    state |= {f"attnplug's process.{name}": value for name, value in vars(process).items() if name not in KEPT}
    of_thread = vars(thread.state) | {"in_kernel": thread.in_kernel}
    return state | {f"attnplug's thread.{name}": value for name, value in of_thread.items()}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Say what is not as it was, a line each."""
    names = sorted(before.keys() | after.keys())
    pairs = [(name, before.get(name, "nothing"), after.get(name, "nothing")) for name in names]
    return [f"{name} was {old}, and is {new}" for name, old, new in pairs if old != new]


def forget() -> None:
    """Forget what only accumulates: no test can take it back, and another would notice.

    Dynamo compiles a function for a few kinds of calls and then no more (`recompile_limit`), and never again a function
    whose trace failed; a decision is kept for calls like the one that it was made for, and a fallback is reported once.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if process.registry is not None:
        process.registry.changed()
    resolver._reported.clear()
