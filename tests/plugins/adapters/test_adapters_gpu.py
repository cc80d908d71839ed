"""Each adapter on the real library, wherever that is installed: the kit, and figures beside PyTorch's own."""

from __future__ import annotations

import pytest

import attnplug
from adapters_on_standins import wrong
from attnplug.testing import check_impl

pytest.importorskip("attnplug_adapters", reason="attnplug-adapters is not installed")

NAMES = ["flash_attn4", "flash_attn3", "flash_attn2", "xformers", "flashinfer", "sage_attention", "flex"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_it_conforms(name: str) -> None:
    record = {record.name: record for record in attnplug.list_impls()}[name]
    if record.status != "available":
        pytest.skip(f"{name} is {record.status}: {record.reason}")
    declared = sorted(record.capabilities.dtypes or ())
    dtype = "bfloat16" if "bfloat16" in declared else declared[0]
    report = check_impl(name, device="cuda", dtype=dtype)
    assert not wrong(report), "\n\n".join(wrong(report))
