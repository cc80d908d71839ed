"""What this machine has, asked without importing torch, so that listing stays quick."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import runpy
import sys
from collections.abc import Iterable
from functools import cache


def missing_modules(names: Iterable[str]) -> list[str]:
    """Return those of `names` that are not installed; nothing is imported."""
    return [name for name in names if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    """Whether a module is there; the packages that it is part of are not imported, as `find_spec` would."""
    if name in sys.modules:
        return True
    parts = name.split(".")
    spec = importlib.util.find_spec(parts[0])
    for depth in range(2, len(parts) + 1):
        if spec is None or spec.submodule_search_locations is None:
            return False
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:depth]), spec.submodule_search_locations)
    return spec is not None


def installed_version(name: str) -> str | None:
    """Return the version of a distribution; None if it is not installed."""
    from importlib_metadata import PackageNotFoundError, version  # 20 ms that `import attnplug` need not pay

    try:
        return str(version(name))
    except PackageNotFoundError:
        return None


@cache
def device_types() -> frozenset[str]:
    """Return the device types, among cpu and cuda, that calls can use on this machine.

    `cuda` stands for ROCm too, as in PyTorch. Without torch imported this is a quick look (is torch
    built for a GPU, does the driver have a device node); a call itself always goes by its tensors.
    """
    if "torch" in sys.modules:
        cuda = sys.modules["torch"].cuda.is_available()
    else:
        cuda = _torch_build_has_cuda() and _driver_present()
    return frozenset({"cpu", "cuda"}) if cuda else frozenset({"cpu"})


def lacks_gpu_build() -> bool:
    """Whether there is a driver of a GPU, and a PyTorch that was built without support for any."""
    return _driver_present() and os.name != "nt" and not _torch_build_has_cuda()


def _torch_build_has_cuda() -> bool:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return False
    version = os.path.join(next(iter(spec.submodule_search_locations)), "version.py")
    values = runpy.run_path(version) if os.path.exists(version) else {}
    return bool(values.get("cuda") or values.get("hip"))


def _driver_present() -> bool:
    return os.name == "nt" or any(os.path.exists(node) for node in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
