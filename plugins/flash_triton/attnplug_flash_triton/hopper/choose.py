"""The family of kernels for compute capability 9.0: Hopper's own for the calls that they take, else the plain ones.

`FLASH_TRITON_HOPPER` says which of them may run: 0 none, 1 all, also what has not been proven on such a GPU; by default
what has.
"""

from __future__ import annotations

from torch import Tensor

from attnplug import SDPAParams
from attnplug_flash_triton import launches
from attnplug_flash_triton.hopper import gradients, outputs
from attnplug_flash_triton.plans import Plan
from attnplug_flash_triton.problem import Machine

VARIABLE = "FLASH_TRITON_HOPPER"


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
    family = launches if reasons_backward(params) else gradients
    return family.backward(params, machine, grad_out, grad_lse, out, lse, *statistics)


def reasons_forward(params: SDPAParams) -> list[str]:
    """Return why the plain kernels run forward of a call; none if Hopper's own do."""
    return outputs.reasons(params)


def reasons_backward(params: SDPAParams) -> list[str]:
    """Return why the plain kernels run backward of a call; none if Hopper's own do."""
    return gradients.reasons(params)
