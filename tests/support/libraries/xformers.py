"""`xformers.ops` 0.0.33 on the CPU: its signatures, and what they are documented to do.

Sources: `xformers/ops/fmha/__init__.py`, `attn_bias.py`, `cutlass.py`, `flash.py`. Half types run
"flash", whose lse has a row for each query, and plus infinity where no key is seen; float32, and every tensor
bias, runs "cutlass", whose lse is padded to 32 rows, and whose rows that see no key hold NaN in out and 0 in lse.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from libraries.formula import INF, NAN, Mask, backward, check_memory, forward


class AttentionBias:
    pass


class LowerTriangularMask(AttentionBias):
    pass


class LowerTriangularFromBottomRightMask(AttentionBias):
    pass


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        assert self.window_left >= 0 and self.window_right >= 0, "Invalid window value"


fmha = SimpleNamespace(
    attn_bias=SimpleNamespace(
        LowerTriangularMask=LowerTriangularMask,
        LowerTriangularFromBottomRightMask=LowerTriangularFromBottomRightMask,
        LocalAttentionFromBottomRightMask=LocalAttentionFromBottomRightMask,
    )
)


def memory_efficient_attention_forward_requires_grad(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: type[Any] | None = None,
    output_dtype: torch.dtype | None = None,
):
    _check(query, key, value, attn_bias)
    cutlass = _is_cutlass(query, attn_bias)
    rows = -(-query.shape[1] // 32) * 32 if cutlass else query.shape[1]
    out = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    lse = torch.full((query.shape[0], query.shape[2], rows), INF)
    for b in range(query.shape[0]):
        mask = _mask(attn_bias, b, scale)
        out[b], found = forward(query[b], key[b], value[b], mask, INF)
        blind = (found == INF).T.unsqueeze(-1)
        lse[b, :, : query.shape[1]] = found
        if cutlass:
            out[b] = out[b].masked_fill(blind, NAN)
            lse[b, :, : query.shape[1]] = found.masked_fill(found == INF, 0.0)
    return out, lse


def memory_efficient_attention_backward(
    grad: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: type[Any] | None = None,
):
    _check(query, key, value, attn_bias)
    check_memory(grad, output)
    cutlass = _is_cutlass(query, attn_bias)
    assert lse.shape[2] == (-(-query.shape[1] // 32) * 32 if cutlass else query.shape[1]), "lse of the other kernel"
    grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
    for b in range(query.shape[0]):
        found = backward(
            grad[b], query[b], key[b], value[b], output[b], lse[b, :, : query.shape[1]], _mask(attn_bias, b, scale)
        )
        for whole, part in zip(grads, found, strict=True):
            whole[b] = part
    return tuple(grads)


def _check(query: Any, key: Any, value: Any, bias: Any) -> None:
    assert query.dim() == key.dim() == value.dim() == 4
    assert query.shape[2] == key.shape[2] == value.shape[2], "xFormers does not broadcast heads"
    check_memory(query, key, value)
    if isinstance(bias, torch.Tensor):
        assert bias.dtype == query.dtype
        assert bias.shape == (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        every = 16 // bias.element_size()
        assert all(stride % every == 0 for stride in bias.stride()[:-1]) and bias.stride(-1) <= 1
    elif isinstance(bias, LocalAttentionFromBottomRightMask):
        assert query.dtype != torch.float32, "cutlassF has no LocalAttentionFromBottomRightMask"


def _is_cutlass(query: Any, bias: Any) -> bool:
    return query.dtype == torch.float32 or isinstance(bias, torch.Tensor)


def _mask(bias: Any, b: int, scale: Any) -> Mask:
    if isinstance(bias, torch.Tensor):
        return Mask(scale=scale, bias=bias[b])
    if isinstance(bias, LocalAttentionFromBottomRightMask):
        return Mask(scale=scale, left=bias.window_left, right=bias.window_right)
    upper = isinstance(bias, LowerTriangularMask)
    return Mask(scale=scale, causal=bias is not None, lower_right=not upper)
