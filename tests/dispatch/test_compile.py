"""Under torch.compile: one graph, the chosen kernel alone in it, and never a stale choice."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.attention as torch_attention
from torch import Tensor
from torch.nn.attention.bias import causal_upper_left

import attnplug
import forked
from attnplug import Capabilities, CausalVariant, Feature, ImplSpec, SDPAParams, SDPBackend
from author_kernels import WithBackward

SHAPE = (1, 2, 4, 8)


class Opaque(WithBackward):
    """A kernel that no trace can look into, and that says what forward returns."""

    @staticmethod
    def fake(params: SDPAParams) -> tuple[Tensor, Tensor, Tensor]:
        query = params.query
        return (
            query.new_empty(query.shape),
            query.new_empty(query.shape[:-1], dtype=query.dtype),
            query.new_empty(1, dtype=torch.int64),
        )


@pytest.fixture(autouse=True)
def _opaque() -> None:
    spec = ImplSpec(
        name="opaque",
        kernel=Opaque,
        backend=SDPBackend.EFFICIENT_ATTENTION,
        capabilities=Capabilities(features={Feature.LSE, Feature.LSE_GRADIENT}),
    )
    attnplug.register_impl(spec)


class Compiled:
    """A function compiled in one graph, its graphs, and how often it was compiled."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
        self.call = torch.compile(function, backend=self._counter, fullgraph=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    @property
    def count(self) -> int:
        return self._counter.frame_count

    @property
    def operations(self) -> list[str]:
        nodes = self._counter.graphs[-1].graph.nodes
        targets = [node.target for node in nodes if node.op == "call_function" and "getitem" not in str(node.target)]
        return [target.__name__ if inspect.isbuiltin(target) else str(target) for target in targets]


def tensors(requires_grad: bool = False) -> list[Tensor]:
    return [torch.randn(SHAPE, requires_grad=requires_grad) for _ in range(3)]


def call(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Any:
    return attnplug.scaled_dot_product_attention(query, key, value, **arguments)


@pytest.mark.parametrize(
    ("impl", "operation"),
    [
        (None, "scaled_dot_product_attention"),
        ("torch", "scaled_dot_product_attention"),
        ("aten_flash", "_scaled_dot_product_flash_attention_for_cpu"),
        ("aten_math", "_scaled_dot_product_attention_math"),
        ("opaque", "attnplug.opaque"),
    ],
)
def test_the_graph_holds_the_chosen_kernel_alone(impl: str | None, operation: str) -> None:
    compiled, inputs = Compiled(call), tensors()
    torch.testing.assert_close(compiled(*inputs, impl=impl), call(*inputs, impl=impl))
    assert len(compiled.operations) == 1
    assert operation in compiled.operations[0]


@pytest.mark.parametrize("enum", [SDPBackend, torch_attention.SDPBackend])
def test_a_scope_inside_the_function_is_traced(enum: Any) -> None:
    def function(*inputs: Tensor) -> Tensor:
        with attnplug.sdpa_kernel([enum.MATH, "torch"], set_priority=True):
            inner = call(*inputs)
            with attnplug.sdpa_kernel(enum.FLASH_ATTENTION):
                return inner + call(*inputs)

    compiled, inputs = Compiled(function), tensors()
    torch.testing.assert_close(compiled(*inputs), function(*inputs))
    assert [name.split("_for_cpu")[0] for name in compiled.operations[:2]] == [
        "_scaled_dot_product_attention_math",
        "_scaled_dot_product_flash_attention",
    ]


def test_a_scope_of_a_set_is_traced() -> None:
    compiled = Compiled(scoped)
    compiled(*tensors(), backends={"aten_math", SDPBackend.MATH})
    assert compiled.operations == ["_scaled_dot_product_attention_math"]


def test_a_decorated_function_is_traced() -> None:
    compiled = Compiled(attnplug.sdpa_kernel("aten_math")(call))
    compiled(*tensors())
    assert compiled.operations == ["_scaled_dot_product_attention_math"]


def test_a_change_of_scope_is_seen_and_coming_back_compiles_nothing() -> None:
    compiled, inputs = Compiled(call), tensors()
    compiled(*inputs)
    for _ in range(3):
        with attnplug.sdpa_kernel("aten_math"):
            compiled(*inputs)
        assert compiled.count == 2
        compiled(*inputs)
        with attnplug.sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            pass
    assert compiled.count == 2
    assert "math" in compiled.operations[0]


def test_a_change_of_activation_is_seen_and_coming_back_compiles_nothing() -> None:
    compiled, inputs = Compiled(call), tensors()
    compiled(*inputs)
    for _ in range(2):
        attnplug.activate_flash_attention_impl("aten_math")
        compiled(*inputs)
        assert "math" in compiled.operations[0]
        attnplug.restore_flash_attention_impl()
        compiled(*inputs)
    assert compiled.count == 2


def test_a_change_of_the_registry_is_seen() -> None:
    def shifted(params: SDPAParams) -> tuple[Tensor, None]:
        return params.value + 1, None

    compiled, inputs = Compiled(call), tensors()
    with attnplug.sdpa_kernel(SDPBackend.OVERRIDEABLE):
        for bias in (1, 2):

            def kernel(params: SDPAParams, bias: int = bias) -> tuple[Tensor, None]:
                return params.value + bias, None

            spec = ImplSpec(name="shifted", kernel=kernel, backend=SDPBackend.OVERRIDEABLE)
            attnplug.register_impl(spec)
            torch.testing.assert_close(compiled(*inputs), inputs[2] + bias)
            attnplug.unregister_impl("shifted")


def test_a_scope_in_another_thread_is_not_seen() -> None:
    compiled, inputs = Compiled(call), tensors()
    compiled(*inputs)
    with attnplug.sdpa_kernel("aten_math"):
        thread = threading.Thread(target=lambda: compiled(*inputs))
        thread.start()
        thread.join()
    assert compiled.count == 1


@pytest.mark.parametrize("impl", [None, "aten_flash", "opaque", "math_ref"])
def test_a_decode_loop_compiles_at_most_twice(impl: str | None) -> None:
    compiled = Compiled(call)
    query = torch.randn(1, 2, 1, 8)
    for length in range(5, 12):
        key = torch.randn(1, 2, length, 8)
        torch.testing.assert_close(compiled(query, key, key, impl=impl), call(query, key, key))
    assert compiled.count <= 2


def test_records_of_calls_are_built_passed_returned_and_read() -> None:
    def function(params: SDPAParams) -> tuple[SDPAParams, Tensor]:
        out = call(params.query, params.key, params.value, is_causal=params.is_causal, scale=params.scale)
        return SDPAParams(out, params.key, params.value, None, 0.0, True, False, softcap=2.0), out + params.softcap

    compiled, inputs = Compiled(function), tensors()
    params = SDPAParams(*inputs, None, 0.0, True, False, scale=0.5, softcap=1.0)
    returned, out = compiled(params)
    assert isinstance(returned, SDPAParams) and returned.softcap == 2.0 and returned.is_causal
    torch.testing.assert_close(out, call(*inputs, is_causal=True, scale=0.5) + 1.0)
    torch.testing.assert_close(returned.query, out - 1.0)


def test_queries_of_the_state_are_traced() -> None:
    def function(query: Tensor) -> Any:
        return query + 1, attnplug.current_flash_attention_impl(), attnplug.list_flash_attention_impls()

    compiled = Compiled(function)
    _, current, names = compiled(torch.randn(2))
    assert current is None and names == attnplug.list_flash_attention_impls()
    attnplug.activate_flash_attention_impl("aten_math")
    assert compiled(torch.randn(2))[1] == "aten_math"


@pytest.mark.parametrize("impl", [None, "torch", "aten_flash", "aten_math", "opaque", "math_ref"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gradients_equal_eager_ones(impl: str | None, backend: str) -> None:
    inputs, grad = tensors(requires_grad=True), torch.randn(SHAPE)
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    out, expected = compiled(*inputs, impl=impl), call(*inputs, impl=impl)
    torch.testing.assert_close(out, expected)
    for one, other in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_the_same_tensor_may_come_three_times() -> None:
    query = torch.randn(SHAPE, requires_grad=True)
    for impl in ("opaque", "math_ref", "aten_flash"):
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        out = compiled(query, query, query, impl=impl)
        expected = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        grads = [torch.autograd.grad(result.sum(), query)[0] for result in (out, expected)]
        torch.testing.assert_close(*grads)


def test_every_feature_of_the_reference_is_traced() -> None:
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    arguments: list[dict[str, Any]] = [
        dict(is_causal=True, causal_variant=CausalVariant.LOWER_RIGHT),
        dict(window_size=(1, 0), softcap=2.0),
        dict(sinks=torch.randn(4), alibi_slopes=torch.rand(4)),
        dict(attn_mask=torch.rand(3, 5) > 0.3, is_causal=True),
        dict(seqused_k=torch.tensor([2, 5], dtype=torch.int32), return_lse=True),
    ]
    for extra in arguments:
        compiled = Compiled(call)
        extra = {"enable_gqa": True, "impl": "math_ref"} | extra
        torch.testing.assert_close(compiled(query, key, key, **extra), call(query, key, key, **extra))


def test_variable_length_calls_are_traced() -> None:
    def function(tokens: Tensor, starts: Tensor) -> Any:
        return attnplug.varlen_attn(tokens, tokens, tokens, starts, starts, 3, 3, is_causal=True, return_lse=True)

    tokens, starts = torch.randn(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    torch.testing.assert_close(Compiled(function)(tokens, starts), function(tokens, starts))


def test_other_ranks_and_empty_inputs_are_traced() -> None:
    for shape in ((4, 8), (2, 4, 8), (1, 2, 0, 8), (2, 3, 2, 4, 8)):
        query = torch.randn(shape)
        for impl in ("torch", "aten_flash", "opaque"):
            torch._dynamo.reset()
            torch.testing.assert_close(
                Compiled(call)(query, query, query, impl=impl), call(query, query, query, impl=impl)
            )


def test_autocast_is_traced() -> None:
    def function(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call(*inputs, impl="aten_flash")

    inputs = tensors()
    out = Compiled(function)(*inputs)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, function(*inputs))


def packed(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Any:
    starts = torch.tensor([0, 1, 4], dtype=torch.int32)
    rows = (each[0].transpose(0, 1) for each in (query, key, value))
    return attnplug.varlen_attn(*rows, starts, starts, 3, 3, **more)


def scoped(query: Tensor, key: Tensor, value: Tensor, backends: Any = "aten_math", set_priority: bool = False) -> Any:
    with attnplug.sdpa_kernel(backends, set_priority):
        return call(query, key, value)


def explained(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
    return query + (attnplug.explain(query, key, value, **more).chosen == "torch")


def asked_of(query: Tensor, key: Tensor, value: Tensor, name: str = "torch") -> Tensor:
    return query + attnplug.can_use_impl(name, SDPAParams(query, key, value, None, 0.0, False, False)).accepted


MISTAKES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "a name that is unknown": (call, {"impl": "aten_meth"}),
    "what an implementation lacks": (call, {"impl": "aten_math", "softcap": 1.0}),
    "a number for a name": (call, {"impl": 3}),
    "a list for a name": (call, {"impl": ["aten_math"]}),
    "no number": (call, {"softcap": "a"}),
    "an argument out of range": (call, {"dropout_p": 2.0}),
    "a probability below 0": (call, {"dropout_p": -0.1}),
    "sinks of another shape": (call, {"sinks": torch.ones(3)}),
    "a mask of another shape": (call, {"attn_mask": torch.zeros(4, 5)}),
    "a mask of another dtype": (call, {"attn_mask": torch.zeros(4, 4, dtype=torch.float16)}),
    "keys of another dtype": (call, {"key": torch.randn(SHAPE, dtype=torch.float64)}),
    "keys of another batch": (call, {"query": torch.randn(2, 2, 4, 8), "key": torch.randn(3, 2, 4, 8)}),
    "keys of another head size": (call, {"key": torch.randn(1, 2, 4, 7)}),
    "packed, a name that is unknown": (packed, {"impl": "aten_meth"}),
    "packed, what an implementation lacks": (packed, {"impl": "aten_math", "softcap": 1.0}),
    "packed, sinks of another shape": (packed, {"sinks": torch.ones(3)}),
    "explained, a name that is unknown": (explained, {"impl": "aten_meth"}),
    "explained, an argument out of range": (explained, {"dropout_p": 2.0}),
    "explained, an argument that there is not": (explained, {"unknown": 1}),
    "asked of a name that is unknown": (asked_of, {"name": "aten_meth"}),
    "a scope of a name that is unknown": (scoped, {"backends": "aten_meth"}),
    "a scope of nothing": (scoped, {"backends": []}),
    "a scope of a number": (scoped, {"backends": [0]}),
    "a scope of a set whose order would count": (scoped, {"backends": {"torch", "aten_math"}, "set_priority": True}),
}


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        ("what an implementation lacks", None),
        ("a mask of another shape", None),
        ("packed, sinks of another shape", None),
        ("keys of another head size", True),
        ("keys of another batch", True),
        ("a probability below 0", True),
        ("a number for a name", True),
        ("a list for a name", None),
        ("explained, a name that is unknown", None),
        ("asked of a name that is unknown", None),
        ("sinks of another shape", True),
        ("packed, what an implementation lacks", True),
        ("a scope of a name that is unknown", None),
        ("a scope of a number", None),
    ],
)
def test_a_mistake_is_the_eager_error_and_what_is_mended_is_compiled(name: str, dynamic: bool | None) -> None:
    """Dynamo runs code eagerly ever after, in the whole process, once an error has left a trace of it.

    That no other mistake leaves a trace is seen in full graphs, which takes a tenth of the time.
    """
    function, mistake = MISTAKES[name]
    names = ("query", "key", "value")
    right = dict(zip(names, tensors(), strict=True))
    with pytest.raises(Exception) as eager:
        function(**right | mistake)
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=counter, dynamic=dynamic)
    def user(arguments: dict[str, Any]) -> Tensor:
        return function(**arguments) + 1

    with pytest.raises(type(eager.value), match=f"^{re.escape(str(eager.value))}$"):
        user(right | mistake)
    torch.testing.assert_close(user(right), function(**right) + 1)
    assert counter.frame_count > 0
    torch.testing.assert_close(Compiled(function)(**right), function(**right))


def test_an_explanation_for_another_gpu_is_that_of_eager_code() -> None:
    def wanted(query: Tensor) -> Any:
        return attnplug.explain(query + 1, query, query, compute_capability=(9, 0))

    for function in (wanted, torch.compile(wanted, backend="eager")):
        with pytest.raises(ValueError, match="describes a CUDA device, and query is on cpu"):
            function(torch.randn(1, 2, 4, 8))


@pytest.mark.parametrize("mask", [torch.zeros(16, 15), causal_upper_left(16, 15)], ids=["tensor", "bias"])
def test_a_mistake_in_a_mask_is_the_eager_error_when_lengths_are_dynamic_already(mask: Tensor) -> None:
    def attend(query: Tensor, mask: Tensor | None) -> Tensor:
        return call(query, query, query, attn_mask=mask, impl="math_ref")

    compiled = torch.compile(attend, backend="eager")
    for length in (8, 4):
        compiled(torch.randn(2, 2, length, 8), None)
    query = torch.randn(2, 2, 16, 8)
    with pytest.raises(ValueError) as eager:
        attend(query, mask)
    with pytest.raises(ValueError, match=f"^{re.escape(str(eager.value))}$"):
        compiled(query, mask)


def test_a_call_after_a_mistake_in_a_dynamic_length_is_right() -> None:
    def attend(tokens: Tensor, starts: Tensor, longest: int) -> Tensor:
        return attnplug.varlen_attn(tokens, tokens, tokens, starts, starts, longest, 5)

    compiled = torch.compile(attend, backend="eager", dynamic=True)
    tokens, starts = torch.randn(8, 4, 8), torch.tensor([0, 3, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="^max_q: expected 0 or more, got -1$"):
        compiled(tokens, starts, -1)
    torch.testing.assert_close(compiled(tokens, starts, 5), attend(tokens, starts, 5))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_breaks_a_full_graph_in_the_words_of_the_eager_error(name: str) -> None:
    function, mistake = MISTAKES[name]
    given = dict(zip(("query", "key", "value"), tensors(), strict=True)) | mistake
    with pytest.raises(Exception) as eager:
        function(**given)
    with pytest.raises(torch._dynamo.exc.Unsupported) as full:
        Compiled(function)(**given)
    told = " ".join(str(full.value).split())
    assert "torch._dynamo.graph_break()" in told  # else it is the error that left the trace
    assert " ".join(str(eager.value).split()).removeprefix("name: ") in told


def test_a_softcap_may_be_dynamic() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(call, backend=counter, dynamic=True, fullgraph=True)
    inputs = tensors()
    for softcap in (1.5, 2.5):
        torch.testing.assert_close(compiled(*inputs, softcap=softcap), call(*inputs, softcap=softcap))
    assert counter.frame_count == 1


def test_the_reasons_of_a_compiled_call_that_nothing_supports_are_kept() -> None:
    compiled = torch.compile(call, backend="eager")  # where a graph may break, errors are what they are without one
    with pytest.raises(attnplug.NoImplementationError) as caught:
        compiled(*tensors(), softcap=1.0, impl="aten_math")
    assert caught.value.reasons == {"aten_math": ("does not support softcap",)}


def test_an_error_of_a_kernel_that_breaks_the_graph_is_raised_and_nothing_runs_twice() -> None:
    class FailsAtFirst:
        composite, runs = True, 0

        def forward(self, params: attnplug.SDPAParams) -> Any:
            torch._dynamo.graph_break()
            self.runs += 1
            if self.runs == 1:
                raise RuntimeError("out of luck")
            logits = params.query @ params.key.mT
            return logits.softmax(-1) @ params.value, logits.logsumexp(-1)

    attnplug.register_impl(attnplug.ImplSpec(name="fails", kernel=(kernel := FailsAtFirst()), backend=None))
    compiled = torch.compile(call, backend="eager")
    with attnplug.record() as calls, pytest.raises(RuntimeError, match="^out of luck$"):
        compiled(*tensors(), impl="fails")
    assert kernel.runs == len(calls) == 1
    compiled(*tensors(), impl="fails")
    assert kernel.runs == 2


def test_the_registry_may_be_asked_for_the_first_time_in_a_trace() -> None:
    program = """
import torch, attnplug

@torch.compile(fullgraph=True, backend="eager")
def function(query):
    records, names = attnplug.list_impls(), attnplug.list_flash_attention_impls()
    out = attnplug.scaled_dot_product_attention(query, query[:, :2], query[:, :2], enable_gqa=True)
    return out, [record.name for record in records], names

out, records, names = function(torch.randn(1, 4, 3, 8))
assert out.shape == (1, 4, 3, 8) and sorted(records) == sorted(names) == attnplug.list_flash_attention_impls()
attnplug.register_impl(attnplug.ImplSpec(name="another", kernel=lambda params: None, backend=None))
assert "another" in function(torch.randn(1, 4, 3, 8))[1]
"""
    forked.run(program, warm="dynamo").check_returncode()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("impl", ["torch", "aten_flash", "opaque"])
def test_export_round_trips(impl: str, strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return call(query, key, value, impl=impl)

    inputs = tensors()
    program = torch.export.export(Model(), tuple(inputs), strict=strict)
    torch.testing.assert_close(program.module()(*inputs), call(*inputs, impl=impl))


def test_the_operator_of_an_opaque_kernel_passes_opcheck() -> None:
    compiled, inputs = Compiled(call), tensors(requires_grad=True)
    compiled(*inputs, impl="opaque")
    operator = getattr(torch.ops.attnplug, compiled.operations[0].split(".")[1])
    arguments = (*inputs, *[None] * 7, 0.0, False, False, 0.3, 1, [-1, -1], 0.0, True, None, None, 0)
    torch.library.opcheck(operator.default, arguments)


def test_fake_tensors_see_an_opaque_kernel() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query = torch.randn(SHAPE, requires_grad=True)
        out = call(query, query, query, impl="opaque")
        out.sum().backward()
    assert out.shape == SHAPE and query.grad is not None and query.grad.shape == SHAPE


def test_dynamic_numbers_are_traced() -> None:
    def function(query: Tensor, numbers: dict[str, float]) -> Tensor:
        return call(query, query, query, scale=numbers["scale"], impl="aten_math")

    compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=True)
    query = torch.randn(SHAPE)
    for scale in (0.5, 0.25):
        torch.testing.assert_close(compiled(query, {"scale": scale}), function(query, {"scale": scale}))


def test_dynamic_shapes_are_traced_in_every_scope() -> None:
    for scope in ("torch", SDPBackend.MATH, [SDPBackend.FLASH_ATTENTION, "opaque"]):
        torch._dynamo.reset()
        compiled = torch.compile(call, backend="eager", fullgraph=True, dynamic=True)
        with attnplug.sdpa_kernel(scope):
            for length in (4, 6):
                query = torch.randn(1, 2, length, 8)
                torch.testing.assert_close(
                    compiled(query, query, query, is_causal=scope == "torch"),
                    call(query, query, query, is_causal=scope == "torch"),
                )


def test_a_mask_may_come_first_when_lengths_are_dynamic_already() -> None:
    """Its sizes are constants of that trace, those of the call are symbols."""
    compiled = Compiled(lambda query, mask: call(query, query, query, attn_mask=mask, impl="aten_flash"))
    for batch, length in ((2, 8), (3, 4)):
        compiled(torch.randn(batch, 2, length, 8), None)
    query, mask = torch.randn(2, 2, 16, 8), torch.randn(16, 16)
    expected = call(query, query, query, attn_mask=mask)
    torch.testing.assert_close(compiled(query, mask), expected)


@pytest.mark.parametrize("dynamic", [None, True])
def test_the_first_call_of_a_process_may_be_where_dynamo_begins_again(dynamic: bool | None) -> None:
    done = forked.run(
        f"""
import torch, attnplug

@torch.compile(backend="eager", dynamic={dynamic})
def attend(query):
    out = attnplug.scaled_dot_product_attention(query, query, query)
    torch._dynamo.graph_break()
    return 2 * out

query = torch.randn(2, 3, 4, 8)
expected = 2 * torch.nn.functional.scaled_dot_product_attention(query, query, query)
torch.testing.assert_close(attend(query), expected)
""",
        warm="dynamo",
    )
    assert done.returncode == 0, done.stderr
