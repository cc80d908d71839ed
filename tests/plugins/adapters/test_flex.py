"""`flex` on the CPU: all that PyTorch's flex_attention does there, and the formulas of what it does on CUDA alone."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import forward_ad
from torch.nn.attention import flex_attention as torch_flex

import attnplug
from adapters_on_standins import register, wrong
from attnplug import CausalVariant, Feature
from attnplug.testing import Call, all_checks, assert_right, check_impl

pytest.importorskip("attnplug_adapters", reason="attnplug-adapters is not installed")
from attnplug_adapters import flex, flex_kinds, flex_mods, specs

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


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> torch._dynamo.testing.CompileCounterWithBackend:
    """Count what is compiled for calls of this test, of which the kernels are PyTorch's operators."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    monkeypatch.setattr(flex_kinds, "_compiled", {})
    return counter


def right(batch: int, queries: int, keys: int, mask: torch.Tensor | None = None, **options: Any) -> None:
    """Make a call whose result must be right, with heads in a number that no other size has.

    Dynamo compiles for sizes that are equal when it first sees them, and once more when they differ.
    """
    query, key = torch.randn(batch, 7, queries, 16), torch.randn(batch, 7, keys, 16)
    found = attnplug.scaled_dot_product_attention(query, key, key, mask, **options, impl="flex")
    expected = attnplug.scaled_dot_product_attention(query, key, key, mask, **options, impl="math_ref")
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("error::RuntimeWarning")  # of a call without a kernel
@torch._dynamo.config.patch(recompile_limit=1)
def test_one_kernel_is_compiled_for_each_kind_of_call(
    kernels: torch._dynamo.testing.CompileCounterWithBackend,
) -> None:
    """Sizes, offsets, windows and caps are arguments of it, and causal masks and windows share one."""
    lower_right = CausalVariant.LOWER_RIGHT
    for batch, queries, keys in ((3, 40, 33), (4, 33, 70), (2, 50, 90), (4, 17, 17), (5, 101, 100)):
        right(batch, queries, keys, is_causal=True)
        right(batch, queries, keys, is_causal=True, causal_variant=lower_right)
        right(batch, queries, keys, window_size=(queries // 4, 4))
    assert kernels.frame_count == 1
    for keys in (5, 3, 77, 127, 128):
        right(3, 1, keys, window_size=(64, 0), causal_variant=lower_right)
    assert kernels.frame_count == 2  # one query is a kind, and so is one block of 128 keys
    for keys in (129, 256, 300, 513):
        right(3, 1, keys, window_size=(64, 0), causal_variant=lower_right)
    assert kernels.frame_count == 3
    for queries, softcap in ((48, 20.0), (31, 5.0), (49, 1.0)):
        right(3, queries, 80, softcap=softcap)
    assert kernels.frame_count == 4
    for queries, keys in ((40, 33), (33, 70), (50, 90)):
        right(3, queries, keys, alibi_slopes=torch.rand(7), causal_variant=lower_right)
    assert kernels.frame_count == 5
    for batch, length in ((3, 30), (4, 100), (4, 127)):
        right(batch, 20, length, torch.rand(batch, 1, 1, length) < 0.8)
    assert kernels.frame_count == 6
    right(4, 20, 129, torch.rand(4, 1, 1, 129) < 0.8)  # what a mask says has a size that is known, a power of two
    assert kernels.frame_count == 7
    for lengths in ((3, 7), (20, 1, 9), (30, 31, 32), (11,)):
        Call(heads=7, lengths_q=lengths, lengths_k=lengths[::-1], is_causal=True).check("flex")
    assert kernels.frame_count == 8


def test_a_call_without_a_kernel_is_right_and_said_to_have_none(
    kernels: torch._dynamo.testing.CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    right(2, 8, 8)
    with torch._dynamo.config.patch(recompile_limit=1), pytest.warns(RuntimeWarning, match="recompile_limit"):
        right(2, 8, 9)  # until now queries and keys were as many
    monkeypatch.setattr(flex_kinds, "MOST", 1)
    with pytest.warns(RuntimeWarning, match="kernels for 1 kinds of calls, and this is another"):
        right(2, 8, 9, softcap=5.0)
    assert kernels.frame_count == 1


def test_blocks_of_a_band_are_those_of_each_pair() -> None:
    for offset, band, queries, keys in product((-37, 200), ((-1, 0), (300, 100)), (1, 129), (50, 384)):
        limits = flex_mods.ends(offset, band, torch.device("cpu"))
        expected = torch_flex.create_block_mask(flex_mods.band_mod(limits), None, None, queries, keys, device="cpu")
        with torch.inference_mode():
            found = flex._band_blocks(offset, band, queries, keys, torch.device("cpu"))
        assert not found.kv_indices.is_inference()  # it is kept for other calls, which may save it for backward
        assert found.seq_lengths == expected.seq_lengths and torch.equal(found.to_dense(), expected.to_dense())
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.usefixtures("_unfused")
def test_what_a_captured_graph_makes_is_not_kept_for_other_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is the graph's, and holds nothing before the graph is replayed."""
    seen: list[weakref.ref[torch.Tensor]] = []
    attend = flex_kinds.attend

    def noting(constants: Any, query: Any, key: Any, value: Any, score_mod: Any, blocks: Any) -> Any:
        cells = (cell.cell_contents for cell in (*score_mod.__closure__, *blocks.mask_mod.__closure__))
        made = [blocks.kv_indices, blocks.full_kv_indices, *cells]
        seen.extend(weakref.ref(each) for each in made if isinstance(each, torch.Tensor))
        return attend(constants, query, key, value, score_mod, blocks)

    monkeypatch.setattr(flex_kinds, "attend", noting)
    query = torch.randn(1, 2, 333, 16)
    arguments: dict[str, Any] = {"is_causal": True, "softcap": 3.75, "window_size": (77, 0)}
    with monkeypatch.context() as captured:
        captured.setattr(torch.cuda, "is_initialized", lambda: True)
        captured.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        out = attnplug.scaled_dot_product_attention(query, query, query, **arguments, impl="flex")
    assert len(seen) >= 4 and not any(each() is not None for each in seen)
    again = attnplug.scaled_dot_product_attention(query, query, query, **arguments, impl="flex")
    assert torch.equal(out, again)
    assert_right({"query": query, "key": query, "value": query, **arguments}, out)


@pytest.mark.usefixtures("_unfused")
def test_leaves_that_require_a_gradient_are_taken_where_none_is_recorded() -> None:
    query = torch.randn(1, 2, 24, 16, requires_grad=True)
    with torch.no_grad():
        out = attnplug.scaled_dot_product_attention(query, query, query, impl="flex")
        torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(query, query, query))


def test_a_tangent_is_an_error_and_never_dropped() -> None:
    query = torch.randn(1, 2, 24, 16)
    with forward_ad.dual_level(), pytest.raises(attnplug.GradientError, match="'flex' has no forward-mode derivatives"):
        attnplug.scaled_dot_product_attention(query, forward_ad.make_dual(query, query), query, impl="flex")


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.functionalize])
def test_a_transform_in_which_nothing_is_compiled_is_an_error_of_flex_and_not_of_dynamo(transform: Any) -> None:
    query = torch.randn(2, 2, 24, 16)
    attend = partial(attnplug.scaled_dot_product_attention, impl="flex")
    with pytest.raises(attnplug.AttnplugError, match=r"'flex' .*torch\.func.*SDPBackend\.MATH"):
        transform(attend)(query, query, query)


def test_a_trace_of_torch_script_is_an_error_that_names_flex() -> None:
    query = torch.randn(1, 2, 24, 16)
    for options in ({}, {"is_causal": True}, {"attn_mask": torch.ones(24, 24).tril() > 0}):

        def attend(query: torch.Tensor, options: dict[str, Any] = options) -> torch.Tensor:
            return attnplug.scaled_dot_product_attention(query, query, query, **options, impl="flex")

        with pytest.raises(attnplug.AttnplugError, match=r"'flex' .*torch\.jit\.trace.*SDPBackend\.MATH"):
            torch.jit.trace(attend, query)


def test_linearize_is_an_error_that_names_flex() -> None:
    query = torch.randn(1, 2, 24, 16)
    with pytest.raises(attnplug.GradientError, match="'flex' has no forward-mode derivatives"):
        torch.func.linearize(partial(attnplug.scaled_dot_product_attention, impl="flex"), query, query, query)


def test_a_trace_does_not_ask_whether_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo has no answer to that, so that on a GPU a compiled model would be cut in two, or refused."""
    cuda, copied = ModuleType("torch.cuda"), ModuleType("torch")
    vars(cuda).update(vars(torch.cuda), is_available=lambda: True, is_initialized=lambda: True)
    vars(copied).update(vars(torch), cuda=cuda)
    monkeypatch.setattr(flex_mods, "torch", copied)
    query, arguments = torch.randn(1, 2, 33, 16), {"is_causal": True, "softcap": 3.0, "window_size": (9, 0)}
    attend = partial(attnplug.scaled_dot_product_attention, **arguments)
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    found = compiled(query, query, query, impl="flex")
    torch.testing.assert_close(found, attend(query, query, query, impl="math_ref"), rtol=1e-4, atol=1e-4)


def test_a_compiled_model_holds_flex_in_its_own_graph() -> None:
    """On CUDA, that is: on a CPU PyTorch has no kernel with an lse, and attnplug asks for none."""
    register(flex, specs.FLEX_CUDA)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def model(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = attnplug.scaled_dot_product_attention(query, query, query, return_lse=True, impl="emulated")
        return out * 2, lse

    query = torch.randn(1, 2, 24, 16)
    out, lse = attnplug.scaled_dot_product_attention(query, query, query, return_lse=True, impl="math_ref")
    torch.testing.assert_close(model(query), (out * 2, lse))
    graph = str(counter.graphs[-1].graph)  # PyTorch 2.11 may begin the frame again, and empties the graph before
    assert "flex_attention" in graph and "attnplug" not in graph


def test_a_compiled_model_for_a_cpu_goes_on_with_what_flex_returns() -> None:
    """Up to PyTorch 2.15 no flex_attention for a CPU compiles whose result elementwise operations take."""

    def model(query: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = attnplug.scaled_dot_product_attention(query, query, query, impl="flex")
        return out * 2 + query

    query = torch.randn(1, 2, 24, 16)
    expected = 2 * torch.nn.functional.scaled_dot_product_attention(query, query, query) + query
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(query), expected)


def test_features_on_the_cpu_are_those_that_need_neither_lse_nor_gradients() -> None:
    only_cuda = frozenset(specs.FLEX_CUDA.features) - frozenset(specs.FLEX_CPU.features)
    assert only_cuda == {Feature.LSE, Feature.LSE_GRADIENT, Feature.SINKS, Feature.SINKS_GRADIENT}


@pytest.mark.slow
def test_a_scale_may_be_an_int() -> None:
    """Inductor's kernel for a CPU names a symbol for it, and does not declare it."""
    query = torch.randn(2, 1, 24, 16)
    out = attnplug.scaled_dot_product_attention(query, query, query, is_causal=True, scale=1, impl="flex")
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True, scale=1)
    torch.testing.assert_close(out, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("head_size", "is_causal", "traced"), [(8, True, False), (16, False, True)])
def test_nothing_past_the_last_key_is_felt_on_the_cpu(head_size: int, is_causal: bool, traced: bool) -> None:
    """In PyTorch 2.11 to 2.13 with AVX2, keys 8 more than a multiple of 16 let 8 further rows into narrow heads."""
    attend = partial(attnplug.scaled_dot_product_attention, is_causal=is_causal, impl="flex")
    if traced:
        attend = torch.compile(attend, fullgraph=True)
    for length in (24, 40):
        query, value = torch.randn(2, 2, 2, length, head_size)
        memory = torch.full((2, 2, length + 8, head_size), float("nan"))
        key = memory.narrow(2, 0, length).copy_(torch.randn(length, head_size))
        expected = attnplug.scaled_dot_product_attention(query, key, value, is_causal=is_causal, impl="math_ref")
        torch.testing.assert_close(attend(query, key, value), expected)


@pytest.mark.slow
def test_masked_calls_of_many_sizes_run_on_the_cpu() -> None:
    """What Inductor generates for a mask whose sizes vary does not compile, so those are constants of a kernel."""
    for batch, length in ((2, 20), (3, 37)):
        query, key, value = torch.randn(3, batch, 4, length, 16)
        mask = torch.ones(batch, 1, 1, length, dtype=torch.bool)
        mask[0, ..., -3:] = False
        out = attnplug.scaled_dot_product_attention(query, key, value, mask, impl="flex")
        torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(query, key, value, mask))


LOWER_RIGHT_OF_USED = {"is_causal": True, "causal_variant": CausalVariant.LOWER_RIGHT, "seqused_k": "used"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({"attn_mask": "floating"}, "inductor"),
        (LOWER_RIGHT_OF_USED, "inductor"),
        ({"is_causal": True}, "eager"),
        ({"softcap": 5.0, "window_size": (4, 2)}, "eager"),
        ({"alibi_slopes": "slopes"}, "eager"),
        ({"attn_mask": "boolean"}, "eager"),
    ],
    ids=str,
)
def test_a_compiled_model_takes_calls_of_several_sizes_on_the_cpu(options: dict[str, Any], backend: str) -> None:
    """PyTorch 2.13 compiles no flex_attention for a CPU with sizes that vary, or with what the graph computes.

    Only Inductor refuses it: it is asked of what changes scores, and of what hides keys. No graph has it.
    """

    def model(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, used: torch.Tensor, impl: str) -> Any:
        floating = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask.logical_not(), float("-inf"))
        tensors = {"boolean": mask, "floating": floating, "slopes": torch.ones(4), "used": used}
        given = {
            name: tensors.get(value, value) if isinstance(value, str) else value for name, value in options.items()
        }
        return attnplug.scaled_dot_product_attention(query, key, key, **given, enable_gqa=True, impl=impl)

    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    for batch, queries, keys in ((2, 20, 20), (3, 37, 50)):
        query, key = torch.randn(batch, 4, queries, 16), torch.randn(batch, 2, keys, 16)
        mask, used = torch.rand(batch, 1, queries, keys) < 0.8, torch.randint(1, keys, (batch,), dtype=torch.int32)
        mask[0, 0, 0] = False  # a query that sees no key
        given = (query, key, mask, used)
        torch.testing.assert_close(compiled(*given, "flex"), model(*given, "math_ref"))
    assert not any("flex_attention" in str(graph.graph) for graph in counter.graphs)
