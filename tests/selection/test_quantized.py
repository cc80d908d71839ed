"""Kernels that quantize their inputs: marked in lists, held to a rule of their own, run only where they are named."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import attnplug
from attnplug import Capabilities, Feature, ImplSpec, SDPBackend
from attnplug.cli import main
from attnplug.testing import Call, check_impl

FEATURES = {Feature.CAUSAL, Feature.SOFTCAP, Feature.LSE}


def rounded(params: Any) -> Any:
    """Attention whose probabilities are off by up to `error` of themselves."""
    logits = params.scale * params.query @ params.key.mT
    if params.softcap > 0:
        logits = params.softcap * torch.tanh(logits / params.softcap)
    if params.is_causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    lse = torch.logsumexp(logits, -1)
    return torch.softmax(logits, -1) @ params.value * (1 + rounded.error), lse


rounded.error = 0.01


@pytest.fixture(autouse=True)
def _registered() -> None:
    rounded.error = 0.01
    capabilities = Capabilities(dtypes=("float32",), features=FEATURES, quantized=True)
    attnplug.register_impl(
        ImplSpec(name="rounded", kernel=rounded, backend=SDPBackend.MATH, capabilities=capabilities, priority=1000)
    )


def tensors() -> list[torch.Tensor]:
    return [torch.randn(1, 2, 8, 16) for _ in range(3)]


def ran(**options: Any) -> str:
    with attnplug.record() as calls:
        attnplug.scaled_dot_product_attention(*tensors(), softcap=5.0, **options)
    return calls[0].impl


class TestRunsOnlyWhereItIsNamed:
    def test_not_by_priority(self) -> None:
        assert ran() != "rounded"

    def test_not_even_where_nothing_else_can(self) -> None:
        alone = ImplSpec(
            name="alone",
            kernel=rounded,
            backend=SDPBackend.OVERRIDEABLE,
            capabilities=Capabilities(features=FEATURES, quantized=True),
        )
        attnplug.register_impl(alone)
        with attnplug.sdpa_kernel(SDPBackend.OVERRIDEABLE), pytest.raises(attnplug.NoImplementationError):
            attnplug.scaled_dot_product_attention(*tensors())
        with attnplug.sdpa_kernel([SDPBackend.OVERRIDEABLE, "alone"]):
            assert ran() == "alone"

    def test_not_in_a_scope_of_its_family(self) -> None:
        with attnplug.sdpa_kernel([SDPBackend.MATH]):
            assert ran() != "rounded"

    def test_with_impl(self) -> None:
        assert ran(impl="rounded") == "rounded"

    def test_in_a_scope_that_names_it(self) -> None:
        with attnplug.sdpa_kernel("rounded"):
            assert ran() == "rounded"
        with attnplug.sdpa_kernel([SDPBackend.FLASH_ATTENTION, "rounded"]):
            assert ran() == "rounded"

    def test_while_it_is_active(self) -> None:
        attnplug.activate_flash_attention_impl("rounded")
        assert ran() == "rounded"
        with attnplug.sdpa_kernel(SDPBackend.MATH):
            assert ran() == "rounded"
        attnplug.restore_flash_attention_impl()
        assert ran() != "rounded"

    def test_explain_says_why_it_is_left_out(self) -> None:
        found = attnplug.explain(*tensors(), softcap=5.0)
        (verdict,) = [item for item in found.candidates if item.name == "rounded"]
        assert not verdict.accepted
        assert verdict.reasons == ("is quantized, and runs only where 'rounded' is named",)
        with attnplug.sdpa_kernel("torch"):
            found = attnplug.explain(*tensors())
        (verdict,) = [item for item in found.candidates if item.name == "rounded"]
        assert verdict.reasons[0] == "outside sdpa_kernel(['torch'])"


class TestLists:
    def test_the_record_says_so(self) -> None:
        (record,) = [record for record in attnplug.list_impls() if record.name == "rounded"]
        assert record.capabilities.quantized

    def test_the_command_line_says_so(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["list"]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rounded ")]
        assert line.endswith("quantized, runs only where it is named")
        assert main(["list", "--verbose"]) == 0
        assert "right within 5 %" in capsys.readouterr().out
        assert main(["list", "--json"]) == 0
        found = {item["name"]: item["quantized"] for item in json.loads(capsys.readouterr().out)["implementations"]}
        assert found["rounded"] and not found["torch"]


class TestKit:
    def test_holds_it_to_five_percent_of_the_norm(self) -> None:
        report = check_impl("rounded", dtype="float32", checks=["check_values", "check_causal", "check_lse"])
        assert report.passed, report.summary()
        rounded.error = 0.06
        report = check_impl("rounded", dtype="float32", checks=["check_values"])
        assert not report.passed

    def test_allows_no_nan(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rounded, "error", float("nan"))
        with pytest.raises(AssertionError):
            Call(queries=4, keys=4).check("rounded")


def test_a_kernel_is_quantized_as_a_whole_or_not_at_all() -> None:
    exact, quantized = Capabilities(devices=("cpu",)), Capabilities(devices=("cuda",), quantized=True)
    with pytest.raises(attnplug.SpecError, match="register two implementations"):
        _ = exact | quantized
    assert (quantized | quantized).quantized
    with pytest.raises(attnplug.SpecError, match="expected a bool"):
        Capabilities(quantized=1)
