"""While a profiler runs, forward and backward of each call are ranges with the implementation's name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import attnplug
from attnplug import SDPAParams
from spoiled_kernels import Formula, register, tensors

attend: Any = attnplug.scaled_dot_product_attention


def ranges(run: Callable[[], Any]) -> Counter[str]:
    """Return the ranges of attnplug's that a profile of `run` shows, and how often."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    return Counter({each.key: each.count for each in profiled.key_averages() if each.key.startswith("attnplug::")})


@pytest.mark.parametrize("impl", ["torch", "aten_flash", "math_ref"])
def test_forward_and_backward_are_ranges(impl: str) -> None:
    given = tensors(requires_grad=True)
    found = ranges(lambda: attend(*given, impl=impl).sum().backward())
    assert found == {f"attnplug::{impl}": 1, f"attnplug::{impl}_backward": 1}


def test_the_default_call_is_a_range_too() -> None:
    given = tensors()
    assert ranges(lambda: attend(*given)) == {"attnplug::torch": 1}


def test_a_call_like_one_before_is_a_range_too() -> None:
    given, impl = tensors(), register(Formula)
    for _ in range(3):
        attend(*given, impl=impl)
    assert ranges(lambda: attend(*given, impl=impl)) == {f"attnplug::{impl}": 1}


def test_a_backward_of_hundreds_of_nodes_has_no_ranges() -> None:
    class Long:
        composite = True

        @staticmethod
        def forward(params: SDPAParams) -> Any:
            out = params.query + params.key + params.value
            for _ in range(300):
                out = out + 1
            return out, None

    attnplug.register_impl(attnplug.ImplSpec(name="long", kernel=Long, backend=None))
    found = ranges(lambda: attend(*tensors(requires_grad=True), impl="long").sum().backward())
    assert found == {"attnplug::long": 1}


def test_calls_of_variable_length_are_ranges() -> None:
    packed, starts = torch.randn(9, 2, 8), torch.tensor([0, 4, 9], dtype=torch.int32)
    found = ranges(lambda: attnplug.varlen_attn(packed, packed, packed, starts, starts, 5, 5, impl="math_ref"))
    assert found == {"attnplug::math_ref": 1}


def test_each_node_of_a_backward_of_pytorchs_operators_is_a_range() -> None:
    given = tensors(requires_grad=True)
    found = ranges(lambda: attend(*given, impl="aten_math").sum().backward())
    assert found["attnplug::aten_math"] == 1
    assert found["attnplug::aten_math_backward"] > 1


def test_what_made_the_inputs_and_uses_the_result_is_in_no_range() -> None:
    query, key, value = tensors(requires_grad=True)
    found = ranges(lambda: attend(query.sin().cos(), key.sin(), value.sin(), impl="math_ref").sin().sum().backward())
    assert found["attnplug::math_ref_backward"] == 1


def test_backward_of_a_graph_of_before_the_profiler_runs_without_ranges() -> None:
    out = attend(*tensors(requires_grad=True))
    assert ranges(lambda: out.sum().backward()) == {}


def test_a_graph_of_a_profile_runs_backward_after_it() -> None:
    given = tensors(requires_grad=True)
    kept = []
    ranges(lambda: kept.append(attend(*given)))
    kept[0].sum().backward()
    assert given[0].grad is not None


def test_compiled_opaque_kernels_are_ranges_and_profiling_compiles_nothing() -> None:
    class Profiled(Formula):
        """Of a name that no other test registers: an operator, once defined, keeps its own."""

    impl, graphs = register(Profiled), []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module)
        return module.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda *given: attend(*given, impl=impl), backend=backend, fullgraph=True)
    given = tensors(requires_grad=True)
    compiled(*given)
    found = ranges(lambda: compiled(*given).sum().backward())
    assert found == {f"attnplug::{impl}": 1, f"attnplug::{impl}_backward": 1}
    assert len(graphs) == 1


def test_watchers_and_a_profiler_do_not_mind_each_other() -> None:
    given = tensors(requires_grad=True)
    with attnplug.verify(1.0, on_mismatch="raise") as watched, attnplug.record() as calls:
        found = ranges(lambda: attend(*given).sum().backward())
    assert found == {"attnplug::torch": 1, "attnplug::torch_backward": 1}
    assert (watched.gradients, [call.impl for call in calls]) == (1, ["torch"])


@pytest.mark.gpu
def test_nvtx_ranges_carry_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    given, entered = tensors(requires_grad=True, device="cuda"), []

    class Spy(torch.profiler.record_function):
        def __enter__(self) -> Any:
            entered.append(self.name)
            return super().__enter__()

    monkeypatch.setattr("attnplug._dispatch.ranges.record_function", Spy)  # no program can read its own NVTX ranges
    with torch.autograd.profiler.emit_nvtx():
        attend(*given).sum().backward()
    attend(*given)
    assert entered == ["attnplug::torch", "attnplug::torch_backward"]
