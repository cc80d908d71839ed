"""Packed sequences, and pages of keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnplug
from interpreted_calls import INF, LOWER_RIGHT, formula, random

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of divisions by 0 that are then left out


VARLEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window, softcap, sinks": {"window_size": (6, 2), "softcap": 2.0, "sinks": random(2).float()},
    "alibi, used keys": {"alibi_slopes": torch.rand(4, 2), "seqused_k": torch.tensor([3, 0, 18, 0], dtype=torch.int32)},
}


@pytest.mark.usefixtures("memory_is_nan")
def test_training_steps_of_other_sizes_and_lengths_have_right_gradients() -> None:
    """Each batch has sizes of its own, and layers that repeat them with other numbers."""
    for step, lengths in enumerate(((5, 18), (20, 3), (1, 16), (5, 18), (16, 32))):
        starts, tokens = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32), sum(lengths)
        for layer in range(3):
            leaves = [random(tokens, 2, 16, seed=10 * step + layer), random(tokens, 1, 16), random(tokens, 1, 12)]
            leaves = [*(tensor.float().requires_grad_() for tensor in leaves), torch.randn(2).requires_grad_()]
            found = [
                attnplug.varlen_attn(
                    *leaves[:3], starts, starts, max(lengths), max(lengths), enable_gqa=True, is_causal=True,
                    sinks=leaves[3], impl=impl,
                )
                for impl in ("flash_triton", "math_ref")
            ]  # fmt: skip
            torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
            grads = [torch.autograd.grad(out.square().sum(), leaves) for out in found]
            torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-3)


@pytest.mark.usefixtures("memory_is_nan")
@pytest.mark.parametrize("case", VARLEN)
def test_packed_sequences_are_right(case: str) -> None:
    """Lengths of zero among them, and tokens that belong to no sequence at the end."""
    arguments = VARLEN[case]
    lengths_q, lengths_k = (5, 18, 20, 0), (7, 0, 20, 4)
    bounds_q, bounds_k = (
        torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32) for x in (lengths_q, lengths_k)
    )
    leaves = [random(45, 2, 16), random(33, 1, 16, seed=1), random(33, 1, 12, seed=2)]
    leaves = [tensor.float().requires_grad_() for tensor in leaves]
    out, lse = attnplug.varlen_attn(
        *leaves, bounds_q, bounds_k, 20, 20, enable_gqa=True, return_lse=True, impl="flash_triton", **arguments
    )
    seen = lse > -INF
    weights = random(*out.shape, seed=3).float()
    grads = torch.autograd.grad((out * weights).sum() + lse[seen].sum(), leaves)
    assert not out[43:].any() and (lse[:, 43:] == -INF).all()

    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    loss = torch.zeros((), dtype=torch.float64)
    for b in range(4):
        if not lengths_q[b]:
            continue
        rows, columns = slice(bounds_q[b], bounds_q[b + 1]), slice(bounds_k[b], bounds_k[b + 1])
        one = dict(arguments, causal_variant=LOWER_RIGHT)
        for name in ("alibi_slopes", "seqused_k"):
            if name in one:
                one[name] = one[name][b : b + 1]
        parts = [wide[0][rows], wide[1][columns], wide[2][columns]]
        ref, ref_lse = formula(*(part.transpose(0, 1)[None] for part in parts), **one)
        torch.testing.assert_close(out[rows].double(), ref[0].transpose(0, 1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(lse[:, rows].double(), ref_lse[0], atol=1e-5, rtol=1e-4)
        loss = loss + (ref[0].transpose(0, 1) * weights[rows]).sum() + ref_lse[ref_lse > -INF].sum()
    for grad, ref_grad in zip(grads, torch.autograd.grad(loss, wide), strict=True):
        torch.testing.assert_close(grad.double(), ref_grad, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("memory_is_nan")
@pytest.mark.parametrize("lengths_k", [(0, 0), (3, 2)])
def test_no_sequence_may_have_queries(lengths_k: tuple[int, int]) -> None:
    """For example, an expert or a rank that got no tokens, with buffers that have room for some."""
    bounds_k = torch.tensor([0, lengths_k[0], sum(lengths_k)], dtype=torch.int32)
    leaves = [random(rows, 2, 16).float().requires_grad_() for rows in (4, 6, 6)]
    out, lse = attnplug.varlen_attn(
        *(*leaves, torch.zeros_like(bounds_k), bounds_k, 0, max(lengths_k)),
        return_lse=True,
        impl="flash_triton",
    )
    assert not out.any() and (lse == -INF).all()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.usefixtures("memory_is_nan")
def test_most_tokens_may_belong_to_no_sequence() -> None:
    """For example, in a buffer that has room for many more; the keys of each head are contiguous."""
    bounds = torch.tensor([0, 3, 5], dtype=torch.int32)
    query, key = random(700, 4, 16).float(), random(2, 700, 16, seed=1).float().transpose(0, 1)
    leaves = [tensor.requires_grad_() for tensor in (query, key, key.detach().clone())]
    arguments = dict(enable_gqa=True, return_lse=True, impl="flash_triton")
    out, lse = attnplug.varlen_attn(*leaves, bounds, bounds, 3, 3, **arguments)
    grads = torch.autograd.grad(out.sum() + lse[:, :5].sum(), leaves)
    cut = [tensor[:5] for tensor in leaves]
    own, own_lse = attnplug.varlen_attn(*cut, bounds, bounds, 3, 3, **arguments | {"impl": "math_ref"})
    own_grads = torch.autograd.grad(own.sum() + own_lse.sum(), cut)
    for result, expected in zip((out, lse.T, *grads), (own, own_lse.T, *own_grads), strict=True):
        torch.testing.assert_close(result[:5], expected, atol=1e-5, rtol=1e-4)
    assert (lse[:, 5:] == -INF).all()
    assert not any(result[5:].any() for result in (out, *grads))


@pytest.mark.usefixtures("memory_is_nan")
@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("longest", [4, 20])
def test_paged_keys_are_right_whatever_memory_outside_holds(page_size: int, longest: int) -> None:
    used = torch.tensor([7, 40, 0], dtype=torch.int32)
    blocks = -(-40 // page_size)
    table = torch.randperm(3 * blocks, generator=torch.Generator().manual_seed(1)).reshape(3, blocks).int()
    key, value = (torch.full((3 * blocks, page_size, 2, size), float("nan")) for size in (16, 12))
    sequences = []
    for b in range(3):
        rows = [random(int(used[b]), 2, size, seed=b).float() for size in (16, 12)]
        sequences.append(rows)
        for at in range(int(used[b])):
            for pages, row in zip((key, value), rows, strict=True):
                pages[table[b, at // page_size], at % page_size] = row[at]
    table[0, -(-7 // page_size) :] = 10**6  # never looked up
    bounds = torch.tensor([0, longest, longest + 3, longest + 5], dtype=torch.int32)
    query = random(longest + 12, 4, 16).float()  # the last 7 belong to no sequence
    out, lse = attnplug.varlen_attn(
        *(query, key, value, bounds, None, longest, 40),
        seqused_k=used,
        block_table=table,
        is_causal=True,
        enable_gqa=True,
        return_lse=True,
        impl="flash_triton",
    )
    assert not out[bounds[3] :].any() and (lse[:, bounds[3] :] == -INF).all()
    for b in range(3):
        rows = slice(bounds[b], bounds[b + 1])
        parts = [query[rows].double(), *(row.double() for row in sequences[b])]
        if not used[b]:
            assert not out[rows].any() and (lse[:, rows] == -INF).all()
            continue
        heads_first = (part.transpose(0, 1)[None] for part in parts)
        ref, ref_lse = formula(*heads_first, is_causal=True, causal_variant=LOWER_RIGHT)
        torch.testing.assert_close(out[rows].double(), ref[0].transpose(0, 1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(lse[:, rows].double(), ref_lse[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("of", ["pages", "sinks"])
def test_gradients_beside_pages_are_declined_with_the_reason(of: str) -> None:
    pages, bounds = torch.randn(2, 4, 1, 16, requires_grad=of == "pages"), torch.tensor([0, 2], dtype=torch.int32)
    sinks = torch.zeros(1, requires_grad=True) if of == "sinks" else None
    arguments = {"seqused_k": torch.tensor([3], dtype=torch.int32), "block_table": torch.zeros(1, 1, dtype=torch.int32)}
    with pytest.raises(attnplug.NoImplementationError, match="no gradients for paged"):
        attnplug.varlen_attn(
            *(torch.randn(2, 1, 16), pages, pages, bounds, None, 2, 3), sinks=sinks, impl="flash_triton", **arguments
        )


def in_columns(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


def every_second(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize("layout", [every_second, in_columns], ids=lambda layout: layout.__name__)
def test_lengths_pages_sinks_and_slopes_may_lie_apart_in_memory(layout: Callable[[Tensor], Tensor]) -> None:
    """Kernels read them number by number, so what they read must be copied first."""
    query, pages, tokens = random(3, 4, 16).float(), random(9, 4, 4, 16).float(), random(15, 4, 16).float()
    starts, used = torch.tensor([0, 1, 2, 3], dtype=torch.int32), torch.tensor([9, 3, 12], dtype=torch.int32)
    table = torch.tensor([[3, 1, 4], [0, 5, 2], [8, 6, 7]], dtype=torch.int32)
    calls: list[tuple[Any, ...]] = [
        (attnplug.varlen_attn, (query, pages, pages), (starts, None, 1, 12, used, table)),
        (attnplug.varlen_attn, (tokens[:3], tokens, tokens), (starts, starts * 5, 1, 5, used.clamp(max=5))),
        (attnplug.scaled_dot_product_attention, (random(3, 4, 5, 16).float(),) * 3, ()),
    ]
    for attend, tensors, lengths in calls:
        named = dict(zip(("cu_seq_q", "cu_seq_k", "max_q", "max_k", "seqused_k", "block_table"), lengths, strict=False))
        named |= {"sinks": random(4).float(), "alibi_slopes": random(len(used), 4).float()}
        named.setdefault("seqused_k", used // 3)
        apart = {
            name: layout(each) if isinstance(each, Tensor) and (each.dim() > 1 or layout is every_second) else each
            for name, each in named.items()
        }
        found = []
        for impl, given in (("math_ref", named), ("flash_triton", apart)):
            wants_grad = named.get("block_table") is None
            leaves = [tensor.clone().requires_grad_(wants_grad) for tensor in tensors]
            out = attend(*leaves, **given, impl=impl)
            grads = torch.autograd.grad(out.square().sum(), leaves) if wants_grad else ()
            found.append((out.detach(), *grads))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
