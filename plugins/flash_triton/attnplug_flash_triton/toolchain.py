"""The assembler that turns the kernels into machine code for NVIDIA GPUs.

ptxas up to 13.0 corrupts products whose first operand is in registers on Hopper, which is what the
product of probabilities and values is (https://github.com/triton-lang/triton/issues/11781). Triton 3.6 to 3.9
carry 12.8 or 12.9 for Hopper; from 3.7 on they carry a later one besides, for Blackwell, which knows Hopper too.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.nvidia import compiler

from attnplug import compute_capability

LEAST = (13, 1)


@cache
def good_ptxas() -> str:
    """Return where there is an assembler that is good for Hopper: the one in use if it is; empty if there is none."""
    in_use = knobs.nvidia.ptxas.path
    return next((path for path in (in_use, *_others()) if version(path) >= LEAST), "")


def reasons(device: Any) -> list[str]:
    """Return why kernels for this GPU would be wrong."""
    if (compute_capability(device) or (0, 0))[0] != 9 or good_ptxas():
        return []
    major, minor = version(knobs.nvidia.ptxas.path)
    wanted = ".".join(map(str, LEAST))
    return [
        f"ptxas {major}.{minor} corrupts products on Hopper; install triton 3.7 or later, or nvidia-cuda-nvcc {wanted} "
        f"or later, or point TRITON_PTXAS_PATH at such a ptxas"
    ]


def use_good_ptxas() -> None:
    """Make Triton use an assembler that is good for Hopper, if there is one.

    It is set for the whole process: there is one such setting in Triton, and a wrong product is wrong in
    every kernel.
    """
    path = good_ptxas()
    if path and path != knobs.nvidia.ptxas.path:
        knobs.nvidia.ptxas = path
        compiler.get_ptxas_version.cache_clear()  # it is part of the key under which Triton keeps machine code


@contextmanager
def assembler_for(architecture: str) -> Iterator[None]:
    """Compile for an architecture, of which there need be no GPU, with the assembler that its GPU would use."""
    if architecture != "sm_90":
        yield
        return
    with knobs.nvidia.scope():
        use_good_ptxas()
        yield
    compiler.get_ptxas_version.cache_clear()


def _others() -> Iterator[str]:
    """Yield where there may be another ptxas: Triton's for Blackwell, the package nvidia-cuda-nvcc, CUDA's own."""
    with suppress(AttributeError, RuntimeError):  # a build of Triton without it
        yield str(knobs.nvidia.ptxas_blackwell.path)
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        yield from map(str, sorted(Path(folder).glob("cu*/bin/ptxas"), reverse=True))
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        yield os.path.join(home, "bin", "ptxas")
    if on_path := shutil.which("ptxas"):
        yield on_path


@cache
def version(path: str) -> tuple[int, int]:
    """Return the version of the assembler at `path`; (0, 0) if there is none."""
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return (0, 0)
    match = re.search(r"release (\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)
