"""On what a measurement was made, or would be: the device by its name, and the versions of what computes."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

from attnplug._call.device import architecture_name
from attnplug._registry.machine import installed_version
from attnplug._registry.registry import Registry
from attnplug._tracing import cudnn_version


@cache
def device_identity(device: torch.device) -> tuple[str, str] | None:
    """Return the name of a device and its capability, a CPU's vector instructions; None for one that is not here."""
    if device.type == "cpu":
        return processor(), str(torch.backends.cpu.get_cpu_capability())
    if device.type != "cuda" or not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return None
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    return properties.name, architecture_name(device) if torch.version.hip else capability


def processor() -> str:
    """Return what a CPU is called by who made it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


@cache
def runtime_versions() -> dict[str, str | None]:
    """Return the versions of torch, CUDA or ROCm, cuDNN and Triton; None for what is not here."""
    cudnn = cudnn_version()
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": None if cudnn is None else str(cudnn),
        "triton": installed_version("triton"),
    }


def plugin_versions(registry: Registry) -> dict[str, str]:
    """Return the versions of the distributions that implementations come from."""
    return {entry.distribution: entry.version for entry in registry if entry.version}
