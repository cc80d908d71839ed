"""What PyTorch gets wrong is never given to it: rewritten with the same result, or declined with the reason."""

from __future__ import annotations

import math
import operator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import attnplug
from attnplug import SDPAParams
from attnplug.builtin import aten_flash, torch_sdpa
from attnplug.testing import Call, assert_right

attend = attnplug.scaled_dot_product_attention


PLAIN = Call(batch=2, heads=2, queries=16, keys=24, head_size=16)
BAD = {
    "misaligned": PLAIN.but(layout="misaligned"),
    "rows between": PLAIN.but(layout="framed"),
    "strided": PLAIN.but(layout="strided"),
    "a misaligned mask": PLAIN.but(mask="additive", mask_layout="misaligned"),
    "misaligned with a mask": PLAIN.but(layout="misaligned", mask="additive"),
    "a mask with one column": PLAIN.but(mask="additive", mask_dims="bhq1"),
    "a boolean mask with one column": PLAIN.but(mask="boolean", mask_dims="bhq1"),
    "a strided mask": PLAIN.but(mask="additive", mask_layout="strided"),
    "a column-major mask": PLAIN.but(mask="additive", mask_layout="column-major"),
    "a mask of one dimension": PLAIN.but(mask="additive", mask_dims="k"),
    "a negative scale under a causal mask": PLAIN.but(is_causal=True, scale=-0.3),
    "a scale of zero under a causal mask": PLAIN.but(is_causal=True, scale=0.0),
}


def params_of(call: Call, **changes: Any) -> SDPAParams:
    params = call.params(call.make())
    fields = {name: getattr(params, name) for name in ("query", "key", "value", "attn_mask")}
    fields |= {"dropout": params.dropout, "is_causal": params.is_causal, "scale": params.scale or 0.25} | changes
    return SDPAParams(**fields)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Let `torch` be called with fake CUDA tensors; what reaches PyTorch's function is collected."""
    given: list[tuple[Any, ...]] = []

    def sdpa(*arguments: Any, scale: float, enable_gqa: bool) -> Tensor:
        given.append((*arguments, scale))
        return arguments[0]

    monkeypatch.setattr(torch_sdpa, "sdpa", sdpa)
    return given


def faked(params: SDPAParams, mode: FakeTensorMode) -> SDPAParams:
    """Return the call with fake CUDA tensors that lie in memory as the real ones do."""

    def fake(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        memory = torch.empty(elements, dtype=tensor.dtype, device="cuda")
        return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    with mode, torch.no_grad():
        tensors = {name: fake(getattr(params, name)) for name in ("query", "key", "value", "attn_mask")}
    return SDPAParams(**tensors, dropout=params.dropout, is_causal=params.is_causal, scale=params.scale)


def assert_fits(given: tuple[Any, ...]) -> None:
    """Assert that PyTorch's CUDA kernels take this, by what they are known to need."""
    query, key, value, mask, dropout, is_causal, scale = given
    for tensor in (query, key, value):
        size = tensor.element_size()
        assert tensor.storage_offset() * size % 16 == 0 and tensor.stride(-1) == 1
        assert all(stride * size % 16 == 0 for stride in tensor.stride()[:-1])
    if mask is not None:
        assert mask.dim() > 1 and mask.shape[-1] == key.shape[-2] and mask.stride(-1) == 1
        assert mask.storage_offset() * mask.element_size() % 16 == 0
    assert dropout < 1
    assert scale > 0 or not is_causal


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", BAD)
def test_torch_on_cuda_gets_a_form_that_its_kernels_take(name: str, dtype: str, on_cuda: list[tuple[Any, ...]]) -> None:
    mode = FakeTensorMode()
    params = faked(params_of(BAD[name].but(dtype=dtype)), mode)
    assert not torch_sdpa.supports(params)
    with mode, torch.no_grad():
        torch_sdpa.forward(params)
    assert_fits(on_cuda[0])


class OperatorCalls(TorchDispatchMode):
    """Collects with what PyTorch's operator of FlashAttention-2 is called."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._scaled_dot_product_flash_attention.default:
            options = kwargs or {}
            dropout, is_causal, *_ = (*args[3:], *(0.0, False)[len(args) - 3 :])
            self.given.append((*args[:3], None, dropout, is_causal, options["scale"]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["plain", *(name for name, call in BAD.items() if not call.mask), "dropout"])
def test_aten_flash_on_cuda_takes_the_short_way_with_what_its_kernel_takes(name: str) -> None:
    call = BAD.get(name, PLAIN).but(dtype="float16")
    mode, calls = FakeTensorMode(), OperatorCalls()
    params = faked(params_of(call, dropout=1.0 if name == "dropout" else 0.0), mode)
    tensors = params.query, params.key, params.value
    with torch.no_grad(), mode, calls:
        out, lse = aten_flash.plain(*tensors, None, params.dropout, params.is_causal, params.scale, False)
    assert out.shape == params.query.shape and lse.shape == params.query.shape[:-1]
    assert_fits(calls.given[0])
    assert name != "plain" or all(map(operator.is_, calls.given[0], tensors))


def test_everything_dropped_becomes_values_of_zero_on_cuda(on_cuda: list[tuple[Any, ...]]) -> None:
    mode = FakeTensorMode()
    params = faked(params_of(PLAIN, dropout=1.0), mode)
    with mode, torch.no_grad():
        torch_sdpa.forward(params)
    assert on_cuda[0][4] == 0.0
    assert on_cuda[0][2] is not params.value


def test_a_plain_call_reaches_pytorch_as_it_is(on_cuda: list[tuple[Any, ...]]) -> None:
    for call in (PLAIN, PLAIN.but(mask="additive"), PLAIN.but(mask="boolean"), PLAIN.but(layout="transposed")):
        for device in ("cpu", "cuda"):
            params = params_of(call)
            mode = FakeTensorMode()
            params = params if device == "cpu" else faked(params, mode)
            with mode, torch.no_grad():
                torch_sdpa.forward(params)
            query, key, value, mask, *_ = on_cuda.pop()
            assert query is params.query and key is params.key and value is params.value and mask is params.attn_mask


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_masks_of_half_queries_are_declined_on_cuda_with_pytorch_s_fault(dtype: str) -> None:
    params = params_of(PLAIN.but(dtype=dtype, mask="additive", mask_dtype="float32"))
    assert not torch_sdpa.supports(params)
    (reason,) = torch_sdpa.supports(faked(params, FakeTensorMode()))
    assert reason == (
        "PyTorch reads a float32 attn_mask of half-precision queries as half precision, and gives NaN "
        "(seen in PyTorch 2.11.0, CUDA 13.0, cuDNN 9.19)"
    )


@pytest.mark.parametrize("name", BAD)
def test_what_is_rewritten_for_cuda_means_the_same(name: str) -> None:
    """Every way round is taken on the CPU, where the result can be held against the formulas."""
    call = BAD[name]
    inputs = call.make()
    params = params_of(call)
    for fault in torch_sdpa.OF_SDPA.all:
        if fault.mend is not None and fault.concerns(params):
            params = fault.mend(params)
    assert_fits((params.query, params.key, params.value, params.attn_mask, 0.0, params.is_causal, params.scale))
    out, _ = torch_sdpa.forward(params)
    assert_right({**inputs.arguments, "scale": call.scale or 0.25}, out)


def test_values_of_zero_give_zero_and_gradients_of_zero_whatever_the_values_were() -> None:
    leaves = [torch.randn(1, 2, 4, 8).requires_grad_() for _ in range(3)]
    with torch.no_grad():
        leaves[2][0, 0, 0, 0] = math.inf
    (fault,) = (each for each in torch_sdpa.OF_SDPA.all if each.concerns(SDPAParams(*leaves, dropout=1.0)))
    assert fault.mend is not None
    out, _ = torch_sdpa.forward(fault.mend(SDPAParams(*leaves, dropout=1.0, scale=0.3)))
    grads = torch.autograd.grad(out, leaves, torch.randn_like(out))
    assert all(bool((tensor == 0).all()) for tensor in (out, *grads))


def test_every_fault_says_where_it_was_seen() -> None:
    for fault in (*torch_sdpa.OF_SDPA.all, *aten_flash.OF_FLASH.all):
        assert fault.says.startswith("PyTorch")
        assert "2." in fault.seen
        assert fault.device in (None, "cuda")


@pytest.mark.parametrize("scale", [-0.3, 0.0, -1])
@pytest.mark.parametrize("impl", [None, "torch", "aten_flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scales_of_zero_and_below_under_a_causal_mask_are_right(
    impl: str | None, scale: float, dtype: torch.dtype
) -> None:
    query, key, value = (torch.randn(1, 2, 9, 16).to(dtype).requires_grad_() for _ in range(3))
    out = attend(query, key, value, is_causal=True, scale=scale, impl=impl)
    grad = torch.randn_like(out)
    gradients = dict(zip(("query", "key", "value"), torch.autograd.grad(out, (query, key, value), grad), strict=True))
    arguments = dict(query=query, key=key, value=value, is_causal=True, scale=float(scale))
    assert_right(arguments, out.detach(), gradients=gradients, grad_out=grad)


@pytest.mark.parametrize("impl", [None, "torch", "aten_flash"])
def test_a_decision_that_is_kept_for_one_scale_serves_the_others(impl: str | None) -> None:
    query, key, value = (torch.randn(1, 2, 9, 16) for _ in range(3))
    for scale in (None, 0.3, -0.3, 0.0, 0.3):
        with attnplug.record() as calls:  # whose routes are the kept ones
            out = attend(query, key, value, is_causal=True, scale=scale, impl=impl)
        assert len(calls) == 1
        assert_right(dict(query=query, key=key, value=value, is_causal=True, scale=scale), out)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", [None, "torch", "aten_flash"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", BAD)
def test_calls_that_pytorch_gets_wrong_are_right_on_cuda(impl: str | None, dtype: str, name: str) -> None:
    call = BAD[name].but(dtype=dtype, device="cuda", gradients=("query", "key", "value"))
    inputs = call.make()
    if impl is not None and not (verdict := attnplug.can_use_impl(impl, call.params(inputs))):
        pytest.skip("; ".join(verdict.reasons))
    arguments, leaves = call.with_leaves(inputs)
    out = attend(**arguments, impl=impl)
    gradients = call.backward(inputs, out, None, leaves)
    assert_right(inputs.arguments, out.detach(), gradients=gradients, grad_out=inputs.grad_out)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", [None, "torch", "aten_flash"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dropout_of_everything_is_zero_on_cuda(impl: str | None, dtype: torch.dtype) -> None:
    leaves = [torch.randn(1, 2, 16, 64, device="cuda", dtype=dtype).requires_grad_() for _ in range(3)]
    if impl is not None and not (verdict := attnplug.can_use_impl(impl, SDPAParams(*leaves, dropout=1.0))):
        pytest.skip("; ".join(verdict.reasons))
    out = attend(*leaves, dropout_p=1.0, impl=impl)
    for tensor in (out, *torch.autograd.grad(out, leaves, torch.randn_like(out))):
        assert bool((tensor == 0).all())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_float32_mask_of_half_queries_is_right_on_cuda(dtype: str) -> None:
    call = PLAIN.but(dtype=dtype, device="cuda", mask="additive", mask_dtype="float32")
    inputs = call.make()
    assert_right(inputs.arguments, attend(**inputs.arguments))
    with pytest.raises(attnplug.NoImplementationError, match="reads a float32 attn_mask"):
        attend(**inputs.arguments, impl="torch")
