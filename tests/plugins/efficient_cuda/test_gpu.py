"""`efficient_cuda` and `cudnn` on a GPU: the conformance kit in full, and what no emulation can tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import attnplug
from attnplug.testing import assert_right, check_impl
from cuda_calls import LOWER_RIGHT, SPECS, register_both, wrong
from graphs import captured

pytestmark = pytest.mark.gpu
NAMES = sorted(SPECS)
attend = attnplug.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_both()


def make(*shape: int, dtype: torch.dtype = torch.float16, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda", requires_grad=grad)


def needs(name: str, *tensors: Tensor, **options: Any) -> None:
    """Skip, with the implementation's own reasons, where it declines such a call on this GPU."""
    if not (verdict := attnplug.can_use_impl(name, attnplug.SDPAParams(*tensors, **options))):
        pytest.skip("; ".join(verdict.reasons))


@contextmanager
def deterministic() -> Iterator[None]:
    try:
        torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", NAMES)
def test_conformance_in_full(name: str) -> None:
    report = check_impl(name, device="cuda", level="full")
    assert not wrong(report), str(report)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("sizes", [(64, 64), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("length", [512, 300])
def test_out_and_gradients_are_right(name: str, is_causal: bool, sizes: tuple[int, int], length: int) -> None:
    query, key, value = (make(2, 4, length, size) for size in (sizes[0], sizes[0], sizes[1]))
    needs(name, query, key, value, is_causal=is_causal)
    assert_gradients_right(name, query=query, key=key, value=value, is_causal=is_causal)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_scales_that_the_kernels_cannot_take_are_converted(name: str, scale: float) -> None:
    query, key, value = (make(1, 2, 256, 64) for _ in range(3))
    needs(name, query, key, value, is_causal=True)
    assert_gradients_right(name, query=query, key=key, value=value, is_causal=True, scale=scale)


@pytest.mark.parametrize("name", NAMES)
def test_calls_that_were_made_before_are_right_whatever_changes_between_them(name: str) -> None:
    """What is known of a call holds for its layout and alignment, twice each and in turns."""
    query, key, value = (make(2, 4, 256, 64) for _ in range(3))
    strided = query.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    shifted = query.new_zeros(query.numel() + 1)[1:].view(query.shape).copy_(query.detach()).detach().requires_grad_()
    needs(name, query, key, value)
    for given in (query, strided, shifted) * 2:
        assert_gradients_right(name, query=given, key=key, value=value)


def assert_gradients_right(name: str, **arguments: Any) -> None:
    """Assert that out, lse and the gradients of a call are right by the rule for every implementation."""
    inputs = [arguments[which] for which in ("query", "key", "value")]
    out, lse = attend(**arguments, return_lse=True, impl=name)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, weights)
    assert_right(
        {key: item.detach() if isinstance(item, Tensor) else item for key, item in arguments.items()},
        out.detach(),
        lse.detach(),
        dict(zip(("query", "key", "value"), grads, strict=True)),
        grad_out=weights,
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize(("is_causal", "grad"), [(False, True), (True, True), (False, False), (True, False)])
def test_each_packed_sequence_is_as_by_itself(name: str, kv_heads: int, is_causal: bool, grad: bool) -> None:
    lengths_q, lengths_k = [130, 0, 257, 40, 1, 64], [200, 64, 90, 40, 0, 300]
    starts_q, starts_k = (
        torch.tensor([0, *each], device="cuda").cumsum(0, dtype=torch.int32) for each in (lengths_q, lengths_k)
    )
    query = make(sum(lengths_q) + 2, 4, 64, grad=grad)
    key, value = (make(sum(lengths_k) + 3, kv_heads, 64, grad=grad) for _ in range(2))
    lengths: dict[str, Any] = {"cu_seq_q": starts_q, "cu_seq_k": starts_k, "max_q": 257, "max_k": 300}
    options: dict[str, Any] = {"is_causal": is_causal, "enable_gqa": True}
    needs(name, query, key, value, causal_variant=LOWER_RIGHT, **lengths, **options)
    tensors = {"query": query, "key": key, "value": value}
    out = attnplug.varlen_attn(**tensors, **lengths, **options, impl=name)
    weights = torch.randn_like(out)
    grads = dict(zip(tensors, torch.autograd.grad(out, tuple(tensors.values()), weights), strict=True)) if grad else {}
    last = {"query": sum(lengths_q), "key": sum(lengths_k), "value": sum(lengths_k)}
    for tensor, end in ((out, last["query"]), *((found, last[which]) for which, found in grads.items())):
        assert not tensor[end:].any()  # rows that no sequence has
    given = {which: tensor.detach()[: last[which]] for which, tensor in tensors.items()}
    assert_right(
        given | lengths | options,
        out.detach()[: last["query"]],
        gradients={which: found[: last[which]] for which, found in grads.items()},
        grad_out=weights[: last["query"]],
    )


@pytest.mark.parametrize("name", NAMES)
def test_dropout_of_backward_is_that_of_forward_and_follows_the_seed(name: str) -> None:
    query, key = make(2, 4, 128, 128), make(2, 4, 128, 128)
    one = torch.eye(128, dtype=torch.float16, device="cuda").expand(2, 4, -1, -1).contiguous()
    value = one.clone().requires_grad_()
    needs(name, query, key, value, dropout=0.25)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(attend(query, key, value, dropout_p=0.25, impl=name))
    kept = outs[0]  # with the identity as values, out is what dropout left of the probabilities
    assert torch.equal(kept, outs[1]) and not torch.equal(kept, outs[2])
    assert 0.22 < (kept == 0).double().mean() < 0.28
    (found,) = torch.autograd.grad(kept, value, one)  # and this its transpose
    assert torch.equal(found.mT == 0, kept == 0)


def test_masks_shared_by_all_queries_are_not_copied_to_each() -> None:
    query, key, value = (make(2, 8, 4096, 64, grad=False) for _ in range(3))
    mask = make(2, 1, 1, 4096, grad=False)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(query, key, value, mask, impl="efficient_cuda")
    used = torch.cuda.max_memory_allocated() - before
    assert used < 2 * query.numel() * query.element_size()


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_deterministic_mode_gives_equal_bits(packed: bool) -> None:
    shape = (4096, 2, 64) if packed else (1, 2, 4096, 64)
    inputs = [make(*shape) for _ in range(3)]
    starts = torch.tensor([0, 1000, 4096], dtype=torch.int32, device="cuda")
    with deterministic():
        runs = []
        for _ in range(3):
            if packed:
                out = attnplug.varlen_attn(*inputs, starts, starts, 3096, 3096, is_causal=True, impl="efficient_cuda")
            else:
                out = attend(*inputs, impl="efficient_cuda")
            runs.append((out, *torch.autograd.grad(out.sum(), inputs)))
    for again in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], again, strict=True))


def test_deterministic_mode_passes_cudnn_over_where_a_gradient_is_needed() -> None:
    inputs = [make(1, 2, 128, 64) for _ in range(3)]
    with deterministic(), pytest.raises(attnplug.NoImplementationError, match="no deterministic backward"):
        attend(*inputs, impl="cudnn")


COMPILED = [
    pytest.param(name, options, dropout, id=f"{name}-{options.get('mode', 'default')}-dropout {dropout}")
    for name in NAMES
    for options in ({}, {"mode": "reduce-overhead"})
    for dropout in (0.0, 0.25)
]


def assert_these_right(inputs: list[Tensor], out: Tensor, grads: Sequence[Tensor], dropout: float) -> None:
    """Assert that a causal call, and its gradients for a loss of `out.sum()`, are right; with dropout, finite."""
    assert all(tensor.isfinite().all() for tensor in (out, *grads))
    if dropout == 0:
        query, key, value = (tensor.detach() for tensor in inputs)
        gradients = dict(zip(("query", "key", "value"), grads, strict=True))
        arguments = {"query": query, "key": key, "value": value, "is_causal": True}
        assert_right(arguments, out.detach(), gradients=gradients, grad_out=torch.ones_like(out))


@pytest.mark.parametrize(("name", "options", "dropout"), COMPILED)
def test_compiled_calls_are_those_of_eager_mode(name: str, options: dict[str, Any], dropout: float) -> None:
    inputs = [make(2, 4, 128, 128) for _ in range(3)]
    needs(name, *inputs, is_causal=True, dropout=dropout)

    def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query * 1.0, key, value, is_causal=True, dropout_p=dropout, impl=name) * 1.0

    compiled = torch.compile(attended, fullgraph=True, **options)
    for _ in range(4):  # the first runs of reduce-overhead warm up and record; what comes then is replayed
        torch.compiler.cudagraph_mark_step_begin()
        fresh = [make(2, 4, 128, 128) for _ in range(3)]
        out = compiled(*fresh)
        assert_these_right(fresh, out, torch.autograd.grad(out.sum(), fresh), dropout)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_captured_graph_of_forward_and_backward_replays_on_new_inputs(name: str, dropout: float) -> None:
    static = [make(2, 4, 128, 128) for _ in range(3)]
    needs(name, *static, is_causal=True, dropout=dropout)

    def step() -> tuple[Tensor, ...]:
        out = attend(*static, is_causal=True, dropout_p=dropout, impl=name)
        return out, *torch.autograd.grad(out.sum(), static)

    graph, results = captured(step, warmups=3)
    seen = []
    for _ in range(2):
        with torch.no_grad():
            for tensor in static:
                tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        seen.append([tensor.clone() for tensor in results])
        assert_these_right(static, results[0], results[1:], dropout)
    assert not torch.equal(seen[0][0], seen[1][0])
    if dropout > 0:  # replayed on the same inputs, it draws anew
        graph.replay()
        assert not torch.equal(results[0], seen[1][0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grad", [False, True])
def test_a_captured_graph_of_packed_calls_reads_the_lengths_of_each_replay(name: str, grad: bool) -> None:
    """Of a call that was prepared before, too, where nobody wants its gradients or its lse."""
    starts = torch.tensor([0, 130, 130, 300, 301, 400], dtype=torch.int32, device="cuda")
    tensors = {which: make(402, 4, 64, grad=grad) for which in ("query", "key", "value")}
    lengths: dict[str, Any] = {"cu_seq_q": starts, "cu_seq_k": starts, "max_q": 257, "max_k": 257}
    needs(name, **tensors, is_causal=True, causal_variant=LOWER_RIGHT, **lengths)
    weights = make(402, 4, 64, grad=False)

    def step() -> tuple[Tensor, ...]:
        out = attnplug.varlen_attn(**tensors, **lengths, is_causal=True, impl=name)
        return out, *(torch.autograd.grad(out, tuple(tensors.values()), weights) if grad else ())

    graph, results = captured(step, warmups=3)
    for ends in ([0, 257, 300, 300, 402], [40, 41, 41, 200, 390], [100, 200, 300, 400, 401]):
        starts.copy_(torch.tensor([0, *ends]))
        graph.replay()
        last = ends[-1]
        assert not any(tensor[last:].any() for tensor in results)  # rows that no sequence has
        out, *grads = (tensor.detach()[:last] for tensor in results)
        given = {which: tensor.detach()[:last] for which, tensor in tensors.items()}
        gradients = dict(zip(tensors, grads, strict=False))
        assert_right(given | lengths | {"is_causal": True}, out, gradients=gradients, grad_out=weights[:last])


@pytest.mark.parametrize("name", NAMES)
def test_this_gpu_asked_about_as_another_gets_the_same_answer(name: str) -> None:
    query = make(2, 4, 128, 64)
    params = attnplug.SDPAParams(query, query, query, is_causal=True)
    gpu = attnplug.compute_capability(query.device)
    assert gpu == torch.cuda.get_device_capability()
    assert attnplug.can_use_impl(name, params) == attnplug.can_use_impl(name, params, compute_capability=gpu)
    for other in ((7, 5), (8, 0), (9, 0), (10, 0), (12, 0)):
        said = str(attnplug.can_use_impl(name, params, compute_capability=other).reasons)
        assert "raised" not in said
