"""The GPU that a call would run on, asked in one place, so that a question can be about one that is not there.

Capabilities and the kernels' `supports` depend on the GPU. `explain` and `can_use_impl` may be asked about
another one; while they answer, and only in their thread, `compute_capability` tells of that one. No call runs
meanwhile, so no decision that is kept can be made for a GPU that was only described.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from attnplug._arguments import shown
from attnplug._tracing import constant_in_traces, cudnn_version

Capability = tuple[int, int]


class _Thread(threading.local):
    def __init__(self) -> None:
        self.described: Capability | None = None
        self.has_context = False


_thread = _Thread()


@cache
def type_of(device: torch.device) -> str:
    """Return `device.type`, which PyTorch writes through a stream: 0.3 us, and 20 where nothing is in caches."""
    return device.type


@cache
def name_of(device: torch.device) -> str:
    """Return `str(device)`, likewise."""
    return str(device)


@cache
def name_of_dtype(dtype: torch.dtype) -> str:
    """Return the name of a dtype as capabilities have it, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def compute_capability(device: torch.device | str) -> Capability | None:
    """Return the NVIDIA compute capability of a device: what a kernel's `supports` asks about the GPU.

    Within `explain(..., compute_capability=(9, 0))` and `can_use_impl(..., compute_capability=(9, 0))` it is the
    one that was given there, so that an implementation can be explained for a GPU that is not on this machine.
    What is concluded from it must therefore not be kept under the device alone.

    Args:
        device: such as `query.device`.

    Returns:
        Such as `(9, 0)`. None for a device that is not a CUDA device or is not on this machine, and wherever PyTorch
        is built for AMD GPUs, whose architectures are not numbered so.

    Examples:
        >>> import attnplug
        >>> attnplug.compute_capability("cpu") is None
        True
    """
    device = as_device("device", device)
    if type_of(device) != "cuda" or torch.version.hip is not None:
        return None
    if _thread.described is not None:
        return _thread.described
    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.get_device_capability(index) if index < torch.cuda.device_count() else None


@constant_in_traces
def bind_cuda_context() -> None:
    """Give this thread the CUDA context of its device, without which CUDA's driver makes no tensor map on the host.

    For kernels of the tensor memory accelerator: call it before the first map is made, or before a library that makes
    some. A thread has no context until something in it needs one, and memory out of PyTorch's cache needs none. The
    driver then refuses ("invalid device context"), and what CUTLASS hands on all the same is no map: the kernel ends
    with "an illegal instruction was encountered". Triton's launcher binds the context, but after its maps are made.

    2 us, and 0.1 from then on in the same thread. It may be called without a GPU, while a CUDA graph is captured, and
    in a trace, which binds for the thread that traces and puts nothing into the graph.

    Examples:
        >>> import attnplug
        >>> attnplug.bind_cuda_context()
    """
    if not _thread.has_context and torch.cuda.is_initialized():
        # Binds for the device that is the current one, too (pytorch#155900). Another that becomes it later is
        # bound by that change.
        torch.cuda.set_device(torch.cuda.current_device())
        _thread.has_context = True


@constant_in_traces
def cudnn_errs(index: int) -> tuple[bool, bool, bool]:
    """Whether PyTorch prefers a cuDNN on a CUDA device that may get single queries, their gradients or dropout wrong.

    `builtin.faults` tells which calls it does get wrong.
    """
    found = _cudnn_errs.get(index)
    if found is None:
        capability, cudnn = compute_capability(torch.device("cuda", index)), cudnn_version() or 0
        major = 0 if capability is None else capability[0]
        prefers = major in (9, 10) and cudnn > 91500
        found = _cudnn_errs[index] = major in (10, 11) and cudnn <= 92500, major == 9 and prefers, prefers
    return found


_cudnn_errs: dict[int, tuple[bool, bool, bool]] = {}


def as_device(argument: str, value: Any) -> torch.device:
    """Return the device that is named.

    Raises:
        TypeError, ValueError: PyTorch knows no such device.
    """
    try:
        return torch.device(value)
    except TypeError:
        raise TypeError(f"{argument}: expected a device such as 'cpu' or 'cuda:1', got {shown(value)}") from None
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{argument}: {shown(value)} is not a device here: {str(error).splitlines()[0]}") from None


@contextmanager
def described(capability: Any, device: Any) -> Iterator[None]:
    """Answer questions of this thread for a GPU of this compute capability; None leaves what is there.

    Raises:
        TypeError, ValueError: it is not one, or `device`, the query's, is not a CUDA device.
    """
    before = _thread.described
    _thread.described = None if capability is None else _checked(capability, device)
    try:
        yield
    finally:
        _thread.described = before


def _checked(capability: Any, device: Any) -> Capability:
    if not isinstance(capability, (tuple, list)) or [type(part) for part in capability] != [int, int]:
        raise TypeError(f"compute_capability: expected two integers such as (9, 0), got {capability!r}")
    major, minor = capability
    if major < 1 or not 0 <= minor <= 9:
        raise ValueError(f"compute_capability: no GPU has {major}.{minor}; expected one such as (9, 0)")
    if torch.version.hip is not None:
        raise ValueError("compute_capability: is NVIDIA's, and this PyTorch is built for AMD GPUs; leave it out")
    if getattr(device, "type", None) != "cuda":
        raise ValueError(f"compute_capability: describes a CUDA device, and query is on {device}; put query on cuda")
    return major, minor


@cache
def architecture_name(device: Any) -> str:
    """Return the architecture of a ROCm device, such as `gfx942:sramecc+:xnack-`, or an empty string."""
    return torch.cuda.get_device_properties(device).gcnArchName if torch.cuda.is_available() else ""
