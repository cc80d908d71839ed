"""`xformers.ops` 0.0.33 on the CPU: its signatures, and what they are documented to do.

Sources: `xformers/ops/fmha/__init__.py`, `attn_bias.py`, `dispatch.py`, `cutlass.py`, `flash.py`. Of the kernels that
take a call the first runs. "flash" takes half types and masks that are objects; its lse has a row for each query, of
packed sequences `(1, H, T)`, and plus infinity where no key is seen. "cutlass" takes float32 and tensors too; its lse
is padded to 32 rows, of packed sequences `(B, H, S)`, and rows that see no key hold NaN in out and 0 in lse. A
backward is chosen anew; of packed sequences the form of the lse decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

from libraries.formula import INF, NAN, Mask, backward, check_memory, forward

BLIND = INF
"""What flash writes to the lse of a row that sees no key; FlashAttention 3 in its place writes -INF."""


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


@dataclass
class BlockDiagonalMask(AttentionBias):
    q_seqlen: list[int]
    kv_seqlen: list[int]
    window: int = 0

    @classmethod
    def from_seqlens(
        cls, q_seqlen: list[int], kv_seqlen: list[int] | None = None, *, device: torch.device | None = None
    ) -> BlockDiagonalMask:
        return cls(q_seqlen, q_seqlen if kv_seqlen is None else kv_seqlen)

    def make_causal_from_bottomright(self) -> BlockDiagonalMask:
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqlen, self.kv_seqlen)

    def make_local_attention_from_bottomright(self, window_size: int) -> BlockDiagonalMask:
        assert window_size > 0, "Expected `window_size > 0`"
        return BlockDiagonalCausalLocalAttentionFromBottomRightMask(self.q_seqlen, self.kv_seqlen, window_size)


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    def __post_init__(self) -> None:
        pairs = zip(self.q_seqlen, self.kv_seqlen, strict=True)
        assert all(keys >= queries for queries, keys in pairs), "Expected `num_keys >= num_queries`"


class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    pass


CUTLASS = (
    type(None),
    torch.Tensor,
    LowerTriangularMask,
    LowerTriangularFromBottomRightMask,
    BlockDiagonalMask,
    BlockDiagonalCausalFromBottomRightMask,
)
CUTLASS_FORWARD = (*CUTLASS, BlockDiagonalCausalLocalAttentionFromBottomRightMask)

fmha = SimpleNamespace(
    attn_bias=SimpleNamespace(
        LowerTriangularMask=LowerTriangularMask,
        LowerTriangularFromBottomRightMask=LowerTriangularFromBottomRightMask,
        LocalAttentionFromBottomRightMask=LocalAttentionFromBottomRightMask,
        BlockDiagonalMask=BlockDiagonalMask,
    ),
    cutlass=SimpleNamespace(FwOp=SimpleNamespace(CUDA_MAXIMUM_COMPUTE_CAPABILITY=(9, 0))),
    flash=SimpleNamespace(FwOp=SimpleNamespace(is_available=lambda: True)),
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
    cutlass = not _flash_takes(query, key, value, attn_bias)
    assert not cutlass or type(attn_bias) in CUTLASS_FORWARD, "No operator found"
    out = torch.full((*query.shape[:-1], value.shape[-1]), NAN, dtype=query.dtype)
    sums = []
    for rows, columns, mask in _calls(query, key, attn_bias, scale):
        out[rows], found = forward(query[rows], key[columns], value[columns], mask, INF)
        blind = (found == INF).T.unsqueeze(-1)
        if cutlass:
            out[rows] = out[rows].masked_fill(blind, NAN)
        sums.append(found.masked_fill(found == INF, 0.0 if cutlass else BLIND).float())
    if not cutlass:
        return out, torch.cat(sums, 1).unsqueeze(0) if isinstance(attn_bias, BlockDiagonalMask) else torch.stack(sums)
    height = -(-max(found.shape[1] for found in sums) // 32) * 32
    lse = torch.full((len(sums), query.shape[2], height), INF)
    for whole, found in zip(lse, sums, strict=True):
        whole[:, : found.shape[1]] = found
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
    flash = _flash_takes(query, key, value, attn_bias) and not torch.are_deterministic_algorithms_enabled()
    calls = _calls(query, key, attn_bias, scale)
    packed = isinstance(attn_bias, BlockDiagonalMask)
    flat = lse.shape[0] == 1 and lse.shape[2] >= query.shape[1]
    if packed and len(calls) > 1:
        flash &= flat
        assert flash == flat, "No operator found: LSE is in packed format"
    assert flash or type(attn_bias) in CUTLASS, "No operator found"
    grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
    for number, (rows, columns, mask) in enumerate(calls):
        part = lse[0][:, rows[1]] if packed and flat else lse[number]
        part = part[:, : query[rows].shape[0]]
        found = backward(grad[rows], query[rows], key[columns], value[columns], output[rows], part, mask)
        for whole, place, gradient in zip(grads, (rows, columns, columns), found, strict=True):
            whole[place] = gradient
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
    if isinstance(bias, BlockDiagonalMask):
        assert query.shape[0] == 1, "Expected batch_size=1 when using block-diagonal bias"
        assert (sum(bias.q_seqlen), sum(bias.kv_seqlen)) == (query.shape[1], key.shape[1])


def _flash_takes(query: Any, key: Any, value: Any, bias: Any) -> bool:
    if query.dtype == torch.float32 or isinstance(bias, torch.Tensor) or query.shape[-1] > 256:
        return False
    if isinstance(bias, LowerTriangularMask) and query.shape[1] != key.shape[1]:
        return False
    return bool(query.shape[-1] == value.shape[-1])


def _calls(query: Any, key: Any, bias: Any, scale: Any) -> list[tuple[Any, Any, Mask]]:
    """Return for each sequence what selects its queries and keys, and its mask."""
    if not isinstance(bias, BlockDiagonalMask):
        return [(b, b, _mask(bias, b, scale)) for b in range(query.shape[0])]
    causal = isinstance(bias, BlockDiagonalCausalFromBottomRightMask)
    mask = Mask(scale=scale, causal=causal, left=bias.window - 1)
    places = [[(0, slice(*pair)) for pair in pairwise(_starts(lengths))] for lengths in (bias.q_seqlen, bias.kv_seqlen)]
    return [(*pair, mask) for pair in zip(*places, strict=True)]


def _starts(lengths: list[int]) -> list[int]:
    return [sum(lengths[:number]) for number in range(len(lengths) + 1)]


def _mask(bias: Any, b: int, scale: Any) -> Mask:
    if isinstance(bias, torch.Tensor):
        return Mask(scale=scale, bias=bias[b])
    if isinstance(bias, LocalAttentionFromBottomRightMask):
        return Mask(scale=scale, left=bias.window_left, right=bias.window_right)
    upper = isinstance(bias, LowerTriangularMask)
    return Mask(scale=scale, causal=bias is not None, lower_right=not upper)
