"""What traces programs (compilers, exporters, scripts, graphs) sees attnplug's calls as it sees PyTorch's."""

from __future__ import annotations

import io
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import attnplug
import forked
from attnplug import ImplSpec, SDPAParams

Q = torch.randn(1, 2, 4, 8)
attend = attnplug.scaled_dot_product_attention


class Opaque:
    """A kernel that a trace cannot look into: twice the query."""

    def forward(self, params: SDPAParams) -> tuple[Tensor, None]:
        return params.query * 2, None

    def backward(self, params: SDPAParams, grad_out: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return grad_out * 2, torch.zeros_like(params.key), torch.zeros_like(params.value)


class Composite:
    """The same, made of PyTorch's operators."""

    composite = True

    def forward(self, params: SDPAParams) -> tuple[Tensor, None]:
        return params.query * 2, None


def register(name: str, kernel: Any = Opaque) -> None:
    attnplug.register_impl(ImplSpec(name=name, kernel=kernel(), backend=None))


def compiled(function: Any, backend: Any = "eager") -> Any:
    return torch.compile(function, backend=backend, fullgraph=True)


# --- names ---


@pytest.mark.parametrize("kernel", [Opaque, Composite])
@pytest.mark.parametrize(
    "name", ["a.b", "a-b", "FA-3.1", "class", "lambda", "import", "None", "name", "self", "x" * 200]
)
def test_every_name_that_registers_compiles(name: str, kernel: Any) -> None:
    register(name, kernel)
    assert torch.equal(compiled(lambda query: attend(query, query, query, impl=name))(Q), Q * 2)


def test_names_that_differ_in_punctuation_alone_have_operators_of_their_own() -> None:
    class Thrice(Opaque):
        def forward(self, params: SDPAParams) -> tuple[Tensor, None]:
            return params.query * 3, None

    for name, kernel in (("a.b", Opaque), ("a_b", Thrice), ("a_b_backward", Thrice)):
        register(name, kernel)
    both = compiled(lambda q: (attend(q, q, q, impl="a.b"), attend(q, q, q, impl="a_b")))
    assert all(map(torch.equal, both(Q), (Q * 2, Q * 3)))
    assert torch.equal(compiled(lambda q: attend(q, q, q, impl="a_b_backward"))(Q), Q * 3)


# --- recordings ---


@pytest.mark.parametrize("name", ["told", "seen"])
def test_an_implementation_may_be_called_as_what_tells_of_calls_is(name: str) -> None:
    register(name)
    function = compiled(lambda query: attend(query, query, query, impl=name))
    with attnplug.record() as calls:
        assert torch.equal(function(Q), Q * 2)
    assert [call.impl for call in calls] == [name]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_recording_sees_compiled_calls_in_order_and_compiles_once_more(backend: str) -> None:
    register("opaque")
    counter = CompileCounterWithBackend(backend)

    def two(query: Tensor) -> Tensor:
        return attend(attend(query, query, query, impl="opaque"), query, query, impl="aten_math")

    function = compiled(two, counter)
    query = Q.clone().requires_grad_()
    function(query)
    for _ in range(3):
        with attnplug.record() as calls:
            function(query).sum().backward()
        assert [call.impl for call in calls] == ["opaque", "aten_math"]
        assert calls[1].backend is attnplug.SDPBackend.MATH
    function(query)
    assert counter.frame_count == 2


def test_a_recording_of_a_compiled_call_says_who_was_passed_over() -> None:
    with attnplug.record() as calls:
        compiled(lambda query: attend(query, query, query, softcap=2.0, return_lse=True)[0])(Q)
    assert "softcap" in " ".join(calls[0].passed_over["torch"])


def test_an_opaque_kernel_that_raises_is_recorded_and_before_what_it_calls() -> None:
    class Nesting(Opaque):
        def forward(self, params: SDPAParams) -> Any:
            attend(params.query.detach(), params.key.detach(), params.value.detach(), impl="aten_math")
            raise ValueError("no")

    register("nesting", Nesting)

    def function(query: Tensor) -> Tensor:
        return attend(query, query, query, impl="nesting")

    for each in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        with attnplug.record() as calls, pytest.raises(ValueError, match="no"):
            each(Q)
        assert [call.impl for call in calls] == ["nesting", "aten_math"]


def test_without_a_recording_a_graph_has_nothing_to_report() -> None:
    counter = CompileCounterWithBackend("eager")
    compiled(lambda query: attend(query, query, query, impl="aten_math"), counter)(Q)
    assert not any("attnplug" in str(node.target) for node in counter.graphs[0].graph.nodes)


# --- questions inside a graph ---


def test_questions_are_answered_inside_a_graph_and_again_when_the_selection_changes() -> None:
    def ask(query: Tensor) -> Tensor:
        params = SDPAParams(query, query, query)
        math = attnplug.can_use_impl("aten_math", params)
        flash = attnplug.can_use_impl("aten_flash", SDPAParams(query, query, query, softcap=2.0))
        found = attnplug.explain(query, query, query)
        return query + (1 if math else 0) + (10 if flash.accepted else 0) + (100 if found.chosen == "torch" else 0)

    function = compiled(ask)
    torch.testing.assert_close(function(Q), Q + 101)
    with attnplug.sdpa_kernel("aten_math"):
        torch.testing.assert_close(function(Q), Q + 1)
    torch.testing.assert_close(function(Q), Q + 101)


def test_the_answers_in_a_graph_are_those_outside_it() -> None:
    said: list[Any] = []

    def ask(query: Tensor) -> Tensor:
        found = attnplug.explain(query, query, query, softcap=2.0)
        said.append((found.chosen, [(each.name, each.accepted, each.reasons) for each in found.candidates]))
        return query * 1

    compiled(ask)(Q)
    ask(Q)
    assert said[0] == said[1]


# --- torch.fx, torch.jit ---


class Attends(nn.Module):
    """A module that calls PyTorch's function, or attnplug's."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own

    def forward(self, query: Tensor) -> Tensor:
        if self.own:
            return attend(query, query, query, is_causal=True, softcap=2.0, impl="aten_math_or_other")
        return F.scaled_dot_product_attention(query, query, query, is_causal=True)


def test_a_symbolic_trace_holds_pytorch_s_function_under_its_name_and_follows_scopes() -> None:
    with attnplug.patch_torch(), attnplug.sdpa_kernel("aten_math"):
        graph = torch.fx.symbolic_trace(Attends(False))
        with attnplug.record() as calls:
            found = graph(Q)
    assert [call.impl for call in calls] == ["aten_math"]
    assert "torch.nn.functional.scaled_dot_product_attention" in graph.code
    torch.testing.assert_close(found, F.scaled_dot_product_attention(Q, Q, Q, is_causal=True))


def test_a_symbolic_trace_holds_attnplug_s_function_with_its_arguments() -> None:
    class Kernel(Composite):
        def forward(self, params: SDPAParams) -> tuple[Tensor, None]:
            seen.append(params)
            return super().forward(params)

    seen: list[SDPAParams] = []
    attnplug.register_impl(
        ImplSpec(
            name="aten_math_or_other",
            kernel=Kernel(),
            backend=None,
            capabilities=attnplug.Capabilities(features=(attnplug.Feature.CAUSAL, attnplug.Feature.SOFTCAP)),
        )
    )
    assert torch.equal(torch.fx.symbolic_trace(Attends(True))(Q), Q * 2)
    assert (seen[0].is_causal, seen[0].softcap) == (True, 2.0)


def test_a_symbolic_trace_of_a_call_that_asks_for_nothing_holds_that_call_alone() -> None:
    graph = torch.fx.symbolic_trace(lambda query: attend(query, query, query)).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_function", "output"]


def test_a_symbolic_trace_holds_calls_of_variable_length() -> None:
    from torch.nn.attention import varlen

    packed, starts = torch.randn(9, 2, 8), torch.tensor([0, 4, 9], dtype=torch.int32)
    expected = attnplug.varlen_attn(packed, packed, packed, starts, starts, 5, 5, is_causal=True, impl="math_ref")
    with attnplug.patch_torch(), attnplug.sdpa_kernel("math_ref"):
        graph = torch.fx.symbolic_trace(
            lambda query: varlen.varlen_attn(query, query, query, starts, starts, 5, 5, window_size=(-1, 0))
        )
        torch.testing.assert_close(graph(packed), expected)


@pytest.mark.parametrize("impl", [None, "aten_math", "aten_flash", "math_ref", "opaque"])
def test_a_trace_of_symbolic_sizes_holds_for_others(impl: str | None) -> None:
    register("opaque")
    graph = make_fx(lambda query: attend(query, query, query, impl=impl), tracing_mode="symbolic")(
        torch.randn(3, 2, 5, 8)
    )
    longer = torch.randn(6, 2, 7, 8)
    torch.testing.assert_close(graph(longer), attend(longer, longer, longer, impl=impl))


class Prepares(Opaque):
    """One that prepares for calls that repeat another."""

    def prepare(self, params: SDPAParams) -> Any:
        return lambda query, *_: (query * 2, None)

    prepare_packed = prepare


@pytest.mark.parametrize("sizes", ["first", "others"])
@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("packed", [False, True])
def test_an_opaque_kernel_is_an_operator_in_a_trace_of_real_tensors_whatever_ran_before(
    packed: bool, before: int, sizes: str
) -> None:
    capabilities = attnplug.Capabilities(features=[attnplug.Feature.VARLEN] if packed else ())
    attnplug.register_impl(ImplSpec(name="opaque", kernel=Prepares(), backend=None, capabilities=capabilities))
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)

    def call(query: Tensor) -> Tensor:
        if packed:
            return attnplug.varlen_attn(query, query, query, starts, starts, 5, 5, impl="opaque")
        return attend(query, query, query, impl="opaque")

    few, more = (torch.randn(9, 2, 8), torch.randn(11, 2, 8)) if packed else (Q, torch.randn(2, 2, 5, 8))
    if sizes == "others":
        for _ in range(3):
            call(few)
    for _ in range(before):
        call(more)
    graph = make_fx(call)(more)
    assert sum(str(node.target).startswith("attnplug.opaque") for node in graph.graph.nodes) == 1
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(call(more), torch._subclasses.FakeTensor)
    assert torch.equal(call(more), more * 2)
    assert torch.equal(graph(more), more * 2)


def test_an_opaque_kernel_is_an_operator_below_transforms_that_something_watches() -> None:
    register("opaque")

    def loss(query: Tensor) -> Tensor:
        return attend(query, query, query, impl="opaque").sum()

    graph = make_fx(torch.func.grad(loss), tracing_mode="fake")(Q)
    assert sum(str(node.target).startswith("attnplug.opaque") for node in graph.graph.nodes) == 2
    torch.testing.assert_close(graph(Q), torch.full_like(Q, 2))
    functional = make_fx(torch.func.functionalize(lambda query: attend(query, query, query, impl="opaque")))(Q)
    assert torch.equal(functional(Q), Q * 2)


@pytest.mark.parametrize("packed", [False, True])
def test_flops_of_an_opaque_kernel_are_counted_as_pytorch_counts_attention(packed: bool) -> None:
    capabilities = attnplug.Capabilities(features=[attnplug.Feature.VARLEN] if packed else ())
    attnplug.register_impl(ImplSpec(name="opaque", kernel=Opaque(), backend=None, capabilities=capabilities))
    query = (torch.randn(9, 2, 8) if packed else Q).clone().requires_grad_()
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        if packed:
            out = attnplug.varlen_attn(query, query, query, starts, starts, 5, 5, impl="opaque")
        else:
            out = attend(query, query, query, impl="opaque")
        forward = counter.get_total_flops()
        out.sum().backward()
    products = 2 * 2 * (4 * 4 + 5 * 5 if packed else 4 * 4) * 8
    assert (forward, counter.get_total_flops()) == (2 * products, 7 * products)


# --- torch.export ---


class Part(nn.Module):
    """Attention over a part whose size depends on data."""

    def __init__(self, impl: str | None, of: str) -> None:
        super().__init__()
        self.impl, self.of = impl, of

    def forward(self, query: Tensor, count: Tensor) -> Tensor:
        size = count.item()
        torch._check(size >= 1)
        torch._check(size <= 4)
        part = query.expand(4, 2, 4, 8)[:size] if self.of == "batch" else query[:, :, :size]
        if self.of != "keys":
            return attend(part, part, part, impl=self.impl)
        mask = torch.ones(4, part.shape[2], dtype=torch.bool) if self.impl != "opaque" else None
        return attend(query, part, part, mask, impl=self.impl)


class PreparesBoth(Prepares):
    """One that prepares for their backward, too."""

    def prepare_backward(self, params: SDPAParams, grad_out: Tensor, *_: Any) -> Any:
        return lambda query, key, value, grad, *_: (grad * 2, torch.zeros_like(key), torch.zeros_like(value))


@pytest.mark.parametrize("kernel", [Opaque, PreparesBoth])
def test_a_backward_is_an_operator_to_a_mode_that_begins_after_forward(kernel: Any) -> None:
    register("opaque", kernel)
    leaves = [Q.clone().requires_grad_() for _ in range(3)]
    for _ in range(4):
        out = attend(*leaves, impl="opaque")
        torch.autograd.grad(out, leaves, Q, retain_graph=True)

    def backward(grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    for tracing_mode in ("real", "fake", "symbolic"):
        graph = make_fx(backward, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(Q)
        names = [str(node.target) for node in graph.graph.nodes]
        assert any(name.startswith("attnplug.opaque") and "_backward" in name for name in names), graph.code
        for found, expected in zip(graph(Q + 1), (2 * Q + 2, 0 * Q, 0 * Q), strict=True):
            assert torch.equal(found, expected)
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(backward(Q)[0], 2 * Q)
    assert counter.get_total_flops() > 0
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for grad in (mode.from_tensor(Q), torch.ones(Q.shape)):
            assert all(isinstance(found, FakeTensor) and found.shape == Q.shape for found in backward(grad))


class Differentiates(Opaque):
    """One whose backward leaves the formula to autograd."""

    def forward(self, params: SDPAParams) -> tuple[Tensor, None]:
        return self.formula(params.query, params.key, params.value), None

    def backward(self, params: SDPAParams, grad_out: Tensor, *_: Any) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (params.query, params.key, params.value)]
            return torch.autograd.grad(self.formula(*leaves), leaves, grad_out)

    def formula(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query * key.sum() + value.mean()


def test_a_backward_that_uses_autograd_may_be_an_operator() -> None:
    register("opaque", Differentiates)
    leaves = [torch.randn(Q.shape, requires_grad=True) for _ in range(3)]
    expected = torch.autograd.grad(Differentiates().formula(*leaves).square().sum(), leaves)

    def loss(*tensors: Tensor) -> Tensor:
        return attend(*tensors, impl="opaque").square().sum()

    def check(found: tuple[Tensor, ...]) -> None:
        for actual, ref in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, ref)
            assert not actual.requires_grad

    before = loss(*leaves)
    with FlopCounterMode(display=False):
        check(torch.autograd.grad(before, leaves))
        check(torch.autograd.grad(loss(*leaves), leaves))
    check(torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves), leaves))


@pytest.mark.parametrize("of", ["length", "batch", "keys"])
@pytest.mark.parametrize("impl", [None, "aten_math", "aten_flash", "math_ref", "opaque"])
def test_a_size_that_depends_on_data_can_be_exported(impl: str | None, of: str) -> None:
    register("opaque")
    strict = impl == "aten_math"
    exported = torch.export.export(Part(impl, of), (Q, torch.tensor(2)), strict=strict).module()
    for size in (1, 3, 4):
        torch.testing.assert_close(exported(Q, torch.tensor(size)), Part(impl, of)(Q, torch.tensor(size)))


def test_an_exported_program_comes_back_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "twice.py").write_text("def forward(params):\n    return params.query * 2, None\n")
    monkeypatch.syspath_prepend(tmp_path)
    attnplug.register_impl(ImplSpec(name="exported", kernel="twice", backend=None))

    class Model(nn.Module):
        def forward(self, query: Tensor) -> Tensor:
            return attend(query, query, query, impl="exported")

    torch.export.save(torch.export.export(Model(), (Q,)), tmp_path / "program.pt2")
    loading = """
        import torch, attnplug
        attnplug.register_impl(attnplug.ImplSpec(name="exported", kernel="twice", backend=None))
        query = torch.ones(1, 2, 4, 8)
        print(torch.equal(torch.export.load("program.pt2").module()(query), query * 2))
    """
    done = forked.run(textwrap.dedent(loading), os.environ | {"PYTHONPATH": str(tmp_path)}, tmp_path, "dynamo")
    assert done.stdout.split() == ["True"], done.stderr


def test_an_operator_that_no_implementation_has_is_still_an_attribute_error() -> None:
    attnplug.list_impls()
    with pytest.raises(AttributeError, match="no_such_implementation"):
        _ = torch.ops.attnplug.no_such_implementation


def test_a_module_that_was_traced_by_jit_keeps_its_choice() -> None:
    with attnplug.sdpa_kernel("aten_math"), pytest.warns(torch.jit.TracerWarning):
        traced = torch.jit.trace(lambda query: attend(query, query, query), (Q,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(Q), attend(Q, Q, Q))
    assert "_scaled_dot_product_attention_math" in traced.code


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("calls_before", [0, 4])
def test_jit_traces_an_opaque_kernel_as_an_operator(calls_before: int) -> None:
    class Numpy(Opaque):
        """No trace sees what it does."""

        def forward(self, params: SDPAParams) -> tuple[Tensor, None]:
            return torch.from_numpy(params.query.detach().numpy() * 2), None

    register("numpy", Numpy)

    def twice(query: Tensor) -> Tensor:
        return attend(query, query, query, impl="numpy")

    for _ in range(calls_before):
        twice(Q)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(twice, (Q,)), file)
    file.seek(0)
    traced = torch.jit.load(file)
    for query in (torch.randn_like(Q), torch.randn(3, 2, 7, 8, requires_grad=True)):
        torch.testing.assert_close(traced(query), query * 2)
    (gradient,) = torch.autograd.grad(traced(query).sum(), query)
    torch.testing.assert_close(gradient, torch.full_like(query, 2))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_traces_a_composite_kernel_with_a_backward_where_a_gradient_is_needed() -> None:
    class Model(nn.Linear):
        def forward(self, query: Tensor) -> Tensor:
            return attend(super().forward(query), query, query, is_causal=True, impl="math_ref")

    model, file = Model(8, 8), io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (Q,)), file)
    file.seek(0)
    longer = torch.randn(3, 2, 9, 8, requires_grad=True)
    found, expected = torch.jit.load(file)(longer), model(longer)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.square().sum(), longer)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected.square().sum(), longer))


def test_jit_traces_what_is_decided_for_the_first_time() -> None:
    with attnplug.record(), pytest.warns(torch.jit.TracerWarning):  # a call that is recorded takes no short way
        traced = torch.jit.trace(lambda query: attend(query, query, query), (Q,))
    longer = torch.randn(3, 2, 9, 8)
    torch.testing.assert_close(traced(longer), attend(longer, longer, longer))


def test_jit_traces_a_call_that_was_made_before() -> None:
    """PyTorch traces twice, the second time without gradients, and compares the graphs: both must be decided alike."""
    for _ in range(2):
        attend(Q, Q, Q, is_causal=True, impl="math_ref")
    with pytest.warns(torch.jit.TracerWarning):
        traced = torch.jit.trace(lambda query: attend(query, query, query, is_causal=True, impl="math_ref"), (Q,))
    torch.testing.assert_close(traced(Q), attend(Q, Q, Q, is_causal=True))
