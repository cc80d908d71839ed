"""Each adapter on the real library, wherever that is installed: the kit, and figures beside PyTorch's own."""

from __future__ import annotations

import pytest

import attnplug
from adapters_on_standins import wrong
from attnplug.testing import Report, check_impl

pytest.importorskip("attnplug_adapters", reason="attnplug-adapters is not installed")

NAMES = ["flash_attn4", "flash_attn3", "flash_attn2", "xformers", "flashinfer", "sage_attention"]
FLEX = ["check_causal", "check_window_lower_right", "check_gradients", "check_lse", "check_sinks_gradient"]
"""A few kinds of calls: each takes a compilation."""


def report_of(name: str, checks: list[str] | None = None) -> Report:
    record = {record.name: record for record in attnplug.list_impls()}[name]
    if record.status != "available":
        pytest.skip(f"{name} is {record.status}: {record.reason}")
    declared = sorted(record.capabilities.dtypes or ())
    return check_impl(name, device="cuda", dtype="bfloat16" if "bfloat16" in declared else declared[0], checks=checks)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_it_conforms(name: str) -> None:
    report = report_of(name)
    assert not wrong(report), "\n\n".join(wrong(report))


@pytest.mark.gpu
@pytest.mark.slow(first=True)
def test_flex_conforms_in_a_few_kinds_of_calls() -> None:
    report = report_of("flex", FLEX)
    assert not wrong(report), "\n\n".join(wrong(report))
