"""Calls for the tests of `efficient_cuda` and `cudnn`, and what is right for them.

Without a GPU their code meets emulated kernels (`cuda_kernels_emulated`), whose results are compared with PyTorch's
own attention in float64, and, under fake CUDA tensors, the real schemas of PyTorch's operators.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

import pytest
import torch
from torch import Tensor

import attnplug
from attnplug import Capabilities, CausalVariant, Feature, ImplSpec, SDPAParams, SDPBackend
from attnplug.testing import Report
from cuda_kernels_emulated import Cudnn, CudnnSequences, Cutlass
from reference import attention

plugin = pytest.importorskip("attnplug_efficient_cuda", reason="attnplug-efficient-cuda is not installed")
from attnplug_efficient_cuda import cudnn, efficient, operators

INF = float("inf")
UPPER_LEFT, LOWER_RIGHT = CausalVariant.UPPER_LEFT, CausalVariant.LOWER_RIGHT
SPECS = {spec.name: spec for spec in plugin.attnplug_register_impls()}
KERNELS = {"efficient_cuda": efficient, "cudnn": cudnn}
GPUS = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


def emulate(monkeypatch: pytest.MonkeyPatch, name: str, kernel: Cutlass | Cudnn | CudnnSequences) -> None:
    """Register `emulated`, the plugin's own code on emulated operators, for CPU tensors."""
    prefix = "efficient" if name == "efficient_cuda" else "cudnn"
    monkeypatch.setattr(operators, f"{prefix}_forward", kernel.forward)
    monkeypatch.setattr(operators, f"{prefix}_backward", kernel.backward)
    monkeypatch.setattr(operators, "bound", lambda name: getattr(kernel, "whole", None))
    monkeypatch.setattr(operators, "overload", lambda name: getattr(kernel, "whole_backward", kernel.backward))
    if isinstance(kernel, Cudnn):
        monkeypatch.setattr(operators, "cudnn_lse_rank", lambda: kernel.lse_rank)
    parts = [Capabilities(devices=("cpu",), features=part.features) for part in SPECS[name].capabilities.alternatives]
    attnplug.register_impl(
        ImplSpec(
            name="emulated",
            kernel=KERNELS[name],
            backend=SDPBackend.MATH,
            capabilities=reduce(or_, parts),
            priority=-1000,
        )
    )


def wrong(report: Report) -> list[str]:
    """Return each check in which a call that was taken went wrong.

    The kit also fails an implementation that declares a feature and declines every call for it. Here that is so
    wherever PyTorch, cuDNN or the GPU is not one that has it, which no declaration can say.
    """
    failed = [result for result in report.results if result.status == "failed"]
    return [f"{result.check}: {result.reason}" for result in failed if "declines every call" not in result.reason]


def register_both() -> None:
    """Make both implementations known, installed or not."""
    for name, spec in SPECS.items():
        if name not in attnplug.list_flash_attention_impls():
            attnplug.register_impl(spec)


def install_cudnn(monkeypatch: pytest.MonkeyPatch, version: int | None) -> None:
    """Let PyTorch say that it was built with this cuDNN."""
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)


def install_sequences(monkeypatch: pytest.MonkeyPatch, present: bool = True) -> None:
    """Let this PyTorch have the operator that marks cuDNN's path for sequences as finished, or not."""
    find = operators.find_schema
    marker = "_cudnn_attention_forward_no_dropout_inplace"
    monkeypatch.setattr(operators, "find_schema", lambda name: (present or None) if name == marker else find(name))


def tensors(
    batch: int = 2,
    heads: int = 2,
    kv_heads: int = 2,
    queries: int = 5,
    keys: int = 7,
    size: int = 8,
    value_size: int = 8,
    dtype: torch.dtype = torch.float32,
    heads_first: bool = True,
) -> list[Tensor]:
    shapes = [
        (batch, heads, queries, size),
        (batch, kv_heads, keys, size),
        (batch, kv_heads, keys, value_size),
    ]
    if heads_first:
        return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    return [torch.randn(b, s, h, e, dtype=dtype).transpose(1, 2).requires_grad_() for b, h, s, e in shapes]


def seen_by(
    queries: int,
    keys: int,
    *,
    is_causal: bool = False,
    causal_variant: CausalVariant = UPPER_LEFT,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """`(queries, keys)`, from the contract's numbers 5 and 6."""
    row = torch.arange(queries)[:, None] + (keys - queries if causal_variant == LOWER_RIGHT else 0)
    column, (left, right) = torch.arange(keys), window_size
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if is_causal:
        seen &= column <= row
    if left >= 0:
        seen &= column >= row - left
    if right >= 0:
        seen &= column <= row + right
    return seen


def pytorch(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, seen: Tensor) -> Tensor:
    """PyTorch's attention in float64; `seen` broadcasts to the logits."""
    hidden = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -INF)
    if attn_mask is not None:
        given = attn_mask
        if attn_mask.dtype == torch.bool:
            given = torch.zeros(attn_mask.shape, dtype=torch.float64).masked_fill(~attn_mask, -INF)
        hidden = hidden + given.double()
    hidden = hidden.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(
        *(t.double() for t in (query, key, value)), attn_mask=hidden, enable_gqa=True
    )


def assert_same(call: dict[str, Any], seen: Tensor, tolerance: float = 2e-5, seqused_k: Tensor | None = None) -> None:
    """Assert that out, lse and all gradients of a dense call are PyTorch's, in float64."""
    query, key, value, mask = call["query"], call["key"], call["value"], call.get("attn_mask")
    out, lse = attnplug.scaled_dot_product_attention(**call, enable_gqa=True, return_lse=True, impl="emulated")
    expected = pytorch(query, key, value, mask, seen)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    options = {name: call[name] for name in ("is_causal", "causal_variant", "window_size", "seqused_k") if name in call}
    options["causal_variant"] = int(options.get("causal_variant", UPPER_LEFT))
    _, expected_lse = attention(query, key, value, mask, enable_gqa=True, **options)
    torch.testing.assert_close(lse.double(), torch.as_tensor(expected_lse), atol=tolerance, rtol=tolerance)
    wanting = [t for t in (query, key, value, mask) if t is not None and t.requires_grad]
    if not wanting:
        return
    grad = torch.randn_like(expected)
    found = torch.autograd.grad(out, wanting, grad.to(out.dtype))
    right = torch.autograd.grad(expected, wanting, grad.to(out.dtype).double())
    for tensor, got, want in zip(wanting, found, right, strict=True):
        assert got.shape == tensor.shape and got.dtype == tensor.dtype
        torch.testing.assert_close(got, want.to(got.dtype), atol=5 * tolerance, rtol=5 * tolerance)


LENGTHS = [(5, 5), (5, 7), (7, 5), (1, 6), (6, 1), (40, 33)]
BANDS = [
    {},
    {"is_causal": True},
    {"is_causal": True, "causal_variant": LOWER_RIGHT},
    {"window_size": (2, 0)},
    {"is_causal": True, "window_size": (3, 1)},
    {"window_size": (-1, 0)},
    {"window_size": (0, 0), "causal_variant": LOWER_RIGHT},
    {"window_size": (2, 1)},
    {"window_size": (-1, 2), "causal_variant": LOWER_RIGHT},
    {"window_size": (1, -1)},
]
MASKS = [
    ("float", (1, 1, 1, 7)),
    ("float", (2, 1, 1, 7)),
    ("float", (1, 4, 5, 7)),
    ("float", (2, 4, 5, 7)),
    ("float", (2, 1, 5, 1)),
    ("bool", (2, 1, 1, 7)),
    ("bool", (5, 7)),
    ("bool", (2, 4, 5, 7)),
    ("bool", (4, 1, 1)),
]


def make_mask(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A mask with one row that sees nothing, if it has rows of its own."""
    mask = torch.rand(shape) > 0.4
    if mask.dim() > 1 and mask.shape[-2] > 1:
        mask[..., 1, :] = False
    if kind == "bool":
        return mask
    return torch.randn(shape, dtype=dtype).masked_fill(~mask, -INF).requires_grad_()


def fake_call(features: set[Feature], dtype: torch.dtype, size: int = 64, queries: int = 16, keys: int = 16) -> Any:
    """A call on a CUDA device that asks for these features: its tensors and its other arguments."""
    if features & {Feature.UPPER_LEFT, Feature.LOWER_RIGHT}:
        keys += 24
    kv_heads = 2 if Feature.GQA in features else 4
    value_size = 32 if Feature.VALUE_HEAD_SIZE in features else size
    options: dict[str, Any] = {"enable_gqa": Feature.GQA in features, "return_lse": Feature.LSE in features}
    if features & {Feature.CAUSAL, Feature.UPPER_LEFT, Feature.LOWER_RIGHT}:
        options["is_causal"] = True
    if Feature.WINDOW in features:
        options["window_size"] = (5, 0)
    if Feature.DROPOUT in features:
        options["dropout_p"] = 0.125

    def make(*shape: int, dtype: torch.dtype = dtype, grad: bool = True) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=grad)

    def integers(count: int) -> Tensor:
        return make(count, dtype=torch.int32, grad=False)

    if Feature.SEQUSED_K in features:
        options["seqused_k"] = integers(2)
    if Feature.VARLEN in features:
        inputs = [
            make(2 * queries, 4, size),
            make(2 * keys, kv_heads, size),
            make(2 * keys, kv_heads, value_size),
        ]
        options |= {"cu_seq_q": integers(3), "cu_seq_k": integers(3), "max_q": queries, "max_k": keys}
        return inputs, options
    inputs = [make(2, 4, queries, size), make(2, kv_heads, keys, size), make(2, kv_heads, keys, value_size)]
    if Feature.LOWER_RIGHT in features:
        options["causal_variant"] = LOWER_RIGHT
    if Feature.BOOLEAN_MASK in features:
        options["attn_mask"] = make(2, 1, queries, keys, dtype=torch.bool, grad=False)
    if features & {Feature.ADDITIVE_MASK, Feature.MASK_GRADIENT}:
        options["attn_mask"] = make(2, 1, queries, keys, grad=Feature.MASK_GRADIENT in features)
    return inputs, options


def prepared(inputs: list[Tensor], options: dict[str, Any]) -> SDPAParams:
    """The same call as the core hands it to a kernel."""
    fields = {"causal_variant": LOWER_RIGHT} if "cu_seq_q" in options else {}
    fields |= {"dropout" if name == "dropout_p" else name: given for name, given in options.items()}
    return SDPAParams(*inputs, **fields, scale=inputs[0].shape[-1] ** -0.5)


def lse_shape(params: SDPAParams) -> tuple[int, ...]:
    shape = params.query.shape[:-1]
    return tuple(shape) if params.cu_seq_q is None else (shape[1], shape[0])
