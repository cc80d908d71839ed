"""The CUTLASS and cuDNN operators in float64 on the CPU, as PyTorch's sources say, with their traps.

What the kernels check is asserted; what they leave unwritten is NaN; what they get wrong is an assertion
that nobody asks for it. Sources: `attention.cu`, `attention_backward.cu`, `mem_eff_attention/kernel_forward.h`
and `kernel_backward.h`, `cudnn/MHA.cpp`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

NAN, INF = float("nan"), float("inf")


def check_layout(name: str, tensor: Tensor) -> None:
    """`check_supported`: last dimension contiguous, everything else in multiples of 16 bytes."""
    every = 16 // tensor.element_size()
    assert tensor.dim() == 4 and tensor.stride(3) == 1, f"{name}: last dimension must be contiguous"
    assert tensor.storage_offset() % every == 0, f"{name} is not correctly aligned"
    assert all(stride % every == 0 for stride in tensor.stride()[:3]), f"{name} is not correctly aligned (stride)"
    assert tensor.shape[3] % every == 0, f"{name}: head size {tensor.shape[3]}"
    assert all(stride < 2**31 for stride in tensor.stride())


def check_call(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, cu_q: Any, cu_k: Any) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_layout(name, tensor)
        assert tensor.dtype == query.dtype
    assert query.shape[0] == key.shape[0] == value.shape[0] and key.shape[1] == value.shape[1]
    assert query.shape[2] == key.shape[2] == value.shape[2] and query.shape[3] == key.shape[3]
    assert query.shape[0] <= 65535 and query.shape[2] <= 65535
    assert (cu_q is None) == (cu_k is None)
    if cu_q is not None:
        assert bias is None and query.shape[0] == 1
        for starts in (cu_q, cu_k):
            assert starts.dtype == torch.int32 and starts.dim() == 1 and starts.is_contiguous()
        assert cu_q.shape == cu_k.shape
    if bias is not None:
        every = 16 // bias.element_size()
        assert bias.dtype == query.dtype
        assert bias.shape == (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        assert bias.stride(3) == 1 and bias.storage_offset() % every == 0
        for dim in range(3):
            assert bias.shape[dim] <= 1 or bias.stride(dim) % every == 0, "attn_bias is not correctly aligned"
        last = bias.storage_offset() + sum((n - 1) * s for n, s in zip(bias.shape[:3], bias.stride()[:3], strict=True))
        whole = -(-bias.shape[3] // every) * every
        if not isinstance(bias, torch._subclasses.FakeTensor):
            assert (last + whole) * bias.element_size() <= bias.untyped_storage().nbytes(), "read beyond the bias"


def seen(queries: int, keys: int, mask_type: int, window: int | None, backward: bool = False) -> Tensor:
    """`(queries, keys)`, with the offset that the kernel's unsigned arithmetic cannot have below zero."""
    assert window is None or (window > 0 and mask_type in (1, 2)), "custom_mask_type not supported"
    offset = keys - queries if mask_type == 2 else 0
    assert offset >= 0 or keys == 0, "lower right with fewer keys than queries wraps around"
    assert not (backward and window is not None and offset), "the backward forgets the offset of a window"
    row, column = torch.arange(queries)[:, None] + offset, torch.arange(keys)
    visible = torch.ones(queries, keys, dtype=torch.bool)
    if mask_type:
        visible &= column <= row
    if window is not None:
        visible &= column > row - window
    return visible


def sequences(query: Tensor, key: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> list[tuple[int, slice, slice]]:
    """`(batch, queries, keys)` of each launch column."""
    if cu_q is None:
        return [(b, slice(0, query.shape[1]), slice(0, key.shape[1])) for b in range(query.shape[0])]
    starts, ends = cu_q.tolist(), cu_k.tolist()
    pairs = zip(starts, starts[1:], ends, ends[1:], strict=False)
    return [(0, slice(a, b), slice(c, d)) for a, b, c, d in pairs]


def keep(seed: Tensor, dropout: float, shape: tuple[int, ...]) -> Tensor:
    """The scaled mask of dropout, a function of the seed alone."""
    if dropout == 0:
        return torch.ones(shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(int(seed))
    return (torch.rand(shape, generator=generator, dtype=torch.float64) > dropout) / (1 - dropout)


class Cutlass:
    """`aten::_efficient_attention_forward` and `_backward`; remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def forward(
        self,
        query,
        key,
        value,
        bias,
        cu_q,
        cu_k,
        max_q,
        max_k,
        dropout,
        mask_type,
        lse_wanted,
        *,
        scale,
        window_size,
    ):
        self.calls.append(
            {"mask_type": mask_type, "window_size": window_size, "query": query, "key": key, "bias": bias}
        )
        check_call(query, key, value, bias, cu_q=cu_q, cu_k=cu_k)
        assert lse_wanted or query.shape[1] % 32 != 1, "without an lse, a query alone in its block may go wrong"
        assert dropout < 1 and (cu_q is None or dropout == 0)
        assert scale > 0, "keys are hidden before logits are scaled"
        batches = sequences(query, key, cu_q, cu_k)
        heads, length = query.shape[2], max_q if cu_q is not None else query.shape[1]
        out = torch.full((*query.shape[:3], value.shape[3]), NAN, dtype=torch.float64)
        lse = torch.full((len(batches), heads, math.ceil(length / 32) * 32), NAN)
        seed = torch.randint(2**31, ()) if dropout > 0 else torch.empty((), dtype=torch.long)
        for number, (b, rows, columns) in enumerate(batches):
            queries, keys = rows.stop - rows.start, columns.stop - columns.start
            assert queries <= length and (cu_q is None or keys <= max_k)
            visible = seen(queries, keys, mask_type, window_size)
            for h in range(heads):
                logits = scale * query[b, rows, h].double() @ key[b, columns, h].double().T
                if bias is not None:
                    logits = logits + bias[b, h].double()
                logits = logits.masked_fill(~visible, -INF)
                top = logits.amax(-1) if keys else torch.full((queries,), -INF)
                shift = top.masked_fill(top == -INF, 0)
                weights = (logits - shift[:, None]).exp()
                total = weights.sum(-1)
                weights = weights / total.masked_fill(total == 0, 1)[:, None]
                dropped = weights * keep(seed + 1000 * number + h, dropout, (queries, keys))
                out[b, rows, h] = dropped @ value[b, columns, h].double()
                lse[number, h, :queries] = (shift + total.masked_fill(total == 0, 1).log()).float()
                blind = ~visible.any(-1)
                out[b, rows, h] = out[b, rows, h].masked_fill(blind[:, None], NAN)
        lse = lse if lse_wanted else lse[..., :0]
        return out.to(query.dtype), lse, seed, torch.zeros((), dtype=torch.long), length, key.shape[1]

    def whole(self, query, key, value, bias, lse_wanted, dropout=0.0, is_causal=False, *, scale=None):
        """`aten::_scaled_dot_product_efficient_attention`."""
        tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
        given = (bias, None, None, None, None, dropout, int(is_causal), lse_wanted)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        out, *others = self.forward(*tensors, *given, scale=scale, window_size=None)
        return out.transpose(1, 2), *others[:3]

    def backward(
        self, grad_out, query, key, value, bias, out, cu_q, cu_k, max_q, max_k, lse, dropout, seed, offset, mask_type,
        wants_bias, *, scale, num_splits_key, window_size,
    ):  # fmt: skip
        check_call(query, key, value, bias, cu_q=cu_q, cu_k=cu_k)
        for name, tensor in (("out", out), ("grad_out", grad_out)):
            check_layout(name, tensor)
            assert tensor.is_contiguous() and tensor.shape == (*query.shape[:3], value.shape[3])
        assert cu_q is None or (num_splits_key == 1 and 0 < max_q <= query.shape[1] and 0 < max_k <= key.shape[1])
        assert lse.dtype == torch.float32 and lse.stride(2) == 1
        assert all(size == 1 or stride % 8 == 0 for size, stride in zip(lse.shape[:2], lse.stride()[:2], strict=True))
        batches = sequences(query, key, cu_q, cu_k)
        grad_q, grad_k, grad_v = (torch.full(t.shape, NAN, dtype=torch.float64) for t in (query, key, value))
        grad_bias = torch.full(bias.shape, NAN, dtype=torch.float64) if wants_bias else None
        for number, (b, rows, columns) in enumerate(batches):
            queries, keys = rows.stop - rows.start, columns.stop - columns.start
            if keys == 0:
                continue
            visible = seen(queries, keys, mask_type, window_size, backward=True)
            for h in range(query.shape[2]):
                q, k, v = (t.double() for t in (query[b, rows, h], key[b, columns, h], value[b, columns, h]))
                logits = scale * q @ k.T if bias is None else scale * q @ k.T + bias[b, h].double()
                weights = (logits.masked_fill(~visible, -INF) - lse[number, h, :queries, None].double()).exp()
                kept = keep(seed + 1000 * number + h, dropout, (queries, keys))
                d_out = grad_out[b, rows, h].double()
                delta = (d_out * out[b, rows, h].double()).sum(-1, keepdim=True)
                d_logits = weights * (d_out @ v.T * kept - delta)
                blind = ~visible.any(-1)
                grad_q[b, rows, h] = (scale * d_logits @ k).masked_fill(blind[:, None], NAN)
                grad_k[b, columns, h] = scale * d_logits.T @ q
                grad_v[b, columns, h] = (weights * kept).T @ d_out
                if grad_bias is not None:
                    grad_bias[b, h] = d_logits.masked_fill(~visible, NAN)
        grads = [grad.to(query.dtype) for grad in (grad_q, grad_k, grad_v)]
        return *grads, grad_bias if grad_bias is None else grad_bias.to(query.dtype)

    def whole_backward(
        self, grad_out, query, key, value, bias, out, lse, seed, offset, dropout, wanted, is_causal, *, scale
    ):  # fmt: skip
        """`aten::_scaled_dot_product_efficient_attention_backward`."""
        assert [*wanted] == [True, True, True, bias is not None]
        grad_out, query, key, value, out = (t.transpose(1, 2) for t in (grad_out, query, key, value, out))
        lengths = query.shape[1], key.shape[1]
        given = (lse, dropout, seed, offset, int(is_causal), bias is not None)
        found = self.backward(
            grad_out, query, key, value, bias, out, None, None, *lengths, *given,
            scale=scale, num_splits_key=None, window_size=None,
        )  # fmt: skip
        return *(grad.transpose(1, 2) for grad in found[:3]), found[3]


class Cudnn:
    """`aten::_cudnn_attention_forward` and `_backward` of dense tensors; rows without keys are NaN for it."""

    def __init__(self, lse_rank: int = 4) -> None:
        self.lse_rank = lse_rank

    def forward(
        self,
        query,
        key,
        value,
        bias,
        cu_q,
        cu_k,
        max_q,
        max_k,
        lse_wanted,
        dropout,
        is_causal,
        debug,
        *,
        scale,
    ):
        assert cu_q is None and cu_k is None and dropout == 0 and not debug
        assert (max_q, max_k) == (query.shape[2], key.shape[2]) and max_k > 1
        out, lse, _ = self._run(query, key, value, bias, is_causal, scale)
        lse = lse.float().unsqueeze(-1) if self.lse_rank == 4 else lse.float()
        return (
            out.to(query.dtype),
            lse if lse_wanted else lse[:0],
            None,
            None,
            max_q,
            max_k,
            None,
            None,
            None,
        )

    def whole(self, query, key, value, bias, lse_wanted, dropout=0.0, is_causal=False, debug=False, *, scale=None):
        """`aten::_scaled_dot_product_cudnn_attention`."""
        given = (bias, None, None, query.shape[2], key.shape[2], lse_wanted, dropout, is_causal, debug)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        return self.forward(query, key, value, *given, scale=scale)

    def backward(
        self, grad_out, query, key, value, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout, is_causal,
        *, scale,
    ):  # fmt: skip
        assert cu_q is None and cu_k is None and dropout == 0 and lse.dim() == self.lse_rank
        order = sorted(range(4), key=lambda dim: -query.stride(dim))
        assert grad_out.permute(order).is_contiguous() and out.permute(order).is_contiguous()
        _, expected, (q, k, v) = self._run(query, key, value, bias, is_causal, scale, grad=True)
        assert torch.allclose(expected.float(), lse.reshape(expected.shape), atol=1e-3)
        with torch.enable_grad():
            again = self._run(q, k, v, bias, is_causal, scale)[0]
        grads = torch.autograd.grad(again, (q, k, v), grad_out.double())
        return tuple(grad.to(query.dtype) for grad in grads)

    def _run(self, query, key, value, bias, is_causal, scale, grad=False):
        assert scale > 0, "keys are hidden before logits are scaled"
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.dtype != torch.float64:
                check_layout(name, tensor)
                assert not any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))
        query, key, value = (tensor.double() for tensor in (query, key, value))
        if grad:
            query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        group = query.shape[1] // key.shape[1]
        k, v = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
        logits = scale * query @ k.mT
        if bias is not None:
            assert not is_causal and bias.isfinite().all() and bias.shape[3] == key.shape[2]
            assert bias.shape[1] in (1, query.shape[1])
            logits = logits + bias.double()
        if is_causal:
            logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -INF)
        return logits.softmax(-1) @ v, logits.logsumexp(-1), (query, key, value)


class CudnnSequences:
    """The same operators on packed sequences, as PyTorch 2.15 has them; what meets nobody is left unwritten."""

    def forward(
        self, query, key, value, bias, cu_q, cu_k, max_q, max_k, lse_wanted, dropout, is_causal, debug,
        *, scale, seqused_k=None,
    ):  # fmt: skip
        assert bias is None and lse_wanted and dropout == 0 and not debug
        self._check(query, key, value, cu_q, cu_k, max_q, max_k, scale)
        out = torch.full((*query.shape[:2], value.shape[2]), NAN, dtype=torch.float64)
        lse = torch.full((query.shape[1], query.shape[0]), NAN)
        for number, (_, rows, columns) in enumerate(sequences(query, key, cu_q, cu_k)):
            queries, keys = rows.stop - rows.start, columns.stop - columns.start
            assert queries <= max_q and keys <= max_k
            offset = 0 if seqused_k is None else keys - queries
            assert seqused_k is None or int(seqused_k[number]) == keys
            visible = torch.ones(queries, keys, dtype=torch.bool)
            if is_causal:
                visible = visible.tril(offset)
            logits = self._logits(query[rows], key[columns], scale).masked_fill(~visible, -INF)
            blind = ~visible.any(-1)[:, None]
            v = self._each_head(value[columns], query.shape[1])
            out[rows] = (logits.softmax(-1) @ v).masked_fill(blind, NAN).transpose(0, 1)
            lse[:, rows] = logits.logsumexp(-1).float().masked_fill(blind[:, 0], NAN)
        return out.to(query.dtype), lse, None, None, max_q, max_k, None, None, None

    def backward(
        self, grad_out, query, key, value, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout, is_causal,
        *, scale,
    ):  # fmt: skip
        assert bias is None and dropout == 0 and not is_causal, "causal from the upper left, which no call means"
        self._check(query, key, value, cu_q, cu_k, max_q, max_k, scale)
        assert grad_out.is_contiguous() and out.is_contiguous() and lse.shape == (query.shape[1], query.shape[0])
        grads = [torch.full(tensor.shape, NAN, dtype=torch.float64) for tensor in (query, key, value)]
        for _, rows, columns in sequences(query, key, cu_q, cu_k):
            parts = [t.double().requires_grad_() for t in (query[rows], key[columns], value[columns])]
            if not parts[0].numel() or not parts[1].numel():
                continue
            with torch.enable_grad():
                logits = self._logits(parts[0], parts[1], scale)
                assert torch.allclose(logits.logsumexp(-1).float(), lse[:, rows], atol=1e-3)
                again = (logits.softmax(-1) @ self._each_head(parts[2], query.shape[1])).transpose(0, 1)
            found = torch.autograd.grad(again, parts, grad_out[rows].double())
            for grad, piece, region in zip(grads, found, (rows, columns, columns), strict=True):
                grad[region] = piece
        return tuple(grad.to(query.dtype) for grad in grads)

    def _check(self, query, key, value, cu_q, cu_k, max_q, max_k, scale):
        assert scale > 0 and 1 < max_q <= query.shape[0] and 0 < max_k <= key.shape[0]
        for tensor in (query, key, value):
            every = 16 // tensor.element_size()
            assert tensor.dim() == 3 and tensor.stride(2) == 1 and tensor.storage_offset() % every == 0
            assert all(stride > 0 and stride % every == 0 for stride in tensor.stride()[:2])
        for starts in (cu_q, cu_k):
            assert starts.dtype == torch.int32 and starts.is_contiguous() and starts.storage_offset() % 4 == 0

    def _logits(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        heads = query.shape[1]
        return scale * query.double().transpose(0, 1) @ self._each_head(key, heads).mT

    def _each_head(self, tensor: Tensor, heads: int) -> Tensor:
        return tensor.double().transpose(0, 1).repeat_interleave(heads // tensor.shape[1], 0)
