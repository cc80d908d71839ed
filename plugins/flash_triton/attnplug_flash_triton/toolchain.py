"""The assembler that turns the kernels into machine code for NVIDIA cards.

ptxas up to 13.0 corrupts products whose first operand is in registers on Hopper, which is what the
product of probabilities and values is (https://github.com/triton-lang/triton/issues/11781). Triton 3.6 and
3.7 carry 12.8 for Hopper; Triton 3.7 carries a later one besides, for Blackwell, which knows Hopper too.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from typing import Any

from triton import knobs
from triton.backends.nvidia import compiler

LEAST = (13, 1)


@cache
def reasons(device: Any) -> list[str]:
    """Return why kernels for this card would be wrong; a good assembler that is at hand is put to use.

    It is set for the whole process: there is one such setting in Triton, and a wrong product is wrong in
    every kernel.
    """
    import torch

    if torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] != 9:
        return []
    return use_good_ptxas()


def use_good_ptxas() -> list[str]:
    """Make Triton use an assembler that is good for Hopper; return why there is none, or nothing."""
    found = version(knobs.nvidia.ptxas.path)
    if found >= LEAST:
        return []
    better = _of_blackwell()
    if version(better) >= LEAST:
        knobs.nvidia.ptxas = better
        compiler.get_ptxas_version.cache_clear()  # it is part of the key under which Triton keeps machine code
        return []
    return [
        f"ptxas {found[0]}.{found[1]} corrupts products on Hopper; point TRITON_PTXAS_PATH at ptxas "
        f"{LEAST[0]}.{LEAST[1]} or later, or install triton 3.7 or later"
    ]


def _of_blackwell() -> str:
    try:
        return str(knobs.nvidia.ptxas_blackwell.path)
    except (AttributeError, RuntimeError):  # an older Triton, or a build without it
        return ""


@cache
def version(path: str) -> tuple[int, int]:
    """Return the version of the assembler at `path`; (0, 0) if there is none."""
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return (0, 0)
    match = re.search(r"release (\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)
