"""PyTorch's own modules, samples and ways to override functions, while its function is routed through attnplug.

What the selection accepts runs there, gradients included; everything else is PyTorch's own result bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing._internal.common_methods_invocations import op_db

import attnplug

SDPA = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
IMPLS = ["torch", "aten_flash", "aten_math", "math_ref"]
OTHERS = IMPLS[1:]


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """An activation says once per reason what it declines; here that is expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", attnplug.FallbackWarning)
        yield


@pytest.fixture
def impl(request: pytest.FixtureRequest) -> str:
    if request.param not in attnplug.list_flash_attention_impls():
        pytest.skip(f"{request.param} is not installed")
    return request.param


def step(function: Callable[..., Tensor], *inputs: Tensor, **arguments: Any) -> list[Tensor]:
    """Return the output and the gradients, from the same seed each time."""
    torch.manual_seed(0)
    out = function(*inputs, **arguments)
    wanted = [*inputs] if not isinstance(function, nn.Module) else [*inputs, *function.parameters()]
    grads = torch.autograd.grad(out, [t for t in wanted if t.requires_grad], torch.ones_like(out).cumsum(-1))
    return [out.detach(), *grads]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def activated(impl: str, function: Callable[[], list[Any]]) -> tuple[list[Any], list[str]]:
    """Return what `function` gives while `impl` is active, and which implementations ran."""
    attnplug.activate_flash_attention_impl(impl)
    with attnplug.record() as calls:
        found = function()
    attnplug.restore_flash_attention_impl()
    return found, [call.impl for call in calls]


# --- PyTorch's own samples ---


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_of_pytorch_s_samples_is_run_or_left_to_pytorch_bit_for_bit(impl: str, dtype: torch.dtype) -> None:
    samples = list(SDPA.sample_inputs("cpu", dtype, requires_grad=True))
    accepted = [attnplug.can_use_impl(impl, as_params(sample)).accepted for sample in samples]

    def steps() -> list[list[Tensor]]:
        return [step(F.scaled_dot_product_attention, sample.input, *sample.args, **sample.kwargs) for sample in samples]

    expected = steps()
    (found, again), ran = activated(impl, lambda: [steps(), steps()])
    assert ran == [impl if yes else "torch" for yes in accepted] * 2
    assert sum(accepted) >= 12
    for name, sample, one, other, repeated in zip(ran, samples, found, expected, again, strict=False):
        assert equal(one, repeated)
        if name == "torch":
            assert equal(one, other)
        elif not sample.kwargs["dropout_p"]:  # of which each implementation may draw its own
            assert_close(one, other, dtype)


def assert_close(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Compare gradients in float64 only: in these samples they are what is left of large numbers' difference."""
    if dtype is torch.float64:
        torch.testing.assert_close(found, expected)
    assert (found[0] - expected[0]).abs().max() <= 32 * torch.finfo(dtype).eps * expected[0].abs().max()


def as_params(sample: Any) -> attnplug.SDPAParams:
    arguments = dict(sample.kwargs)
    dropout, is_causal = arguments.pop("dropout_p"), arguments.pop("is_causal")
    return attnplug.SDPAParams(sample.input, *sample.args, arguments.get("attn_mask"), dropout, is_causal, False)


# --- nn.MultiheadAttention ---

LONG, SHORT = 6, 4
PADDED = torch.tensor([[False] * LONG, [False] * 3 + [True] * 3])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(SHORT, dtype=torch.float64)
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "padding": ({}, {"key_padding_mask": PADDED}),
    "padding as numbers": ({}, {"key_padding_mask": torch.zeros(2, LONG).double().masked_fill(PADDED, -torch.inf)}),
    "a mask": ({}, {"attn_mask": torch.ones(SHORT, LONG, dtype=torch.bool).triu(2)}),
    "a mask for each head, and padding": (
        {},
        {"attn_mask": torch.arange(4 * SHORT * LONG).view(4, SHORT, LONG) % 7 == 1, "key_padding_mask": PADDED},
    ),
    "learnt keys and a zero": ({"add_bias_kv": True, "add_zero_attn": True}, {"key_padding_mask": PADDED}),
    "sequence first": ({"batch_first": False}, {}),
}


def multihead(**options: Any) -> tuple[nn.MultiheadAttention, list[Tensor]]:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, kdim=6, vdim=10, dtype=torch.float64, **{"batch_first": True} | options)
    inputs = [torch.randn(2, length, size).double() for length, size in ((SHORT, 8), (LONG, 6), (LONG, 10))]
    if not module.batch_first:
        inputs = [tensor.transpose(0, 1).contiguous() for tensor in inputs]
    return module, [tensor.requires_grad_() for tensor in inputs]


@pytest.mark.parametrize("impl", OTHERS, indirect=True)
@pytest.mark.parametrize("form", FORMS)
def test_multihead_attention_trains_alike(form: str, impl: str) -> None:
    options, arguments = FORMS[form]
    module, inputs = multihead(**options)

    def call() -> list[Tensor]:
        return step(Outputs(module), *inputs, need_weights=False, **arguments)

    expected = call()
    found, ran = activated(impl, call)
    assert ran == [impl]
    torch.testing.assert_close(found, expected)


class Outputs(nn.Module):
    """A module without the second thing that it returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor, **arguments: Any) -> Tensor:
        return self.module(*inputs, **arguments)[0]


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_that_returns_its_weights_stays_as_it_is(training: bool) -> None:
    """PyTorch computes them with products and a softmax, and no attention function is asked."""
    module, inputs = multihead()
    module.train(training)
    expected = module(*inputs, key_padding_mask=PADDED)
    with attnplug.patch_torch(), attnplug.sdpa_kernel("aten_math"), attnplug.record() as calls:
        found = module(*inputs, key_padding_mask=PADDED)
    assert not calls and equal([*found], [*expected])


@pytest.mark.parametrize("impl", OTHERS, indirect=True)
@pytest.mark.parametrize("unbatched", [False, True])
def test_multihead_attention_s_fast_path_does_not_hide_it(unbatched: bool, impl: str) -> None:
    """In evaluation without gradients, self-attention is one C++ operator that contains its own attention."""
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    hidden = torch.randn(5, 8) if unbatched else torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = module(hidden, hidden, hidden, need_weights=False)[0]
        (found,), ran = activated(impl, lambda: [module(hidden, hidden, hidden, need_weights=False)[0]])
        assert torch.equal(module(hidden, hidden, hidden, need_weights=False)[0], expected)
    assert ran == [impl]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# --- nn.Transformer ---


def transformer(**options: Any) -> tuple[nn.Transformer, list[Tensor], dict[str, Any]]:
    """Return two layers of each kind, their inputs, and every mask that they take."""
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 2, 2, 24, dtype=torch.float64, **{"dropout": 0.0, "batch_first": True} | options)
    source, target = torch.randn(2, LONG, 16).double(), torch.randn(2, SHORT, 16).double()
    masks = {
        "tgt_mask": CAUSAL,
        "src_key_padding_mask": PADDED,
        "memory_key_padding_mask": PADDED,
        "tgt_key_padding_mask": torch.tensor([[False] * SHORT, [False] * 3 + [True]]),
    }
    return model, [source.requires_grad_(), target.requires_grad_()], masks


@pytest.mark.parametrize("impl", OTHERS, indirect=True)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:Support for mismatched")
def test_a_transformer_with_all_its_masks_trains_alike(norm_first: bool, impl: str) -> None:
    model, inputs, masks = transformer(norm_first=norm_first)
    expected = step(model, *inputs, **masks)
    found, ran = activated(impl, lambda: step(model, *inputs, **masks))
    assert ran == [impl] * 6  # two in the encoder, and two in each of the decoder's layers
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("given", ["mask", "hint"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_causal_hint_and_a_causal_mask_mean_the_same(given: str) -> None:
    """`nn.Transformer` finds out that a mask is causal, and then hands on `is_causal` without it."""
    model, (source, target), _ = transformer()
    arguments = {"tgt_mask": CAUSAL, "tgt_is_causal": True if given == "hint" else None}
    expected = step(model, source, target, tgt_mask=CAUSAL, tgt_is_causal=False)
    found, _ = activated("aten_math", lambda: step(model, source, target, **arguments))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", ["torch", "aten_math"])
def test_dropout_of_a_transformer_is_drawn_as_without_the_drop_in(impl: str) -> None:
    """Where PyTorch itself would run the formula on a CPU, the same seed drops the same."""
    model, inputs, masks = transformer(dropout=0.25)
    expected = step(model, *inputs, **masks)
    found, ran = activated(impl, lambda: step(model, *inputs, **masks))
    assert ran == [impl] * 6
    torch.testing.assert_close(found, expected)


def test_an_implementation_without_dropout_leaves_training_with_dropout_to_pytorch() -> None:
    model, inputs, masks = transformer(dropout=0.25)
    expected = step(model, *inputs, **masks)
    found, ran = activated("aten_flash", lambda: step(model, *inputs, **masks))
    assert ran == ["torch"] * 6
    assert equal(found, expected)


@pytest.mark.parametrize("impl", OTHERS, indirect=True)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Support for mismatched")
def test_an_encoder_in_evaluation_follows_although_pytorch_would_make_padding_a_nested_tensor(impl: str) -> None:
    model, (source, target), masks = transformer()
    model, visible = model.eval(), ~PADDED
    with torch.no_grad():
        expected = model.encoder(source, src_key_padding_mask=PADDED)[visible]
        whole = model(source, target, **masks)
        (found, again), ran = activated(
            impl, lambda: [model.encoder(source, src_key_padding_mask=PADDED), model(source, target, **masks)]
        )
    assert ran == [impl] * 8
    torch.testing.assert_close(found[visible], expected)
    torch.testing.assert_close(again, whole)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_with_nothing_selected_modules_are_pytorch_s_own_bit_for_bit() -> None:
    model, inputs, masks = transformer(dropout=0.25)
    expected = step(model, *inputs, **masks)
    with attnplug.patch_torch():
        assert equal(step(model, *inputs, **masks), expected)
    model.eval()
    with torch.no_grad():
        expected = [model(*inputs, **masks)]
        with attnplug.patch_torch():
            assert equal([model(*inputs, **masks)], expected)


# --- what overrides PyTorch's function by itself ---


class Watching(TorchFunctionMode):
    """A mode as diffusers and others write it: it looks for the function under the name that it has now."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += function is torch.nn.functional.scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("scope", [None, "torch", "aten_math"])
def test_a_torch_function_mode_sees_each_call_once(scope: str | None) -> None:
    query = torch.randn(1, 2, 4, 8)
    with attnplug.patch_torch(), Watching() as watching, attnplug.record() as calls:
        if scope is None:
            F.scaled_dot_product_attention(query, query, query)
        else:
            with attnplug.sdpa_kernel(scope):
                F.scaled_dot_product_attention(query, query, query)
    assert watching.seen == 1
    assert [call.impl for call in calls] == [scope or "torch"]


class Scaled(Tensor):
    """A tensor that answers for PyTorch's function, found in a table as subclasses have one."""

    TABLE = {F.scaled_dot_product_attention: lambda query, *rest, **named: query.as_subclass(Tensor) * 2}

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in cls.TABLE:
            return cls.TABLE[function](*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_tensor_that_overrides_pytorch_s_function_still_does_with_nothing_selected() -> None:
    query = torch.randn(1, 2, 4, 8)
    with attnplug.patch_torch():
        found = F.scaled_dot_product_attention(query.as_subclass(Scaled), query, query)
    assert torch.equal(found, query * 2)


def test_a_tensor_that_overrides_pytorch_s_function_still_does_in_a_scope() -> None:
    query = torch.randn(1, 2, 4, 8)
    with attnplug.patch_torch(), attnplug.sdpa_kernel("aten_math"):
        found = F.scaled_dot_product_attention(query.as_subclass(Scaled), query, query)
    assert torch.equal(found, query * 2)


@pytest.mark.parametrize("queries", [3, 5])
@pytest.mark.parametrize("variant", ["upper_left", "lower_right"])
def test_pytorch_s_causal_bias_keeps_its_meaning(variant: str, queries: int) -> None:
    from torch.nn.attention import bias

    mask = getattr(bias, f"causal_{variant}")(queries, 5)
    query, key, value = torch.randn(1, 2, queries, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    expected = F.scaled_dot_product_attention(query, key, value, mask)
    with attnplug.patch_torch():
        assert torch.equal(F.scaled_dot_product_attention(query, key, value, mask), expected)
        with attnplug.record():
            torch.testing.assert_close(F.scaled_dot_product_attention(query, key, value, mask), expected)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_stay_with_pytorch(layout: torch.layout) -> None:
    parts = [torch.randn(length, 2, 8) for length in (3, 5)]
    heads = torch.nested.nested_tensor(parts, layout=layout).transpose(1, 2)
    if layout is torch.strided:
        heads = heads.contiguous()
    expected = F.scaled_dot_product_attention(heads, heads, heads)
    with attnplug.patch_torch():
        unselected = F.scaled_dot_product_attention(heads, heads, heads)
    attnplug.activate_flash_attention_impl("aten_math")
    declined = F.scaled_dot_product_attention(heads, heads, heads)
    for found in (unselected, declined):
        assert equal([*found.unbind()], [*expected.unbind()])


@pytest.mark.parametrize("impl", ["torch", "aten_math"])
def test_compiled_calls_of_jagged_tensors_follow_an_activation_as_eager_ones_do(impl: str) -> None:
    jagged = torch.nested.nested_tensor([torch.randn(length, 16) for length in (3, 5)], layout=torch.jagged)

    def attend(jagged: torch.Tensor) -> torch.Tensor:
        heads = jagged.unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads)

    expected = attend(jagged)
    attnplug.activate_flash_attention_impl(impl)
    found = torch.compile(attend, backend="eager")(jagged)
    torch.testing.assert_close([*found.unbind()], [*expected.unbind()])


def test_a_compiled_call_of_jagged_tensors_says_why_nothing_takes_it() -> None:
    jagged = torch.nested.nested_tensor([torch.randn(length, 16) for length in (3, 5)], layout=torch.jagged)

    @torch.compile(backend="eager")
    def attend(jagged: torch.Tensor) -> torch.Tensor:
        heads = jagged.unflatten(-1, (2, 8)).transpose(1, 2)
        return attnplug.scaled_dot_product_attention(heads, heads, heads, impl="aten_math")

    with pytest.raises(attnplug.NoImplementationError, match="aten_math: does not support nested tensors"):
        attend(jagged)


def test_a_decision_about_dense_tensors_is_not_one_about_nested_tensors() -> None:
    """Of jagged tensors, sizes and dtypes read as those of a dense call, which `aten_math` takes."""
    parts = [torch.randn(length, 2, 8) for length in (3, 5)]
    heads = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    dense = torch.randn(2, 2, 5, 8)
    with attnplug.sdpa_kernel(["aten_math", "torch"], set_priority=True), attnplug.record() as calls:
        for query in (dense, heads, dense):
            attnplug.scaled_dot_product_attention(query, query, query)
    assert [call.impl for call in calls] == ["aten_math", "torch", "aten_math"]


def test_recording_does_not_break_a_call_with_jagged_tensors() -> None:
    parts = [torch.randn(length, 2, 8) for length in (3, 5)]
    heads = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    with attnplug.patch_torch(), attnplug.record() as calls:
        F.scaled_dot_product_attention(heads, heads, heads)
    assert [call.impl for call in calls] == ["torch"]
