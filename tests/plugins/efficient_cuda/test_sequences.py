"""`efficient_cuda` without a GPU: packed sequences, some without queries or keys, or with more of one.

The plugin's code runs on the emulated CUTLASS kernel.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attnplug
from attnplug import SDPAParams
from cuda_calls import BANDS, INF, LOWER_RIGHT, assert_same, emulate, pytorch, seen_by, tensors
from cuda_kernels_emulated import Cutlass
from reference import attention

from attnplug_efficient_cuda import efficient  # isort: skip

LENGTHS_Q, LENGTHS_K = [3, 0, 5, 4, 1, 2], [4, 2, 2, 4, 0, 6]


@pytest.fixture
def cutlass(monkeypatch: pytest.MonkeyPatch) -> Cutlass:
    kernel = Cutlass()
    emulate(monkeypatch, "efficient_cuda", kernel)
    return kernel


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("used", [None, [1, 2, 0, 4, 0, 3]], ids=["all keys", "seqused_k"])
@pytest.mark.parametrize("band", [{}, {"is_causal": True}, {"window_size": (1, 0)}], ids=str)
def test_each_sequence_is_as_by_itself(
    cutlass: Cutlass, kv_heads: int, used: list[int] | None, band: dict[str, Any]
) -> None:
    starts_q, starts_k = (
        torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32) for lengths in (LENGTHS_Q, LENGTHS_K)
    )
    window = "window_size" in band
    query = torch.randn(int(starts_q[-1]) + 2, 4, 8, requires_grad=not window)
    key, value = (torch.randn(int(starts_k[-1]) + 3, kv_heads, n, requires_grad=not window) for n in (8, 12))
    with torch.no_grad():  # memory that belongs to no sequence holds whatever it holds
        key[int(starts_k[-1]) :] = value[int(starts_k[-1]) :] = float("nan")
        for b, length in enumerate(used or []):
            key[starts_k[b] + length : starts_k[b + 1]] = float("nan")
            value[starts_k[b] + length : starts_k[b + 1]] = float("nan")
    out, lse = attnplug.varlen_attn(
        query, key, value, starts_q, starts_k, 5, 6, enable_gqa=True, return_lse=True, impl="emulated",
        seqused_k=None if used is None else torch.tensor(used, dtype=torch.int32), **band,
    )  # fmt: skip
    pieces = []
    for b, (first, last) in enumerate(pairwise(starts_q)):
        count = LENGTHS_K[b] if used is None else used[b]
        q, k, v = query[first:last], key[starts_k[b] :][:count], value[starts_k[b] :][:count]
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        seen = seen_by(q.shape[2], count, causal_variant=LOWER_RIGHT, **band)
        piece = pytorch(q, k, v, None, seen) if count else torch.zeros(1, 4, q.shape[2], 12, dtype=torch.float64)
        pieces.append(piece[0].transpose(0, 1))
        _, right = (
            attention(q, k, v, is_causal=True, causal_variant=2, enable_gqa=True, window_size=(-1, -1))
            if (band.get("is_causal"))
            else attention(q, k, v, causal_variant=2, enable_gqa=True, **band)
        )
        torch.testing.assert_close(lse[:, first:last].double(), torch.as_tensor(right[0]), atol=2e-5, rtol=2e-5)
    pieces.append(torch.zeros(2, 4, 12, dtype=torch.float64))
    expected = torch.cat(pieces)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)
    assert (lse[:, -2:] == -INF).all()
    if not window:
        grad = torch.randn_like(out)
        found = torch.autograd.grad(out, (query, key, value), grad)
        right_grads = torch.autograd.grad(expected, (query, key, value), grad.double())
        for got, want in zip(found, right_grads, strict=True):
            torch.testing.assert_close(got, want.float(), atol=1e-4, rtol=1e-4)


def test_more_sequences_than_the_grid_holds_are_an_error_of_its_own() -> None:
    with FakeTensorMode():
        tokens, starts = torch.empty(30000, 1, 8), torch.empty(30001, dtype=torch.int32)
        lengths = {"cu_seq_q": starts, "cu_seq_k": starts, "max_q": 1, "max_k": 1}
        params = SDPAParams(tokens, tokens, tokens, is_causal=True, scale=1.0, causal_variant=LOWER_RIGHT, **lengths)
        with pytest.raises(ValueError, match="30000 sequences make 90000 in the kernel's grid"):
            efficient.forward(params)


@pytest.mark.parametrize("band", BANDS[:-3], ids=str)
@pytest.mark.parametrize("lengths", [(5, 7), (7, 5)], ids=str)
def test_seqused_k_of_a_dense_call_never_reads_what_is_not_used(
    cutlass: Cutlass, band: dict[str, Any], lengths: tuple[int, int]
) -> None:
    query, key, value = tensors(batch=3, heads=4, queries=lengths[0], keys=lengths[1])
    used = torch.tensor([lengths[1], 0, 3], dtype=torch.int32)
    beyond = torch.arange(lengths[1]) >= used[:, None]
    shifts = band.get("causal_variant") == LOWER_RIGHT and "window_size" in band
    seen = torch.zeros(3, 1, *lengths, dtype=torch.bool)
    for b, count in enumerate(used.tolist()):
        seen[b, 0, :, :count] = seen_by(lengths[0], count, **band)
    call = {"query": query, "key": key, "value": value, "seqused_k": used, **band}
    if shifts:
        call |= {name: call[name].detach() for name in ("query", "key", "value")}
    assert_same(call, seen)
    with torch.no_grad():
        clean = attnplug.scaled_dot_product_attention(**call, enable_gqa=True, impl="emulated")
        for tensor in (key, value):
            tensor.masked_fill_(beyond[:, None, :, None], float("nan"))
        soiled = attnplug.scaled_dot_product_attention(**call, enable_gqa=True, impl="emulated")
    assert torch.equal(clean, soiled)
