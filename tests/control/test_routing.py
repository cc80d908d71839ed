"""PyTorch's functions while they are routed: other people's wishes, savers, scripts and errors."""

from __future__ import annotations

import copy
import io
import pickle
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend as Family
from torch.nn.attention import sdpa_kernel as their_sdpa_kernel

import attnplug
import forked

Q = torch.randn(1, 2, 4, 8)
ORIGINAL = F.scaled_dot_product_attention
EVERYTHING = attnplug.Capabilities(features=frozenset())


def ran(*arguments: Any, **named: Any) -> list[str]:
    with attnplug.record() as calls:
        F.scaled_dot_product_attention(*(arguments or (Q, Q, Q)), **named)
    return [call.impl for call in calls]


# --- PyTorch's own sdpa_kernel ---


@pytest.mark.parametrize(
    ("active", "enabled", "expected"),
    [
        ("aten_flash", [Family.MATH], "torch"),
        ("aten_flash", [Family.MATH, Family.FLASH_ATTENTION], "aten_flash"),
        ("aten_math", [Family.MATH], "aten_math"),
        ("aten_math", [Family.FLASH_ATTENTION], "torch"),
        ("aten_math", [Family.EFFICIENT_ATTENTION, Family.MATH], "aten_math"),
    ],
)
def test_the_families_that_pytorch_enables_are_the_only_ones_that_run(
    active: str, enabled: list[Family], expected: str
) -> None:
    attnplug.activate_flash_attention_impl(active)
    assert ran() == [active]
    with their_sdpa_kernel(enabled):
        assert ran() == [expected]
    assert ran() == [active]


def test_a_second_derivative_in_pytorch_s_math_scope_works_under_an_activation() -> None:
    attnplug.activate_flash_attention_impl("aten_flash")
    query = Q.double().requires_grad_()
    with their_sdpa_kernel(Family.MATH):
        out = F.scaled_dot_product_attention(query, query, query)
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), query)[0].isfinite().all()


def test_scopes_that_have_nothing_in_common_are_an_error_that_names_both() -> None:
    with (
        attnplug.patch_torch(),
        attnplug.sdpa_kernel("aten_flash"),
        their_sdpa_kernel(Family.MATH),
        pytest.raises(attnplug.NoImplementationError, match=r"(?s)aten_flash'\].*not enabled in torch.nn.*MATH is"),
    ):
        F.scaled_dot_product_attention(Q, Q, Q)


def test_a_call_of_attnplug_s_own_is_not_narrowed() -> None:
    with their_sdpa_kernel(Family.MATH), attnplug.sdpa_kernel("aten_flash"), attnplug.record() as calls:
        attnplug.scaled_dot_product_attention(Q, Q, Q)
    assert [call.impl for call in calls] == ["aten_flash"]


def test_a_scope_that_shares_no_family_with_pytorch_s_is_the_eager_error_in_compiled_code() -> None:
    compiled = torch.compile(lambda query: F.scaled_dot_product_attention(query, query, query) + 1, backend="eager")
    expected = ORIGINAL(Q, Q, Q) + 1
    with attnplug.patch_torch(), attnplug.sdpa_kernel(attnplug.SDPBackend.EFFICIENT_ATTENTION):
        with their_sdpa_kernel(Family.MATH):
            with pytest.raises(attnplug.NoImplementationError) as eager:
                ran()
            with pytest.raises(attnplug.NoImplementationError) as caught:
                compiled(Q)
        assert caught.value.reasons == eager.value.reasons
        with attnplug.sdpa_kernel("aten_math"), attnplug.record() as calls:
            torch.testing.assert_close(compiled(Q), expected)
        assert [call.impl for call in calls] == ["aten_math"]


def test_pytorch_s_scope_inside_a_compiled_function_counts() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def function(query: Tensor) -> Tensor:
        with their_sdpa_kernel(Family.FLASH_ATTENTION):
            inside = F.scaled_dot_product_attention(query, query, query)
        return inside + F.scaled_dot_product_attention(query, query, query)

    attnplug.activate_flash_attention_impl("aten_math")
    torch.compile(function, backend=keep, fullgraph=True)(Q)
    calls = [str(node.target) for node in graphs[-1].graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    assert ["math" in call for call in calls] == [False, True]


# --- saved, copied, scripted ---


class Holder(nn.Module):
    """A module that holds PyTorch's function, as those of several libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = F.scaled_dot_product_attention

    def forward(self, query: Tensor) -> Tensor:
        return self.attend(query, query, query)


@pytest.mark.parametrize("saved", ["while it is routed", "afterwards"])
@pytest.mark.parametrize("loaded", ["while it is routed", "afterwards"])
def test_a_module_that_holds_the_function_is_saved_and_holds_pytorch_s_again(saved: str, loaded: str) -> None:
    if saved == "afterwards" and loaded == "while it is routed":
        pytest.skip("the patch is gone by then")
    file = io.BytesIO()
    with attnplug.patch_torch():
        holder = Holder()
        if saved == "while it is routed":
            torch.save(holder, file)
            copied = copy.deepcopy(holder)
        if loaded == "while it is routed":
            file.seek(0)
            found = torch.load(file, weights_only=False)
            assert found.attend is copied.attend is F.scaled_dot_product_attention
            with attnplug.sdpa_kernel("aten_math"), attnplug.record() as calls:
                found(Q)
            assert [call.impl for call in calls] == ["aten_math"]
            return
    if saved == "afterwards":
        torch.save(holder, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).attend is ORIGINAL
    assert copy.deepcopy(holder).attend is ORIGINAL


def test_what_was_saved_needs_no_attnplug_to_come_back(tmp_path: Path) -> None:
    with attnplug.patch_torch():
        (tmp_path / "function.pkl").write_bytes(pickle.dumps(F.scaled_dot_product_attention))
    program = f"""
        import pickle, sys
        function = pickle.load(open({str(tmp_path / "function.pkl")!r}, "rb"))
        print(function.__module__, "attnplug" in sys.modules)
    """
    done = forked.run(textwrap.dedent(program))
    assert done.stdout.split() == ["torch._C._nn", "False"], done.stderr


def attends(query: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, query, query)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripts_are_compiled_while_the_function_is_routed_and_afterwards() -> None:
    module = nn.MultiheadAttention(8, 2).eval()
    hidden = torch.randn(3, 1, 8)
    expected = module(hidden, hidden, hidden)[0]
    with attnplug.patch_torch():
        scripts = [(torch.jit.script(module), torch.jit.script(attends))]
    scripts.append((torch.jit.script(module), torch.jit.script(attends)))
    for scripted, function in scripts:
        torch.testing.assert_close(scripted(hidden, hidden, hidden)[0], expected)
        torch.testing.assert_close(function(Q), ORIGINAL(Q, Q, Q))
    torch.jit.script(nn.TransformerEncoderLayer(8, 2))


# --- errors and odd arguments ---


@pytest.mark.parametrize("wrong", [(Q, Q[..., :3], Q), (Q, Q.double(), Q), (Q, Q, Q, torch.zeros(3, 3))])
def test_mistakes_are_caught_where_pytorch_s_are(wrong: Any) -> None:
    with pytest.raises(RuntimeError):
        ORIGINAL(*wrong)
    with attnplug.patch_torch(), attnplug.sdpa_kernel("aten_math"):
        for expected in (RuntimeError, ValueError):
            with pytest.raises(expected, match="key|value|attn_mask"):
                F.scaled_dot_product_attention(*wrong)


def test_a_head_size_of_zero_gives_what_pytorch_gives() -> None:
    empty = Q[..., :0]
    with attnplug.patch_torch(), attnplug.sdpa_kernel("aten_math"):
        assert torch.equal(F.scaled_dot_product_attention(empty, empty, Q), ORIGINAL(empty, empty, Q))


# --- variable length ---


def test_pytorch_s_varlen_attn_is_routed_with_its_causal_window_and_its_lse() -> None:
    pytest.importorskip("attnplug_math_ref")
    from torch.nn.attention import varlen

    packed, starts = torch.randn(16, 2, 8), torch.tensor([0, 5, 16], dtype=torch.int32)
    arguments = (packed, packed, packed, starts, starts, 11, 11)
    original = varlen.varlen_attn
    with attnplug.patch_torch(), attnplug.sdpa_kernel("math_ref"), attnplug.record() as calls:
        out, lse = varlen.varlen_attn(*arguments, window_size=(-1, 0), return_aux=varlen.AuxRequest(lse=True))
        whole = varlen.varlen_attn(*arguments)
        saved = pickle.dumps(varlen.varlen_attn)
    assert varlen.varlen_attn is pickle.loads(saved) is original
    assert [call.impl for call in calls] == ["math_ref"] * 2
    expected = attnplug.varlen_attn(*arguments, is_causal=True, return_lse=True, impl="math_ref")
    torch.testing.assert_close((out, lse), expected)
    torch.testing.assert_close(whole, attnplug.varlen_attn(*arguments, impl="math_ref"))


def test_pytorch_s_varlen_attn_follows_if_it_is_imported_while_the_patch_is_in_place() -> None:
    program = """
        import attnplug, torch, sys
        assert "torch.nn.attention.varlen" not in sys.modules
        handle = attnplug.patch_torch()
        from torch.nn.attention.varlen import varlen_attn
        print(type(varlen_attn).__name__)
        handle.remove()
        from torch.nn.attention import varlen
        print(type(varlen.varlen_attn).__name__)
    """
    done = forked.run(textwrap.dedent(program))
    assert done.stdout.split() == ["_RoutedVarlen", "function"], done.stderr


# --- kernels made of PyTorch's function ---


class OfTorch:
    """A kernel that computes with PyTorch's function under its public name, in all that it may define."""

    @staticmethod
    def forward(params: Any) -> tuple[Tensor, None]:
        return F.scaled_dot_product_attention(params.query, params.key, params.value, scale=params.scale), None

    @staticmethod
    def backward(params: Any, grad_out: Tensor, *others: Any) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (params.query, params.key, params.value)]
        with torch.enable_grad():
            out = F.scaled_dot_product_attention(*leaves, scale=params.scale)
        return torch.autograd.grad(out, leaves, grad_out)

    @staticmethod
    def prepare(params: Any) -> Any:
        return lambda *tensors: (F.scaled_dot_product_attention(*tensors), None)

    @staticmethod
    def prepare_backward(params: Any, *others: Any) -> Any:
        def run(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, *saved: Any) -> tuple[Tensor, ...]:
            given = attnplug.SDPAParams(query, key, value, scale=query.shape[-1] ** -0.5)
            return OfTorch.backward(given, grad_out)

        return run


@pytest.mark.parametrize("before", [0, 3], ids=["activated at first", "called before"])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_kernel_made_of_pytorch_s_function_is_called_once_for_each_call(before: int, needs_grad: bool) -> None:
    attnplug.register_impl(attnplug.ImplSpec(name="of_torch", kernel=OfTorch, backend=None, capabilities=EVERYTHING))
    query = Q.clone().requires_grad_(needs_grad)

    def step(function: Any) -> list[Tensor]:
        out = function(query, query, query)
        return [out, torch.autograd.grad(out.sum(), query)[0]] if needs_grad else [out]

    expected = step(F.scaled_dot_product_attention)
    for _ in range(before):
        step(partial(attnplug.scaled_dot_product_attention, impl="of_torch"))
    attnplug.activate_flash_attention_impl("of_torch")
    for _ in range(3):
        with attnplug.record() as calls:
            found = step(F.scaled_dot_product_attention)
        torch.testing.assert_close(found, expected)
        assert [call.impl for call in calls] == ["of_torch"]
    attnplug.restore_flash_attention_impl()
    assert ran(query, query, query) == []
    found = step(partial(attnplug.scaled_dot_product_attention, impl="of_torch"))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("is_made_of_it", [False, True])
def test_patches_around_compiled_calls_compile_at_most_what_sees_pytorch_s_function(is_made_of_it: bool) -> None:
    def forward(params: Any) -> tuple[Tensor, None]:
        if is_made_of_it:
            return OfTorch.forward(params)
        return torch.softmax(params.scale * params.query @ params.key.mT, -1) @ params.value, None

    kernel = attnplug.Kernel(forward=forward, composite=True)
    attnplug.register_impl(attnplug.ImplSpec(name="traced", kernel=kernel, backend=None, capabilities=EVERYTHING))
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    attend = torch.compile(
        lambda query: attnplug.scaled_dot_product_attention(query, query, query, impl="traced"),
        backend=backend, fullgraph=True,
    )  # fmt: skip
    expected = F.scaled_dot_product_attention(Q, Q, Q)
    for _ in range(3):
        torch.testing.assert_close(attend(Q), expected)
        with attnplug.patch_torch(), attnplug.record():
            torch.testing.assert_close(F.scaled_dot_product_attention(Q, Q, Q), expected)
        with attnplug.patch_torch():
            torch.testing.assert_close(attend(Q), expected)
    assert len(graphs) == (2 if is_made_of_it else 1)
