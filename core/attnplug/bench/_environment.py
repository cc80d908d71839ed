"""What a figure is worth nothing without: the machine and the versions. No name of a machine or a user is in it."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import attnplug
from attnplug._call.machine import processor
from attnplug._registry.machine import installed_version

_PACKAGES = ("pluggy", "triton", "numpy")


def environment(devices: set[str]) -> dict[str, Any]:
    """Return processor, GPUs among `devices`, versions of what measures and of every implementation's package."""
    gpus = sorted(device for device in devices if torch.device(device).type == "cuda")
    origins = {record.distribution: record.version for record in attnplug.list_impls() if record.version}
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        **({"gpus": [_gpu(device) for device in gpus]} if gpus else {}),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "attnplug": attnplug.__version__,
        **{name: installed_version(name) for name in _PACKAGES},
        "implementations": origins,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def device_name(device: str) -> str:
    """Return what a device is called by who made it, such as `NVIDIA H200`."""
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_properties(device).name)
    return processor()


def _gpu(device: str) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    kind = properties.gcnArchName if torch.version.hip else f"{properties.major}.{properties.minor}"
    return {
        "device": device,
        "name": properties.name,
        "capability": kind,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "runtime": torch.version.cuda or torch.version.hip,
    }
