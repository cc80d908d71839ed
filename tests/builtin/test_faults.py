"""What PyTorch gets wrong is never given to it: rewritten with the same result, or declined with the reason.

That a call goes straight to PyTorch's function shows only on a GPU that errs, so one test spies on it in `_api.dense`.
"""

from __future__ import annotations

import dataclasses
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
from attnplug._api import dense
from attnplug.builtin import aten_flash, faults, torch_sdpa
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


def gpu_and_cudnn(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], version: int | None) -> None:
    monkeypatch.setattr(faults, "compute_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)


def given_on_cuda(call: Call, on_cuda: list[tuple[Any, ...]], requires_grad: bool = True) -> tuple[Any, ...]:
    """Return what reaches PyTorch's function of a call on a CUDA device."""
    params, mode = params_of(call), FakeTensorMode()
    params = faked(params, mode)
    with mode:
        torch_sdpa.forward(dataclasses.replace(params, query=params.query.requires_grad_(requires_grad)))
    return on_cuda.pop()


LOST = PLAIN.but(keys=192, mask="boolean", dtype="bfloat16")
"""A call whose gradient is NaN with the cuDNN that PyTorch prefers on Hopper."""


@pytest.mark.parametrize("mask", ["boolean", "additive"])
@pytest.mark.parametrize("mask_dims", ["bhqk", "11qk", "b11k", "bhq1"])
def test_no_gradient_of_a_mask_and_64_keys_more_than_a_multiple_of_128_reaches_cudnn_on_hopper(
    mask: str, mask_dims: str, on_cuda: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_and_cudnn(monkeypatch, (9, 0), 91900)
    query, key, value, given_mask, *rest = given_on_cuda(LOST.but(mask=mask, mask_dims=mask_dims), on_cuda)
    assert_fits((query, key, value, given_mask, *rest))
    assert key.shape[-2] == value.shape[-2] == given_mask.shape[-1] == 200


@pytest.mark.parametrize(
    ("call", "capability", "version", "requires_grad"),
    [
        (LOST, (9, 0), 92600, True),
        (LOST, (8, 0), 91900, True),
        (LOST, (9, 0), 91900, False),
        (LOST, (9, 0), None, True),
        (LOST.but(keys=256), (9, 0), 91900, True),
        (LOST.but(mask=""), (9, 0), 91900, True),
    ],
    ids=["a later cuDNN", "another GPU", "no gradient", "no cuDNN", "other keys", "no mask"],
)
def test_others_keep_their_keys(
    call: Call,
    capability: tuple[int, int],
    version: int | None,
    requires_grad: bool,
    on_cuda: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu_and_cudnn(monkeypatch, capability, version)
    assert given_on_cuda(call, on_cuda, requires_grad)[1].shape[-2] == call.keys


@pytest.mark.parametrize("call", [PLAIN.but(queries=1), PLAIN.but(queries=1, mask="additive", mask_dims="b1qk")])
def test_single_queries_are_given_twice_where_cudnn_gets_them_wrong(
    call: Call, on_cuda: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = call.but(dtype="bfloat16")
    for capability, version, queries in (((10, 0), 91900, 2), ((11, 0), 92500, 2), ((10, 0), 92501, 1)):
        gpu_and_cudnn(monkeypatch, capability, version)
        query, _, _, mask, *_ = given_on_cuda(call, on_cuda, requires_grad=False)
        assert query.shape[-2] == queries and (mask is None or mask.shape[-2] == queries)
    gpu_and_cudnn(monkeypatch, (10, 0), 92401)
    assert given_on_cuda(call, on_cuda, requires_grad=False)[0].shape[-2] == 1


@pytest.mark.parametrize("impl", [None, "torch"])
def test_single_queries_of_blackwell_do_not_go_straight_to_pytorch(
    impl: str | None, on_cuda: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight: list[Tensor] = []
    gpu_and_cudnn(monkeypatch, (10, 0), 91900)
    monkeypatch.setattr(dense, "_torch_sdpa", lambda query, *others: straight.append(query) or query)
    with FakeTensorMode():
        query, key = (torch.empty(1, 2, length, 64, device="cuda", dtype=torch.bfloat16) for length in (1, 64))
        for errs, expected in ((False, (1, 0)), (True, (1, 1))):
            monkeypatch.setattr(dense, "errs_in_decoding", lambda index, answer=errs: answer)
            attend(query, key, key, impl=impl)
            assert (len(straight), len(on_cuda)) == expected
    assert on_cuda[0][0].shape[-2] == 2


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", ["", "boolean", "additive"])
@pytest.mark.parametrize("queries", [1, 5])
def test_keys_and_a_query_that_are_added_change_nothing(
    queries: int, mask: str, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = PLAIN.but(queries=queries, keys=64, mask=mask, is_causal=is_causal and not mask, dtype="bfloat16")
    call = call.but(gradients=("query", "key", "value"))
    inputs = call.make()
    arguments, leaves = call.with_leaves(inputs)
    added = [each for each in torch_sdpa.OF_SDPA.all if each.seen.partition(", ")[2].startswith("cuDNN")]
    everywhere = [dataclasses.replace(each, device=None) for each in added]
    monkeypatch.setattr(faults, "_cudnn_on", lambda device: ((9, 0) if queries > 1 else (10, 0), 91900))
    monkeypatch.setattr(torch_sdpa, "OF_SDPA", faults.Faults(*everywhere))
    params = SDPAParams(**{"scale": 0.25, **{name: given for name, given in arguments.items() if name != "dropout_p"}})
    assert len(everywhere) == 2
    assert any(each.concerns(params) for each in everywhere) is (queries == 1 or mask != "")
    out, _ = torch_sdpa.forward(params)
    gradients = call.backward(inputs, out, None, leaves)
    assert_right({**inputs.arguments, "scale": 0.25}, out.detach(), gradients=gradients, grad_out=inputs.grad_out)


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
@pytest.mark.parametrize("impl", [None, "torch", "cudnn"])
@pytest.mark.parametrize("keys", [64, 704])
def test_gradients_of_logits_far_below_zero_are_finite_on_cuda(impl: str | None, keys: int) -> None:
    query, key, value = torch.randn(3, 1, 1, keys, 64, device="cuda", dtype=torch.bfloat16) * 0.1
    query[..., 0], key[..., 0] = 1.0, -120 * math.sqrt(64)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    mask = torch.ones(keys, keys, dtype=torch.bool, device="cuda").tril()
    if impl is not None and not (verdict := attnplug.can_use_impl(impl, SDPAParams(*leaves, attn_mask=mask))):
        pytest.skip("; ".join(verdict.reasons))
    out = attend(*leaves, attn_mask=mask, impl=impl)
    assert all(bool(grad.isfinite().all()) for grad in torch.autograd.grad(out, leaves, torch.randn_like(out)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_float32_mask_of_half_queries_is_right_on_cuda(dtype: str) -> None:
    call = PLAIN.but(dtype=dtype, device="cuda", mask="additive", mask_dtype="float32")
    inputs = call.make()
    assert_right(inputs.arguments, attend(**inputs.arguments))
    with pytest.raises(attnplug.NoImplementationError, match="reads a float32 attn_mask"):
        attend(**inputs.arguments, impl="torch")
