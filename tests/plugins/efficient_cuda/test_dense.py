"""`efficient_cuda` without a GPU: dense calls, the plugin's code on the emulated CUTLASS kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import attnplug
from attnplug import SDPAParams
from cuda_calls import BANDS, LENGTHS, LOWER_RIGHT, MASKS, assert_same, emulate, make_mask, seen_by, tensors
from cuda_kernels_emulated import Cutlass

from attnplug_efficient_cuda import dense, efficient, kept, layout, operators  # isort: skip

attended = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture
def cutlass(monkeypatch: pytest.MonkeyPatch) -> Cutlass:
    kernel = Cutlass()
    emulate(monkeypatch, "efficient_cuda", kernel)
    return kernel


@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_bands_of_unequal_lengths_are_those_of_pytorch(
    cutlass: Cutlass, band: dict[str, Any], lengths: tuple[int, int]
) -> None:
    query, key, value = tensors(queries=lengths[0], keys=lengths[1], batch=1)
    call = {"query": query, "key": key, "value": value, **band}
    assert_same(call, seen_by(*lengths, **band))


@pytest.mark.parametrize(("kind", "shape"), MASKS, ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("band", [{}, {"is_causal": True}, {"window_size": (2, 0)}, {"window_size": (2, 1)}], ids=str)
def test_masks_of_every_broadcast_form_and_their_gradients_are_those_of_pytorch(
    cutlass: Cutlass, kind: str, shape: tuple[int, ...], kv_heads: int, band: dict[str, Any]
) -> None:
    query, key, value = tensors(heads=4, kv_heads=kv_heads)
    call = {"query": query, "key": key, "value": value, "attn_mask": make_mask(kind, shape), **band}
    assert_same(call, seen_by(5, 7, **band))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(8, 8), (5, 3), (24, 72), (1, 1)], ids=str)
@pytest.mark.parametrize("heads_first", [True, False])
def test_any_head_sizes_and_layouts_are_brought_into_step(
    cutlass: Cutlass, dtype: torch.dtype, sizes: tuple[int, int], heads_first: bool
) -> None:
    query, key, value = tensors(
        heads=4, size=sizes[0], value_size=sizes[1], dtype=dtype, heads_first=heads_first, kv_heads=2
    )
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype, 2e-5)
    assert_same(
        {"query": query, "key": key, "value": value, "is_causal": True},
        seen_by(5, 7, is_causal=True),
        tolerance,
    )


def test_tensors_that_start_out_of_step_are_copied(cutlass: Cutlass) -> None:
    storage = torch.randn(3, 2 * 2 * 5 * 8 + 3, dtype=torch.float32)
    query, key, value = (row[3:].view(2, 2, 5, 8).requires_grad_() for row in storage)
    assert_same({"query": query, "key": key, "value": value}, seen_by(5, 5))


def test_aligned_tensors_are_not_copied(cutlass: Cutlass) -> None:
    query, key, value = tensors(dtype=torch.float16, heads=4, kv_heads=2, keys=16)
    mask = torch.zeros(1, 1, 5, 16, dtype=torch.float16)
    attnplug.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True, impl="emulated")
    (call,) = cutlass.calls
    for given, name in ((query, "query"), (key, "key"), (mask, "bias")):
        assert call[name].untyped_storage().data_ptr() == given.untyped_storage().data_ptr(), name


def test_float32_masks_for_half_tensors_keep_large_finite_numbers_finite(cutlass: Cutlass) -> None:
    query, key, value = tensors(dtype=torch.float16)
    mask = torch.zeros(2, 1, 5, 7)
    mask[..., 2] = torch.finfo(torch.float32).min
    call = {"query": query, "key": key, "value": value, "attn_mask": mask}
    assert_same(call, seen_by(5, 7), 4e-3)
    mask[:, :, 1] = torch.finfo(torch.float32).min
    _, lse = attnplug.scaled_dot_product_attention(**call, return_lse=True, impl="emulated")
    assert lse.isfinite().all()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_dropout_of_backward_is_that_of_forward(cutlass: Cutlass, kv_heads: int) -> None:
    query, key, value = tensors(heads=4, kv_heads=kv_heads)

    def run(query: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attnplug.scaled_dot_product_attention(query, key, value, dropout_p=0.4, enable_gqa=True, impl="emulated")

    direction, grad, step = torch.randn_like(query), torch.randn(2, 4, 5, 8), 1e-2
    (found,) = torch.autograd.grad(run(query), query, grad)
    difference = (run(query + step * direction) - run(query - step * direction)) / (2 * step)
    torch.testing.assert_close((found * direction).sum(), (difference * grad).sum(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("window_size", [(2, 0), (2, 1)])
@pytest.mark.parametrize("lengths", [(5, 9), (9, 5)], ids=str)
def test_dropout_of_backward_is_that_of_forward_in_shifted_windows(
    cutlass: Cutlass, window_size: tuple[int, int], lengths: tuple[int, int]
) -> None:
    """The kernel numbers its draws by the rows and keys that it is given, so both must be given the same."""
    query, key, _ = tensors(queries=lengths[0], keys=lengths[1], heads=1, kv_heads=1, batch=1)
    value = torch.eye(lengths[1]).view(1, 1, lengths[1], -1).requires_grad_()
    torch.manual_seed(3)
    out = attnplug.scaled_dot_product_attention(
        *(query, key, value), dropout_p=0.5, window_size=window_size, causal_variant=LOWER_RIGHT, impl="emulated"
    )
    each = [
        torch.autograd.grad(out[0, 0, row, 0], value, retain_graph=True)[0][0, 0, :, 0] for row in range(lengths[0])
    ]
    torch.testing.assert_close(torch.stack(each), out[0, 0])


def test_dropout_of_everything_leaves_zeros_and_lse(cutlass: Cutlass) -> None:
    query, key, value = tensors()
    mask = make_mask("float", (1, 1, 5, 7))
    call = {
        "query": query,
        "key": key,
        "value": value,
        "attn_mask": mask,
        "return_lse": True,
        "impl": "emulated",
    }
    out, lse = attnplug.scaled_dot_product_attention(**call, dropout_p=1.0)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, attnplug.scaled_dot_product_attention(**call)[1])
    assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), (query, key, value, mask)))


def test_calls_beyond_the_grid_or_the_random_numbers_are_split(
    cutlass: Cutlass, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "GRID", 3)
    query, key, value = tensors(batch=4, heads=8, kv_heads=4)
    mask = make_mask("float", (4, 1, 5, 7))
    assert_same({"query": query, "key": key, "value": value, "attn_mask": mask}, seen_by(5, 7))
    assert len(cutlass.calls) == 8  # three batches of one key head at a time
    monkeypatch.setattr(layout, "INT32", 5 * 7 * 4 + 1)
    params = SDPAParams(query, key, value, dropout=0.5, enable_gqa=True, scale=1.0)
    out, lse, *seeds = efficient.forward(params)
    assert out.isfinite().all() and lse.isfinite().all()
    assert len(seeds) == len(efficient.fake(params)) - 2 == 32
    grads = efficient.backward(params, torch.ones_like(out), None, out, lse, *seeds)
    assert all(grad.isfinite().all() for grad in grads if grad is not None)


def test_dropout_beyond_what_the_kernel_can_number_is_an_error_of_its_own() -> None:
    with FakeTensorMode():
        query = torch.empty(1, 1, 50000, 8)
        params = SDPAParams(query, query, query, dropout=0.1, scale=1.0)
        with pytest.raises(ValueError, match=r"2\^31 draws"):
            efficient.forward(params)


@pytest.mark.parametrize("short", [True, False])
def test_a_mask_whose_rows_this_pytorch_cannot_count_is_an_error(monkeypatch: pytest.MonkeyPatch, short: bool) -> None:
    monkeypatch.setattr(layout, "SHORT_OFFSETS", short)
    for rows, keys, wrong in ((2**16 + 1, 2**16, True), (2**16, 2**16, False), (1, 2**33, False)):
        with FakeTensorMode():
            mask = torch.empty(1, 1, rows, keys, dtype=torch.float16)
            shape = (2, 3, 2**16 + 1 if rows == 1 else rows, keys)
            if short and wrong:
                with pytest.raises(ValueError, match=r"wrongly behind the first 2\^32 .* use another"):
                    layout.bias(mask, torch.float16, shape)
            else:
                assert layout.bias(mask, torch.float16, shape).shape == shape


@pytest.mark.parametrize("deterministic", [True, False])
def test_keys_are_split_unless_determinism_is_asked_for(
    cutlass: Cutlass, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    asked = []

    def backward(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["num_splits_key"])
        return cutlass.backward(*args, **kwargs)

    monkeypatch.setattr(operators, "efficient_backward", backward)
    query, key, value = tensors()
    try:
        torch.use_deterministic_algorithms(deterministic)
        attnplug.scaled_dot_product_attention(query, key, value, impl="emulated").sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [1 if deterministic else None]


@pytest.mark.parametrize("scale", [-0.7, 0.0])
@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_scales_that_the_kernel_cannot_take_are_converted(cutlass: Cutlass, scale: float, dropout: float) -> None:
    query, key, value = tensors(queries=7)
    call = {"is_causal": True, "scale": scale, "dropout_p": dropout, "impl": "emulated"}
    out = attnplug.scaled_dot_product_attention(query, key, value, **call)
    wide = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    expected = attended(scale * wide[0], *wide[1:], is_causal=True, scale=1.0) * (1 - dropout)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (query, key, value), grad)
    right = torch.autograd.grad(expected, wide, grad.double())
    for got, want in zip(found, right, strict=True):
        torch.testing.assert_close(got, want.float(), atol=1e-4, rtol=1e-4)


def test_a_call_that_the_kernel_takes_as_it_is_is_looked_at_once(
    cutlass: Cutlass, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    look = dense.direct.look
    monkeypatch.setattr(dense.direct, "known", {})
    monkeypatch.setattr(dense.direct, "look", lambda params: looked.append(params) or look(params))
    for seed in range(3):
        torch.manual_seed(seed)
        query, key, value = tensors(queries=33, keys=33, heads=2, kv_heads=2)
        assert_same({"query": query, "key": key, "value": value, "is_causal": True}, seen_by(33, 33, is_causal=True))
    assert len(looked) == 1


def test_what_changes_a_call_is_part_of_what_it_is_known_by(cutlass: Cutlass) -> None:
    """Twice each, in turns, so that the second of each is one that is known."""
    query, key, value = tensors(queries=12, keys=12, heads=2, kv_heads=2)
    strided = query.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    storage = torch.zeros(query.numel() + 1)
    shifted = storage[1:].view(query.shape).copy_(query.detach()).detach().requires_grad_()
    calls: list[tuple[Tensor, dict[str, Any]]] = [
        *((query, options) for options in ({}, {"is_causal": True}, {"is_causal": True, "window_size": (3, -1)})),
        *((other, {}) for other in (strided, shifted)),
    ]
    for given, options in calls * 2:
        assert_same({"query": given, "key": key, "value": value, **options}, seen_by(12, 12, **options))


def test_known_calls_are_bounded(cutlass: Cutlass, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "KEPT", 4)
    monkeypatch.setattr(dense.direct, "known", {})
    for keys in range(2, 20):
        query, key, value = tensors(queries=3, keys=keys)
        attnplug.scaled_dot_product_attention(query, key, value, impl="emulated")
        assert len(dense.direct.known) <= 4
