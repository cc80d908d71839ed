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
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnplug
import foreign_cudnn
from attnplug import SDPAParams
from attnplug._api import dense
from attnplug._call import device as gpu
from attnplug.builtin import aten_flash, faults, gpus, torch_sdpa
from attnplug.testing import Call, assert_right, check_impl
from wrong_calls import BAD, PLAIN, OperatorCalls, assert_fits, faked, params_of

attend = attnplug.scaled_dot_product_attention


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", BAD)
def test_torch_on_cuda_gets_a_form_that_its_kernels_take(name: str, dtype: str, on_cuda: list[tuple[Any, ...]]) -> None:
    mode = FakeTensorMode()
    params = faked(params_of(BAD[name].but(dtype=dtype)), mode)
    assert not torch_sdpa.supports(params)
    with mode, torch.no_grad():
        torch_sdpa.forward(params)
    assert_fits(on_cuda[0])


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


PREPARED: dict[str, tuple[Call, float]] = {
    "plain": (PLAIN, 0.0),
    "causal": (PLAIN.but(is_causal=True), 0.0),
    "scaled": (PLAIN.but(scale=0.3), 0.0),
    "dropout": (PLAIN, 0.3),
    "a mask": (PLAIN.but(mask="additive"), 0.0),
    "a boolean mask": (PLAIN.but(mask="boolean"), 0.0),
}


@pytest.mark.parametrize(
    ("kernel", "name"),
    [*((torch_sdpa, name) for name in PREPARED), *((aten_flash, name) for name in PREPARED if "mask" not in name)],
    ids=lambda value: value if isinstance(value, str) else value.__name__.rpartition(".")[2],
)
def test_what_is_prepared_for_cuda_gives_pytorch_what_forward_gives_it(
    name: str, kernel: Any, on_cuda: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, dropout = PREPARED[name]
    mode, calls = FakeTensorMode(), OperatorCalls()
    params = faked(params_of(call.but(dtype="float16"), dropout=dropout), mode)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda tensor: tensor.storage_offset() * tensor.element_size())
    tensors = (params.query, params.key, params.value, params.attn_mask)
    given = on_cuda if kernel is torch_sdpa else calls.given
    with mode:
        memory = torch.empty(params.query.numel() + 1, dtype=torch.float16, device="cuda")
        shifted = memory.narrow(0, 1, params.query.numel()).view(params.query.shape)
    with mode, torch.no_grad(), calls:
        run = kernel.prepare(params)
        kernel.forward(params)
        assert run(*tensors) is not None
        assert run(shifted, *tensors[1:]) is None
    first, second = ((*one, *(None, 0.0, False)[len(one) - 4 :]) if len(one) < 7 else one for one in given)
    assert all(map(operator.is_, first[:4], tensors)) and all(map(operator.is_, second[:4], tensors))
    assert first[4:] == second[4:] == (dropout, params.is_causal, params.scale)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", BAD)
def test_nothing_is_prepared_for_what_pytorch_gets_wrong_on_cuda(name: str, dtype: str) -> None:
    params = faked(params_of(BAD[name].but(dtype=dtype)), FakeTensorMode())
    assert torch_sdpa.prepare(params) is None
    assert params.attn_mask is not None or aten_flash.prepare(params) is None


def test_what_was_prepared_for_flash_attention_does_not_run_where_that_is_switched_off(
    on_cuda: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next kernel reads beyond heads that share their keys."""
    gpu_and_cudnn(monkeypatch, (8, 0), None)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda tensor: 0)
    with FakeTensorMode():
        query, one = torch.empty(1, 4, 33, 16, dtype=torch.float16, device="cuda"), torch.empty(1, 1, 33, 16)
        key = one.to(query).expand(1, 4, 33, 16)
        run = torch_sdpa.prepare(SDPAParams(query, key, key, scale=0.25))
        assert run is not None and run(query, key, key) is not None
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            assert run(query, key, key) is None
            assert torch_sdpa.prepare(SDPAParams(query, key, key, scale=0.25)) is None


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


@pytest.mark.parametrize("wanted", ["query", "key", "value", None])
def test_the_gradient_of_a_mask_alone_is_declined_on_cuda(wanted: str | None) -> None:
    params, mode = params_of(PLAIN.but(mask="additive")), FakeTensorMode()
    on_cpu, on_cuda = params, faked(params, mode)
    for params in (on_cpu, on_cuda):
        assert params.attn_mask is not None
        params.attn_mask.requires_grad_()
        if wanted is not None:
            getattr(params, wanted).requires_grad_()
    assert not torch_sdpa.supports(on_cpu)
    with torch.no_grad():
        assert not torch_sdpa.supports(on_cuda)
    reasons = torch_sdpa.supports(on_cuda)
    assert not reasons if wanted else "if attn_mask alone requires a gradient" in reasons[0]


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
        if fault.rewrite is not None and fault.concerns(params):
            params = fault.rewrite(params)
    assert_fits((params.query, params.key, params.value, params.attn_mask, 0.0, params.is_causal, params.scale))
    out, _ = torch_sdpa.forward(params)
    assert_right({**inputs.arguments, "scale": params_of(call).scale}, out)


def gpu_and_cudnn(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], version: int | None) -> None:
    monkeypatch.setattr(gpus, "compute_capability", lambda device: capability)
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


def test_a_cudnn_that_pytorch_complains_of_is_known_by_its_version(
    on_cuda: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_and_cudnn(monkeypatch, (9, 0), None)
    foreign_cudnn.install(monkeypatch)
    assert given_on_cuda(LOST, on_cuda)[1].shape[-2] == 200


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
            monkeypatch.setattr(dense, "cudnn_errs", lambda index, answer=errs: (answer, False, False))
            attend(query, key, key, impl=impl)
            assert (len(straight), len(on_cuda)) == expected
    assert on_cuda[0][0].shape[-2] == 2


SHARED = PLAIN.but(heads=4, layout="transposed")
"""A call whose heads share their keys once these are expanded."""


def shared_on_cuda(call: Call, on_cuda: list[tuple[Any, ...]], requires_grad: bool = False) -> tuple[Any, ...]:
    """Return what reaches PyTorch's function on a CUDA device where heads share keys by a stride of 0."""
    mode = FakeTensorMode()
    params = faked(params_of(call), mode)
    with mode:
        key, value = (tensor.narrow(1, 0, 1).expand_as(tensor) for tensor in (params.key, params.value))
        query = params.query.requires_grad_(requires_grad)
        torch_sdpa.forward(dataclasses.replace(params, query=query, key=key, value=value))
    return on_cuda.pop()


@pytest.mark.parametrize("queries", [1, 33, 65])
@pytest.mark.parametrize(("mask", "mask_dims"), [("", "bhqk"), ("boolean", "bhqk"), ("additive", "b11k")])
def test_no_query_is_left_over_where_heads_share_their_keys(
    queries: int, mask: str, mask_dims: str, on_cuda: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_and_cudnn(monkeypatch, (8, 0), None)
    call = SHARED.but(queries=queries, mask=mask, mask_dims=mask_dims)
    query, _, _, given_mask, *_ = shared_on_cuda(call, on_cuda)
    assert query.shape[-2] == queries + 1
    assert given_mask is None or given_mask.shape[-2] == queries + 1
    assert shared_on_cuda(call.but(queries=queries + 1), on_cuda)[0].shape[-2] == queries + 1
    assert shared_on_cuda(call, on_cuda, requires_grad=True)[0].shape[-2] == queries
    assert given_on_cuda(call, on_cuda, requires_grad=False)[0].shape[-2] == queries
    for_flash = shared_on_cuda(call.but(dtype="float16"), on_cuda)[0].shape[-2]
    assert for_flash == (queries if not mask else queries + 1)


@pytest.mark.parametrize("mask", ["", "additive"])
def test_gradients_of_single_queries_do_not_reach_cudnn_on_hopper(
    mask: str, on_cuda: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(call: Call) -> tuple[Any, ...]:
        mode = FakeTensorMode()
        params = faked(params_of(call), mode)
        with mode, torch.no_grad():  # no autograd of CUDA tensors without a driver
            torch_sdpa.forward(params)
        return on_cuda.pop()

    call = PLAIN.but(queries=1, keys=128, dtype="bfloat16", mask=mask)
    gpu_and_cudnn(monkeypatch, (9, 0), 92600)
    assert given(call)[0].dim() == 4
    monkeypatch.setattr(SDPAParams, "needs_grad", True)
    query, key, _, given_mask, *_ = given(call)
    assert query.dim() == key.dim() == 5 and (given_mask is None or given_mask.dim() == 5)
    assert given(call.but(queries=2))[0].dim() == given(call.but(dtype="float32"))[0].dim() == 4
    gpu_and_cudnn(monkeypatch, (8, 0), 92600)
    assert given(call)[0].dim() == 4


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
@pytest.mark.parametrize("dropout", [0.25, 0.5, 0.9375])
def test_dropout_is_kept_from_cudnn(
    capability: tuple[int, int], dropout: float, on_cuda: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_and_cudnn(monkeypatch, capability, 91900)
    mode = FakeTensorMode()
    params = faked(params_of(PLAIN.but(dtype="float16"), dropout=dropout), mode)
    monkeypatch.setattr(faults, "RELEASE", (2, 12))
    assert attnplug.can_use_impl("torch", params)
    for given, changed in ((dropout, True), (0.1, False)):
        with mode, torch.no_grad():
            torch_sdpa.forward(dataclasses.replace(params, dropout=given))
        reached = on_cuda.pop()[4]
        assert (reached * 16 != math.floor(reached * 16)) and (reached != given) is changed
        assert torch.tensor(reached, dtype=torch.float32) == torch.tensor(given, dtype=torch.float32)
    monkeypatch.setattr(faults, "RELEASE", (2, 11))
    (reason,) = attnplug.can_use_impl("torch", params).reasons
    assert "gives queries the same dropout mask" in reason
    assert attnplug.can_use_impl("torch", dataclasses.replace(params, dropout=0.0))
    gpu_and_cudnn(monkeypatch, (8, 0), 91900)
    assert attnplug.can_use_impl("torch", params)


def test_the_kit_says_declined_of_dropout_that_cannot_be_kept_from_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_and_cudnn(monkeypatch, (9, 0), 91900)
    for release, status in (((2, 11), "declined"), ((2, 12), "passed")):
        monkeypatch.setattr(faults, "RELEASE", release)
        report = check_impl("torch", device="cpu", level="full", checks=["check_dropout_of_everything"])
        found = {result.dtype: result.status for result in report.results}
        assert found == {"float32": "passed", "float16": status, "bfloat16": status, "float64": "passed"}


@pytest.mark.parametrize("impl", [None, "torch"])
def test_what_torch_rewrites_does_not_go_straight_to_pytorch(
    impl: str | None, on_cuda: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight: list[Tensor] = []
    gpu_and_cudnn(monkeypatch, (9, 0), 92600)
    monkeypatch.setattr(faults, "RELEASE", (2, 12))
    monkeypatch.setattr(torch_sdpa, "OF_SDPA", faults.Faults())  # no autograd of CUDA tensors without a driver
    monkeypatch.setattr(dense, "cudnn_errs", lambda index: (False, True, True))
    monkeypatch.setattr(dense, "_torch_sdpa", lambda query, *others: straight.append(query) or query)
    with FakeTensorMode():
        one, query = (torch.empty(1, 2, length, 64, device="cuda", dtype=torch.bfloat16) for length in (1, 64))
        shared = query.narrow(1, 0, 1).expand_as(query)
        attend(query, query, query, impl=impl)
        attend(one, query, query, impl=impl)
        assert (len(straight), len(on_cuda)) == (2, 0)
        attend(one.clone().requires_grad_(), query, query, impl=impl)
        attend(query, query, query, dropout_p=0.25, impl=impl)
        attend(one, shared, shared, impl=impl)
        long = torch.empty(1, 2, 2**17, 64, device="cuda", dtype=torch.bfloat16)
        attend(long, query, query, impl=impl)
        attend(long.requires_grad_(), query, query, impl=impl)
        assert (len(straight), len(on_cuda)) == (3, 4)
        narrow = torch.empty(1, 2, 64, 4, device="cuda", dtype=torch.bfloat16)
        attend(narrow.clone().requires_grad_(), narrow, narrow, impl=impl)
        assert (len(straight), len(on_cuda)) == (3, 5)
        fits = torch.compile(dense._fit_cuda, backend="eager", fullgraph=True)
        assert [fits(each, query, query, 0.0) for each in (long, long.detach(), query)] == [False, True, True]


@pytest.mark.parametrize("size", [8, 32, 40, 64, 96, 256])
def test_what_the_short_ways_take_without_counting_is_never_too_much(size: int) -> None:
    assert dense.LARGE == aten_flash.SMALL
    single_queries = torch.empty((dense.LARGE - 1) // size, 1, 1, size, device="meta")
    assert not gpus.counts_too_far(single_queries)
    assert gpus.counts_too_far(torch.empty(2**19 + 1, 1, 1, size, device="meta"))


@pytest.mark.parametrize("impl", [None, "torch"])
def test_dropout_goes_straight_to_pytorch_where_no_cudnn_is_preferred(
    impl: str | None, on_cuda: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight: list[Tensor] = []
    monkeypatch.setattr(dense, "_torch_sdpa", lambda query, *others: straight.append(query) or query)
    monkeypatch.setattr(gpu, "_cudnn_errs", {})
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    with FakeTensorMode(), torch.no_grad():
        query, long = (torch.empty(2, 2, length, 64, device="cuda") for length in (64, 40000))
        for capability, expected in (((8, 0), (1, 0)), ((12, 0), (2, 0)), ((9, 0), (2, 1)), ((10, 0), (2, 2))):
            gpu._cudnn_errs.clear()
            monkeypatch.setattr(gpu, "compute_capability", lambda device, answer=capability: answer)
            attend(query, query, query, dropout_p=0.25, impl=impl)
            assert (len(straight), len(on_cuda)) == expected
        gpu._cudnn_errs[0] = False, False, False
        attend(long, long, long, dropout_p=0.25, impl=impl)
    assert len(straight) == 2 and len(on_cuda) > 3  # too many draws


def test_values_of_zero_give_zero_and_gradients_of_zero_whatever_the_values_were() -> None:
    leaves = [torch.randn(1, 2, 4, 8).requires_grad_() for _ in range(3)]
    with torch.no_grad():
        leaves[2][0, 0, 0, 0] = math.inf
    (fault,) = (each for each in torch_sdpa.OF_SDPA.all if each.concerns(SDPAParams(*leaves, dropout=1.0)))
    assert fault.rewrite is not None
    out, _ = torch_sdpa.forward(fault.rewrite(SDPAParams(*leaves, dropout=1.0, scale=0.3)))
    grads = torch.autograd.grad(out, leaves, torch.randn_like(out))
    assert all(bool((tensor == 0).all()) for tensor in (out, *grads))


def test_every_fault_says_where_it_was_seen() -> None:
    for fault in (*torch_sdpa.OF_SDPA.all, *aten_flash.OF_FLASH.all):
        assert fault.says.startswith("PyTorch")
        assert "2." in fault.seen
        assert fault.device in (None, "cpu", "cuda")


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
