"""The family of kernels for compute capability 9.0: Hopper's own for the calls that they take, else the plain ones.

`FLASH_TRITON_HOPPER=0` keeps Hopper's own from running, and with 1 they do what has not yet run on a GPU, too.
"""

from __future__ import annotations

import os

from torch import Tensor

from attnplug import SDPAParams
from attnplug_flash_triton import config, launches
from attnplug_flash_triton.hopper import gradients, outputs
from attnplug_flash_triton.plans import Plan
from attnplug_flash_triton.problem import Machine

VARIABLE = "FLASH_TRITON_HOPPER"
PROVEN_WITH = "3.6"
"""The release of Triton with which they were proven on an H100; another makes other machine code of the same source."""


def forward(params: SDPAParams, machine: Machine) -> Plan:
    """Return the plan of forward; see `launches.forward`."""
    if reasons_forward(params):
        return launches.forward(params, machine)
    return outputs.forward(params, machine, join=wish() == "1")


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
    return _kept_out() or outputs.reasons(params)


def reasons_backward(params: SDPAParams, grad_out: Tensor | None = None) -> list[str]:
    """Return why the plain kernels run backward of a call, with `grad_out` if it is there; none if Hopper's own do."""
    return _kept_out() or gradients.reasons(params, grad_out)


def remark(kind: str, params: SDPAParams) -> str:
    """Return what is to be said of Hopper's own kernels, which run a call's `forward` or `backward`.

    That is where another Triton compiles them than that of the proof, and where there is what has not run on a GPU.
    """
    release = config.release()
    said = "" if release == PROVEN_WITH else f", proven with Triton {PROVEN_WITH}; this is {release}"
    if kind == "forward" and outputs.can_join(params, Machine("sm_90", 1)):
        if wish() == "1":
            said += f"; {VARIABLE}=1 uses a pipeline across tiles of queries, not yet proven on sm_90"
        else:
            said += f"; a pipeline across tiles of queries is not yet proven on sm_90, {VARIABLE}=1 uses it"
    return said


def _kept_out() -> list[str]:
    return [] if are_allowed() else [f"{VARIABLE}=0 keeps Hopper's own kernels from running"]


def are_allowed() -> bool:
    """Whether the environment lets Hopper's own kernels run.

    Raises:
        ValueError: it says neither 0 nor 1.
    """
    return wish() != "0"


def wish() -> str:
    """Return what the environment says: 0, 1, or nothing.

    Raises:
        ValueError: it says something else.
    """
    found = os.environ.get(VARIABLE, "")
    if found not in ("", "0", "1"):
        raise ValueError(
            f"{VARIABLE}={found!r} is neither 0 (plain kernels alone) nor 1 (Hopper's own, with what is not yet proven)"
        )
    return found
