"""The conformance kit in full, for every implementation that runs on a CUDA device, a case for each check.

Those of attnplug-efficient-cuda are in `tests/plugins/efficient_cuda/test_gpu.py`: what they decline of what they
declare depends on PyTorch, cuDNN and the device. `make gpu` makes a quick run of all of them in workers instead.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnplug
from attnplug.testing import parametrize_with_checks

pytestmark = pytest.mark.gpu


def cases() -> list[Any]:
    """Return the checks of each implementation that this machine's GPU can run."""
    if not torch.cuda.is_available():
        return [pytest.param(None, id="needs a CUDA device")]
    found = []
    for record in attnplug.list_impls():
        if record.distribution == "attnplug-efficient-cuda":
            continue
        if record.status == "available" and "cuda" in (record.capabilities.devices or ("cuda",)):
            checks = parametrize_with_checks(record.name, device="cuda", level="full").args[1]
            found += [pytest.param(*each.values, marks=each.marks, id=f"{record.name}-{each.id}") for each in checks]
    return found


@pytest.mark.parametrize("check", cases())
def test_the_contract_is_kept(check: Any) -> None:
    check()
