"""The whole conformance kit on each adapter, on a stand-in that does what its library is documented to do."""

from __future__ import annotations

from typing import Any

import pytest

from attnplug.testing import check_impl

pytest.importorskip("attnplug_adapters", reason="attnplug-adapters is not installed")
from adapters_on_standins import register, standin, wrong
from attnplug_adapters import specs
from attnplug_adapters.flash_attn2 import FlashAttn2
from attnplug_adapters.flash_attn3 import FlashAttn3
from attnplug_adapters.flash_attn4 import FlashAttn4
from attnplug_adapters.flashinfer import FlashInfer
from attnplug_adapters.sage_attention import SageAttention
from attnplug_adapters.xformers import XFormers

slow = pytest.mark.slow
CASES = [
    (FlashAttn2, "flash_attn2", specs.FLASH_ATTN2, "float16"),
    pytest.param(FlashAttn3, "flash_attn3", specs.FLASH_ATTN3, "bfloat16", marks=slow),
    (FlashAttn4, "flash_attn4", specs.FLASH_ATTN4, "float16"),
    (SageAttention, "sage2", specs.SAGE_ATTENTION, "float16"),
    pytest.param(SageAttention, "sage1", specs.SAGE_ATTENTION1, "float32", marks=slow),
    (XFormers, "xformers", specs.XFORMERS, "float32"),
    pytest.param(XFormers, "xformers", specs.XFORMERS, "bfloat16", marks=slow),
    (FlashInfer, "flashinfer", specs.FLASHINFER, "float16"),
]


@pytest.mark.parametrize(("adapter", "library", "capabilities", "dtype"), CASES)
def test_the_adapter_conforms(adapter: Any, library: str, capabilities: Any, dtype: str) -> None:
    register(adapter(standin(library)), capabilities)
    report = check_impl("emulated", device="cpu", dtype=dtype)
    assert not wrong(report), "\n\n".join(wrong(report))
    declined = {result.check for result in report.results if result.status == "declined"}
    assert declined <= {"check_paged_gradients"}
