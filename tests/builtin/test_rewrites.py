"""What PyTorch is given instead of a call means the same, is small enough, and can be traced."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from attnplug import SDPAParams
from attnplug.builtin import aten_flash, faults, gpus, rewrites, torch_sdpa
from attnplug.testing import Call, assert_right
from wrong_calls import PLAIN, OperatorCalls


def large(mask_rows: int = 0, *, dropout: float = 0.0, shape: tuple[int, ...] = (1, 1, 70000, 8)) -> SDPAParams:
    query = torch.empty(shape, device="cuda")
    mask = torch.empty(mask_rows, shape[-2], device="cuda", dtype=torch.bool) if mask_rows else None
    return SDPAParams(query, query, query, mask, dropout, scale=0.25)


def test_masks_of_more_than_2_32_numbers_reach_pytorch_in_parts(
    on_cuda: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for release, rows, lengths in (((2, 12), 70000, [35000, 35000]), ((2, 13), 70000, [70000]), ((2, 12), 1, [70000])):
        monkeypatch.setattr(faults, "RELEASE", release)
        with FakeTensorMode(), torch.no_grad():
            out, _ = torch_sdpa.forward(large(rows))
        assert out.shape[-2] == 70000
        assert [query.shape[-2] for query, *_ in on_cuda] == lengths
        assert [given[3].shape[-2] for given in on_cuda] == [min(rows, length) for length in lengths]
        on_cuda.clear()


def test_more_than_2_31_draws_reach_pytorch_in_parts(on_cuda: list[tuple[Any, ...]]) -> None:
    for shape, kv_heads in (
        ((4, 16, 8192, 8), 16),
        ((1, 3, 30000, 8), 3),
        ((2, 1, 50000, 8), 1),
        ((1, 1, 50000, 8), 1),
        ((1, 4, 30000, 8), 1),
        ((1, 6, 30000, 8), 3),
    ):
        with FakeTensorMode(), torch.no_grad():
            params = large(dropout=0.1, shape=shape)
            key = params.key.narrow(1, 0, kv_heads).clone()
            out, _ = torch_sdpa.forward(dataclasses.replace(params, key=key, value=key, enable_gqa=True))
        assert out.shape == shape
        assert len(on_cuda) > 1
        for query, key, *_ in on_cuda:
            assert query.dim() == 4 and query.select(-1, 0).numel() * key.shape[-2] < 2**31
            assert query.shape[1] % key.shape[1] == 0
        on_cuda.clear()


def test_draws_of_one_causal_head_are_left_to_pytorch_s_formula(on_cuda: list[tuple[Any, ...]]) -> None:
    with FakeTensorMode(), torch.no_grad():
        out, _ = torch_sdpa.forward(dataclasses.replace(large(dropout=0.1), is_causal=True))
    assert out.shape == (1, 1, 70000, 8)
    assert [query.dim() for query, *_ in on_cuda] == [5]


@pytest.mark.parametrize(
    ("capability", "enabled", "size", "in_parts"),
    [
        ((8, 0), True, 64, False),
        ((7, 5), True, 64, True),
        ((8, 0), False, 64, True),
        ((8, 6), True, 208, True),
        ((8, 0), True, 208, False),
        ((8, 6), True, 256, True),
        ((8, 6), True, 192, False),
    ],
)
def test_draws_reach_flash_attention_whole_where_pytorch_has_it(
    capability: tuple[int, int],
    enabled: bool,
    size: int,
    in_parts: bool,
    on_cuda: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpus, "compute_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: enabled)
    monkeypatch.setattr(SDPAParams, "needs_grad", True)
    with FakeTensorMode(), torch.no_grad():
        query = torch.empty(1, 2, 40000, size, device="cuda", dtype=torch.half)
        torch_sdpa.forward(SDPAParams(query, query, query, dropout=0.1, scale=0.25))
    assert (len(on_cuda) > 1) is in_parts


def test_a_backward_of_more_than_2_31_numbers_is_computed_in_parts(
    on_cuda: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SDPAParams, "needs_grad", True)  # without a driver there is no autograd of CUDA tensors
    for shape, count in (
        ((400, 4, 10496, 128), 2),
        ((400, 4, 10368, 128), 1),
        ((2**15, 16, 100, 16), 1),
        ((2**15, 20, 100, 16), 2),
        ((1, 1, 2**24 + 1, 128), 2),
    ):
        with FakeTensorMode(), torch.no_grad(), OperatorCalls() as calls:
            query, key = (
                torch.empty(*shape[:2], length, shape[3], device="cuda", dtype=torch.half) for length in (shape[2], 128)
            )
            params = SDPAParams(query, key, key, scale=0.25, return_lse=True)
            out, _ = torch_sdpa.forward(params)
            flash, lse = aten_flash.forward(params)
            aten_flash.plain(query, key, key, None, 0.0, False, 0.25, False)
        assert out.shape == flash.shape == shape and lse.shape == shape[:-1]
        assert len(on_cuda) == count and len(calls.given) == 2 * count
        assert sum(given[0].shape[:-1].numel() for given in on_cuda) == out.shape[:-1].numel()
        on_cuda.clear()


def test_a_causal_backward_of_aten_flash_is_computed_in_parts_with_more_queries_than_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SDPAParams, "needs_grad", True)
    with FakeTensorMode(), torch.no_grad(), OperatorCalls() as calls:
        query, key = (torch.empty(400, 4, length, 128, device="cuda", dtype=torch.half) for length in (10496, 128))
        aten_flash.forward(SDPAParams(query, key, key, is_causal=True, scale=0.25))
    assert len(calls.given) == 2


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "is_causal"),
    [(3, 2, 2, True), (1, 4, 1, True), (1, 6, 3, True), (1, 1, 1, False), (1, 1, 1, True)],
)
def test_the_partial_backward_in_parts_is_the_whole(
    batch: int, heads: int, kv_heads: int, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, grad_out = (torch.randn(batch, heads, 5, 8) for _ in range(2))
    key, value = (torch.randn(batch, kv_heads, 5, 8) for _ in range(2))
    params = SDPAParams(query, key, value, None, 0.0, is_causal, True, scale=0.3, return_lse=True)
    out, lse = aten_flash.forward(params)
    whole = aten_flash.partial_backward(params, grad_out, out, lse)
    asked: list[bool] = []
    monkeypatch.setattr(aten_flash, "counts_too_far", lambda query: asked.append(True) or query.shape[:-1].numel() > 3)
    in_parts = aten_flash.partial_backward(params, grad_out, out, lse)
    assert (len(asked) > 1) is (not is_causal or batch * heads > 1)
    for grad, expected in zip(in_parts, whole, strict=True):
        torch.testing.assert_close(grad, expected)


EVERYWHERE = {
    "hidden keys": (rewrites.with_hidden_keys, PLAIN.but(keys=64, mask="boolean")),
    "hidden keys of an additive mask": (rewrites.with_hidden_keys, PLAIN.but(keys=64, mask="additive")),
    "another query": (rewrites.with_another_query, PLAIN),
    "another query under a causal mask": (rewrites.with_another_query, PLAIN.but(is_causal=True)),
    "another query of a mask": (rewrites.with_another_query, PLAIN.but(mask="additive")),
    "another query of a mask of one row": (rewrites.with_another_query, PLAIN.but(mask="boolean", mask_dims="b11k")),
    "a second query": (rewrites.with_another_query, PLAIN.but(queries=1, mask="boolean")),
    "a fifth dimension": (rewrites.with_a_fifth_dimension, PLAIN),
    "a fifth dimension of a mask": (rewrites.with_a_fifth_dimension, PLAIN.but(mask="additive", mask_dims="qk")),
}


@pytest.mark.parametrize("name", EVERYWHERE)
def test_what_is_added_to_a_call_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite, call = EVERYWHERE[name]
    added = faults.Fault("PyTorch", "2.11.0", None, lambda params: True, rewrite)
    assert_unchanged(call, faults.Faults(added), monkeypatch)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)


TRACED = [
    (torch_sdpa, PLAIN.but(heads=4, queries=33, mask="additive", dropout_p=0.2)),
    (torch_sdpa, PLAIN.but(keys=64, mask="boolean", dropout_p=0.25, dtype="bfloat16", gradients=("query",))),
    (aten_flash, PLAIN.but(queries=24, dtype="float16", is_causal=True)),
]
"""Calls of which something is rewritten for CUDA."""


@pytest.mark.parametrize(("kernel", "call"), TRACED, ids=["another query", "hidden keys and dropout", "aten_flash"])
def test_what_is_looked_at_and_rewritten_for_cuda_breaks_no_graph(
    kernel: Any, call: Call, on_hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        key, value = (tensor[:, :1].expand_as(tensor) for tensor in (key, value))
        return kernel.forward(SDPAParams(query, key, value, mask, call.dropout_p, scale=0.25))[0]

    name = "OF_SDPA" if kernel is torch_sdpa else "OF_FLASH"
    everywhere = [dataclasses.replace(fault, device=None) for fault in getattr(kernel, name).all]
    monkeypatch.setattr(kernel, name, faults.Faults(*everywhere))
    arguments, _ = call.with_leaves(call.make())
    given = *(arguments[each] for each in ("query", "key", "value")), arguments.get("attn_mask")
    if kernel is aten_flash:  # which has its operator for CUDA wherever it is not on a CPU
        given = *(tensor.to("meta") for tensor in given[:3]), None
    results = []
    for each in (forward, torch.compile(forward, backend="eager", fullgraph=True)):
        torch.manual_seed(0)
        results.append(each(*given))
    first, other = results
    assert first.shape == other.shape and (first.is_meta or torch.equal(first, other))


@pytest.mark.parametrize("dim", [-4, -3, -2])
@pytest.mark.parametrize("mask_dims", ["", "bhqk", "b1qk", "11qk", "qk"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 3)])
def test_halves_are_the_whole(
    dim: int, mask_dims: str, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = PLAIN.but(batch=3, heads=heads[0], kv_heads=heads[1], queries=5)
    call = call.but(mask="additive", mask_dims=mask_dims) if mask_dims else call
    whole = call.make().arguments["query"].shape[dim]
    too_large = faults.Fault(
        "PyTorch", "2.11.0", None, lambda params: params.query.shape[dim] > 1, cut=lambda params: dim
    )
    assert whole > 2
    assert_unchanged(call, faults.Faults(too_large), monkeypatch)


@pytest.mark.parametrize("dim", [-4, -3, -2])
def test_a_call_that_is_rewritten_and_cut_gives_as_many_rows_as_it_has(
    dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = PLAIN.but(batch=3, queries=5)
    added = faults.Fault(
        "PyTorch", "2.11.0", None, lambda params: params.query.shape[-2] == 5, rewrites.with_another_query
    )
    too_large = faults.Fault(
        "PyTorch", "2.11.0", None, lambda params: params.query.shape[dim] > 1, cut=lambda params: dim
    )
    assert_unchanged(call, faults.Faults(added, too_large), monkeypatch)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_an_exported_program_keeps_the_range_of_its_sizes(
    strict: bool, masked: bool, on_hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
            shared = key[:, :1].expand_as(key)
            return torch_sdpa.forward(SDPAParams(query, shared, shared, mask, 0.0, scale=0.25))[0]

    everywhere = [dataclasses.replace(fault, device=None) for fault in faults.OF_SDPA.all]
    monkeypatch.setattr(torch_sdpa, "OF_SDPA", faults.Faults(*everywhere))
    queries, keys = torch.export.Dim("queries", max=2**20), torch.export.Dim("keys", max=2**20)
    query, key = (torch.randn(2, 4, length, 16, requires_grad=True) for length in (33, 64))
    mask = torch.randn(33, 64) if masked else None
    shapes = ({2: queries}, {2: keys}, {0: queries, 1: keys} if masked else None)
    program = torch.export.export(Model(), (query, key, mask), dynamic_shapes=shapes, strict=strict)
    for lengths in ((33, 64), (7, 30), (64, 65)):
        query, key = (torch.randn(2, 4, length, 16) for length in lengths)
        mask = torch.randn(lengths) if masked else None
        assert_right(
            {"query": query, "key": key[:, :1].expand_as(key), "value": key[:, :1].expand_as(key), "scale": 0.25}
            | ({"attn_mask": mask} if masked else {}),
            program.module()(query, key, mask),
        )


def assert_unchanged(call: Call, given: faults.Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that `torch`, with these faults, is right of a call and its gradients."""
    monkeypatch.setattr(torch_sdpa, "OF_SDPA", given)
    call = call.but(gradients=("query", "key", "value"), dtype="bfloat16")
    inputs = call.make()
    arguments, leaves = call.with_leaves(inputs)
    params = SDPAParams(**{"scale": 0.25, **{name: given for name, given in arguments.items() if name != "dropout_p"}})
    out, _ = torch_sdpa.forward(params)
    gradients = call.backward(inputs, out, None, leaves)
    assert_right({**inputs.arguments, "scale": 0.25}, out.detach(), gradients=gradients, grad_out=inputs.grad_out)
