"""`flex` on the CPU: all that PyTorch's flex_attention does there, and the formulas of what it does on CUDA alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch.nn.attention import flex_attention as torch_flex

import attnplug
from adapters_on_standins import register, wrong
from attnplug import CausalVariant, Feature
from attnplug.testing import Call, all_checks, check_impl

pytest.importorskip("attnplug_adapters", reason="attnplug-adapters is not installed")
from attnplug_adapters import flex, specs

TRACED = ["check_compile", "check_export", "check_fake_tensors"]


@pytest.fixture
def _unfused() -> Iterator[None]:
    """Let flex_attention compute with operators: a compilation takes seconds, and the kit asks for dozens of kinds."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def test_it_conforms_in_traces() -> None:
    report = check_impl("flex", device="cpu", dtype="float32", checks=TRACED)
    assert report.passed, report.summary()


@pytest.mark.usefixtures("_unfused")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_it_conforms_on_the_cpu(dtype: str) -> None:
    checks = [check.name for check in all_checks() if check.name not in TRACED]
    report = check_impl("flex", device="cpu", dtype=dtype, checks=checks)
    assert not wrong(report), "\n\n".join(wrong(report))
    assert all(result.status != "declined" for result in report.results)


@pytest.mark.usefixtures("_unfused")
def test_what_it_promises_on_cuda_alone_conforms_too() -> None:
    """lse, sinks and gradients, whose formulas are the same on every device."""
    register(flex, specs.FLEX_CUDA)
    checks = [
        "check_lse",
        "check_sinks",
        "check_sinks_of_blind_rows",
        "check_rows_before_the_first_key",
        "check_varlen",
    ]
    report = check_impl("emulated", device="cpu", dtype="float32", checks=checks)
    assert report.passed, report.summary()


@pytest.mark.slow
@pytest.mark.usefixtures("_unfused")
def test_its_gradients_are_those_of_the_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses gradients on the CPU, though it has operators for them."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "supports", lambda params: None)
    register(flex, specs.FLEX_CUDA)
    checks = ["check_gradients", "check_causal_gradients", "check_lse_gradient", "check_sinks_gradient"]
    report = check_impl("emulated", device="cpu", dtype="float32", checks=checks)
    assert not wrong(report), "\n\n".join(wrong(report))


def test_gradients_on_the_cpu_are_declined_with_the_reason() -> None:
    query = torch.randn(1, 2, 8, 16, requires_grad=True)
    reasons = attnplug.explain(query, query, query, impl="flex").candidates
    (verdict,) = [item for item in reasons if item.name == "flex"]
    assert "PyTorch's flex_attention has no backward on CPU" in verdict.reasons
    assert attnplug.can_use_impl("flex", attnplug.SDPAParams(query, query, query)).accepted is False


@pytest.mark.usefixtures("_unfused")
def test_the_decision_of_a_call_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(flex, "supports", lambda params: asked.append(params))
    register(flex, specs.FLEX_CUDA)
    for length in (8, 9, 17):
        query = torch.randn(1, 2, length, 16)
        attnplug.scaled_dot_product_attention(query, query, query, is_causal=True, impl="emulated")
    assert len(asked) == 1


@pytest.mark.slow
def test_one_kernel_is_compiled_for_each_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths, offsets and windows are arguments of it: causal masks and windows share one."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(torch_flex.flex_attention, backend=counter)
    monkeypatch.setattr(flex, "_compiled", lambda on_cpu: compiled)

    def call(queries: int, keys: int, **options: Any) -> None:
        query, key = torch.randn(1, 2, queries, 16), torch.randn(1, 2, keys, 16)
        found = attnplug.scaled_dot_product_attention(query, key, key, **options, impl="flex")
        expected = attnplug.scaled_dot_product_attention(query, key, key, **options, impl="math_ref")
        torch.testing.assert_close(found, expected)

    for queries, keys in ((40, 40), (33, 70), (50, 90)):  # the second makes lengths symbols
        call(queries, keys, is_causal=True)
    kernels = counter.frame_count
    assert kernels <= 2
    call(21, 60, is_causal=True, causal_variant=CausalVariant.LOWER_RIGHT)
    call(48, 80, window_size=(9, 4))
    call(52, 75, window_size=(-1, 3), is_causal=True)
    assert counter.frame_count == kernels
    call(48, 80, softcap=20.0)
    call(31, 62, softcap=5.0)
    assert counter.frame_count <= kernels + 2
    torch._dynamo.reset()


def test_a_compiled_model_holds_flex_in_its_own_graph() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def model(query: torch.Tensor) -> torch.Tensor:
        return attnplug.scaled_dot_product_attention(query, query, query, is_causal=True, impl="flex") * 2

    query = torch.randn(1, 2, 24, 16)
    expected = 2 * torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    torch.testing.assert_close(model(query), expected)
    assert counter.frame_count == 1
    assert "flex_attention" in str(counter.graphs[0].graph) and "attnplug" not in str(counter.graphs[0].graph)
    torch._dynamo.reset()


def test_features_on_the_cpu_are_those_that_need_neither_lse_nor_gradients() -> None:
    only_cuda = frozenset(specs.FLEX_CUDA.features) - frozenset(specs.FLEX_CPU.features)
    assert only_cuda == {Feature.LSE, Feature.LSE_GRADIENT, Feature.SINKS, Feature.SINKS_GRADIENT}
    assert Call(queries=4, keys=6, heads=2).run("flex").out.shape == (2, 2, 4, 32)


@pytest.mark.slow
def test_masked_calls_of_many_sizes_run_on_the_cpu() -> None:
    """What Inductor generates for sizes that vary does not compile, so each size has a kernel."""
    for batch, length in ((2, 20), (3, 37), (4, 24)):
        query, key, value = torch.randn(3, batch, 4, length, 16)
        mask = torch.ones(batch, 1, 1, length, dtype=torch.bool)
        mask[0, ..., -3:] = False
        out = attnplug.scaled_dot_product_attention(query, key, value, mask, impl="flex")
        torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(query, key, value, mask))
