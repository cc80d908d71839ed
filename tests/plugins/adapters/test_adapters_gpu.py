"""Each adapter on the real library, wherever that is installed: the kit, and figures beside PyTorch's own."""

from __future__ import annotations

from importlib.metadata import version

import pytest

import attnplug
from adapters_on_standins import wrong
from attnplug.testing import Call, CheckFailure, Report, assert_right, check_impl

pytest.importorskip("attnplug_adapters", reason="attnplug-adapters is not installed")

NAMES = ["flash_attn4", "flash_attn3", "flash_attn2", "xformers", "flashinfer", "sage_attention"]
SHOWN = [
    "check_varlen_one_token",
    "check_unused_keys_are_not_felt",
    "check_unused_pages_are_not_felt",
    "check_tokens_of_no_sequence",
]
"""What libraries got wrong on a GPU, so that it is asked about in seconds, before the whole kit."""
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
def test_what_a_gpu_has_shown_is_mended_or_declined(name: str) -> None:
    report = report_of(name, SHOWN)
    assert not wrong(report), "\n\n".join(wrong(report))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
def test_sage_attention_is_wrong_where_it_declines_for_missing_keys(size: int) -> None:
    """The reason names the release; a later one that is right fails here, and may then be taken."""
    record = {record.name: record for record in attnplug.list_impls()}["sage_attention"]
    if record.status != "available":
        pytest.skip(f"sage_attention is {record.status}: {record.reason}")
    from attnplug_adapters.sage_attention import kernel

    call = Call(queries=20, keys=37, head_size=size, dtype="bfloat16", device="cuda")
    call.but(head_size=size - 8).check("sage_attention")  # whose values have a column to spare
    inputs = call.make()
    candidates = attnplug.explain(**inputs.arguments, impl="sage_attention").candidates
    (candidate,) = (each for each in candidates if each.name == "sage_attention")
    if candidate.accepted:
        call.check("sage_attention")
        return
    (reason,) = candidate.reasons
    assert version("sageattention") in reason
    assert "27 beside 37" in reason
    params = attnplug.SDPAParams(*(inputs.arguments[name] for name in ("query", "key", "value")), scale=size**-0.5)
    with pytest.raises(CheckFailure, match="allowed for a kernel that quantizes"):
        assert_right(inputs.arguments, kernel.forward(params)[0], quantized=True)


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
