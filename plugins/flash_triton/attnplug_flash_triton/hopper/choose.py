"""The family of kernels for compute capability 9.0: Hopper's own for the calls that they take, else the plain ones.

`FLASH_TRITON_HOPPER` says which of Hopper's own may run: 0 none, 1 all, also those that have not been run on such a GPU
(`PROVEN` lists those that have); by default, what is proven.
"""

from __future__ import annotations

import os

import triton
from torch import Tensor

from attnplug import SDPAParams
from attnplug_flash_triton import launches
from attnplug_flash_triton.hopper import gradients, outputs
from attnplug_flash_triton.plans import Plan
from attnplug_flash_triton.problem import Machine

VARIABLE = "FLASH_TRITON_HOPPER"
FORWARD, BACKWARD = "forward", "backward"
PROVEN = (FORWARD, BACKWARD)
"""What has been run on an H100 with this code: right, exact where it can be, and equal on repeated runs."""
PROVEN_WITH = "3.6"
"""The release of Triton with which it was; another makes other machine code of the same source."""


def forward(params: SDPAParams, machine: Machine) -> Plan:
    """Return the plan of forward; see `launches.forward`."""
    return (launches if reasons_forward(params) else outputs).forward(params, machine)


def backward(
    params: SDPAParams,
    machine: Machine,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *statistics: Tensor,
) -> Plan:
    """Return the plan of backward; see `launches.backward`."""
    family = launches if reasons_backward(params, grad_out) else gradients
    return family.backward(params, machine, grad_out, grad_lse, out, lse, *statistics)


def reasons_forward(params: SDPAParams) -> list[str]:
    """Return why the plain kernels run forward of a call; none if Hopper's own do."""
    return _kept_out(FORWARD) or outputs.reasons(params)


def reasons_backward(params: SDPAParams, grad_out: Tensor | None = None) -> list[str]:
    """Return why the plain kernels run backward of a call, with `grad_out` if it is there; none if Hopper's own do."""
    return _kept_out(BACKWARD) or gradients.reasons(params, grad_out)


def remark() -> str:
    """Return what is to be said of Hopper's own kernels where another Triton compiles them than that of the proof."""
    release = ".".join(triton.__version__.split(".")[:2])
    return "" if release == PROVEN_WITH else f", proven with Triton {PROVEN_WITH}; this is {release}"


def _kept_out(kernels: str) -> list[str]:
    """Return why none of these kernels may run."""
    wish = wanted()
    if wish == "0":
        return [f"{VARIABLE}=0 keeps Hopper's own kernels from running"]
    if kernels not in PROVEN and not wish:
        return [f"{kernels} is not yet proven on sm_90; {VARIABLE}=1 uses it"]
    return []


def wanted() -> str:
    """Return what the environment asks for: 0, 1, or nothing.

    Raises:
        ValueError: it asks for something else.
    """
    wish = os.environ.get(VARIABLE, "")
    if wish not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE}={wish!r} is neither 0 (plain kernels alone) nor 1 (also what is not yet proven)")
    return wish
