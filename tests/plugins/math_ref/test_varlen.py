"""math_ref's sequences of variable length, packed and paged, are dense calls that do not see each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnplug
from accuracy import assert_lse_right
from attnplug import CausalVariant
from reference import attention as expected

INF = float("inf")


def varlen(*args: Any, **kwargs: Any) -> Any:
    return attnplug.varlen_attn(*args, impl="math_ref", **kwargs)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


CU_Q, CU_K = int32(0, 3, 3, 5, 6), int32(0, 4, 6, 6, 9)
VARLEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window_size": (1, 0)},
    "all": {
        "window_size": (2, -1),
        "softcap": 1.2,
        "sinks": random(4),
        "alibi_slopes": torch.rand(4, 4),
        "scale": 0.4,
    },
    "seqused_k": {"seqused_k": int32(2, 2, 0, 0), "is_causal": True},
}


def packed(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key and value of sequences with the lengths above, followed by two tokens of no sequence."""
    shapes = ((8, 4, 3), (11, 2, 3), (11, 2, 2))
    return [random(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("options", VARLEN.values(), ids=VARLEN.keys())
def test_varlen_is_dense_for_each_sequence(options: dict[str, Any]) -> None:
    query, key, value = packed()
    out, lse = varlen(query, key, value, CU_Q, CU_K, 3, 4, enable_gqa=True, return_lse=True, **options)
    for b in range(4):
        tokens, keys = slice(CU_Q[b], CU_Q[b + 1]), slice(CU_K[b], CU_K[b + 1])
        one = {**options, "causal_variant": CausalVariant.LOWER_RIGHT}
        for name in ("alibi_slopes", "seqused_k"):
            if name in one:
                one[name] = one[name][b : b + 1]
        dense = [t.transpose(0, 1)[None] for t in (query[tokens], key[keys], value[keys])]
        ref_out, ref_lse = expected(*dense, enable_gqa=True, **one)
        np.testing.assert_allclose(out[tokens].detach().transpose(0, 1), ref_out[0], rtol=1e-12, atol=1e-13)
        assert_lse_right(lse[:, tokens], ref_lse[0], torch.float64)
    assert not out[6:].any()
    assert (lse[:, 6:] == -INF).all()


@pytest.mark.parametrize("name", ["causal", "all", "seqused_k"])
def test_derivatives_of_varlen_are_those_of_the_result(name: str) -> None:
    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = varlen(*tensors, CU_Q, CU_K, 3, 4, enable_gqa=True, return_lse=True, **VARLEN[name])
        return out, lse.masked_fill(lse == -INF, 0)

    assert torch.autograd.gradcheck(function, packed())
    assert torch.autograd.gradgradcheck(function, packed(), fast_mode=True)


def test_tokens_outside_the_sequences_reach_no_result_and_no_gradient() -> None:
    used = int32(3, 1, 0, 2)
    results = []
    for poison in (0.0, torch.nan):
        tensors = packed()
        with torch.no_grad():
            tensors[0][6:] = poison
            for tensor in tensors[1:]:
                for token in (3, 5, 8, 9, 10):
                    tensor[token] = poison
        out = varlen(*tensors, CU_Q, CU_K, 3, 4, enable_gqa=True, seqused_k=used)
        grad_out = torch.ones_like(out)
        grad_out[6:] = poison
        results.append((out, *torch.autograd.grad(out, tensors, grad_out)))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert not results[1][2][[3, 5, 8, 9, 10]].any()


def pages(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return keys and values in pages of two, for three sequences that share a first page, and their table.

    Pages 1 and 6, and the last half of 4, belong to no sequence; entries that nothing needs name no page.
    """
    key, value = random(7, 2, 2, 3, dtype=dtype), random(7, 2, 2, 2, dtype=dtype)
    table = torch.tensor([[5, 2, 4], [5, 0, -1], [5, 99, 99], [3, 77, -5]], dtype=torch.int32)
    return key, value, table, int32(5, 4, 2, 0)


def test_shuffled_pages_equal_packed_keys() -> None:
    key, value, table, used = pages()
    query = packed()[0]
    tensors = (query, key, value)
    options = {"enable_gqa": True, "is_causal": True}
    out = varlen(query, key, value, CU_Q, None, 3, 5, seqused_k=used, block_table=table, **options)
    rows = [key.new_tensor([10, 11, 4, 5, 8]), key.new_tensor([10, 11, 0, 1]), key.new_tensor([10, 11])]
    order = torch.cat(rows).long()
    flat = [tensor.flatten(0, 1)[order] for tensor in (key, value)]
    ref = varlen(query, *flat, CU_Q, int32(0, 5, 9, 11, 11), 3, 5, **options)
    torch.testing.assert_close(out, ref, rtol=0, atol=0)
    grads, ref_grads = (torch.autograd.grad(result.sin().sum(), tensors) for result in (out, ref))
    torch.testing.assert_close(grads, ref_grads)


def test_derivatives_of_pages_are_those_of_the_result() -> None:
    key, value, table, used = pages()

    def function(*tensors: Tensor) -> Tensor:
        return varlen(*tensors, CU_Q, None, 3, 5, enable_gqa=True, seqused_k=used, block_table=table)

    tensors = (packed()[0], key, value)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_no_pages_at_all_are_sequences_without_keys() -> None:
    key, value, table, _ = pages()
    none = int32(0, 0, 0, 0)
    query = packed()[0]
    out = varlen(query, key, value, CU_Q, None, 3, 0, enable_gqa=True, seqused_k=none, block_table=table[:, :0])
    assert not out.any()


def test_unused_pages_reach_no_result_and_no_gradient() -> None:
    results = []
    for poison in (0.0, torch.nan):
        key, value, table, used = pages()
        with torch.no_grad():
            for tensor in (key, value):
                tensor[[1, 6, 3]], tensor[4, 1] = poison, poison
        tensors = (packed()[0], key, value)
        out = varlen(*tensors, CU_Q, None, 3, 5, enable_gqa=True, seqused_k=used, block_table=table)
        results.append((out, *torch.autograd.grad(out.sum(), tensors)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_varlen_traces_in_one_graph() -> None:
    """No length is read on the host."""
    key, value, table, used = pages()
    query = packed()[0]
    options = {"enable_gqa": True, "is_causal": True, "return_lse": True}

    def function(query: Tensor, key: Tensor, value: Tensor, used: Tensor, table: Tensor) -> Any:
        return varlen(query, key, value, CU_Q, None, 3, 5, seqused_k=used, block_table=table, **options)

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    arguments = (query, key, value, used, table)
    torch.testing.assert_close(compiled(*arguments), function(*arguments))
