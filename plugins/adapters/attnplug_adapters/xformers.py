"""`xformers`: the memory-efficient attention of xFormers, whose dispatcher chooses among CUTLASS and flash kernels.

Written for 0.0.30 to 0.0.35 (`xformers/ops/fmha/__init__.py`, `attn_bias.py`, `cutlass.py`, `flash.py`; the last
re-export the same functions from `mslk`). Tensors are `(B, S, H, E)`; masks are objects, upper left and lower right
by different classes; `lse` is natural, its rows padded by one kernel and not by the other, and what stands in a
row that sees no key differs too, so such rows are known here and cleared.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from attnplug import SDPAParams
from attnplug_adapters import convert
from attnplug_adapters.library import Adapter

HALF = (torch.float16, torch.bfloat16)


class Interface:
    """What is called of `xformers.ops`."""

    @staticmethod
    def memory_efficient_attention_forward_requires_grad(
        query: Any, key: Any, value: Any, attn_bias: Any = None, p: Any = 0.0, scale: Any = None
    ) -> Any: ...

    @staticmethod
    def memory_efficient_attention_backward(
        grad: Any,
        output: Any,
        lse: Any,
        query: Any,
        key: Any,
        value: Any,
        attn_bias: Any = None,
        p: Any = 0.0,
        scale: Any = None,
    ) -> Any: ...


class XFormers(Adapter):
    """The kernel, on a module that has the functions of `Interface` and the masks of `fmha.attn_bias`."""

    interfaces: ClassVar[tuple[type, ...]] = (Interface,)

    def forward(self, params: SDPAParams) -> tuple[Tensor, Tensor, Tensor]:
        """Return `out`, `lse`, and the library's own lse, which its backward wants as it is."""
        params, _ = convert.positive_scale(params)
        query, key, value = self._given(params)
        out, raw = self.library.memory_efficient_attention_forward_requires_grad(
            query, key, value, attn_bias=self._bias(params), scale=params.scale
        )
        out = convert.as_caller_reads(params, out, params.value.shape[-1])
        lse = convert.blind_as_minus_infinity(convert.first(raw, params.query.shape[2])).contiguous()
        return *_cleared(params, out, lse), raw

    def backward(
        self, params: SDPAParams, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, raw: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the gradients of query, key and value; the kernels have none through lse."""
        params, sign = convert.positive_scale(params)
        blind = (lse == convert.MINUS_INFINITY).unsqueeze(-1)
        grad_out, out = grad_out.masked_fill(blind, 0.0), out.masked_fill(blind, 0.0)
        query, key, value = self._given(params)
        found = self.library.memory_efficient_attention_backward(
            convert.as_kernel_reads(params, grad_out),
            convert.as_kernel_reads(params, out),
            raw,
            query,
            key,
            value,
            attn_bias=self._bias(params),
            scale=params.scale,
        )
        kv_heads, sizes = params.key.shape[1], (params.query.shape[-1], params.key.shape[-1], params.value.shape[-1])
        grads = [found[0], *(convert.sum_heads(grad, kv_heads) for grad in found[1:])]
        grad_query, *others = (
            convert.as_caller_reads(params, grad, size) for grad, size in zip(grads, sizes, strict=True)
        )
        return grad_query if sign == 1 else grad_query * sign, *others

    def _given(self, params: SDPAParams) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value as `(B, S, Hq, E)`; grouped heads are repeated, whose backward there is none."""
        heads = params.query.shape[1]
        query = convert.as_kernel_reads(params, params.query)
        key, value = (
            convert.spread_heads(convert.as_kernel_reads(params, tensor), heads)
            for tensor in (params.key, params.value)
        )
        return query, key, value

    def _bias(self, params: SDPAParams) -> Any:
        """Return the library's object for causal masks and windows, or a tensor for all else."""
        left, right = convert.band(params)
        if params.attn_mask is None and (left, right) == convert.OPEN:
            return None
        masks = self.library.fmha.attn_bias
        queries, keys = params.query.shape[2], params.key.shape[2]
        lower_right = convert.is_lower_right(params) or queries == keys
        if params.attn_mask is None and (left, right) == (-1, 0):
            return masks.LowerTriangularFromBottomRightMask() if lower_right else masks.LowerTriangularMask()
        if params.attn_mask is None and lower_right and params.query.dtype in HALF:
            return masks.LocalAttentionFromBottomRightMask(
                window_left=left if left >= 0 else keys, window_right=right if right >= 0 else keys
            )
        return _as_tensor(params)


def _as_tensor(params: SDPAParams) -> Tensor:
    """Return mask and band as one tensor to be added, `(B, Hq, Sq, Sk)`, its rows aligned to 16 bytes."""
    batch, heads, queries, keys = *params.query.shape[:3], params.key.shape[2]
    dtype = params.query.dtype
    memory = params.query.new_zeros(queries, convert.rounded_up(keys, 16), dtype=dtype)
    bias = memory[:, :keys]
    if (hidden := convert.hidden(params)) is not None:
        bias = bias.masked_fill_(hidden, convert.MINUS_INFINITY)
    if params.attn_mask is None:
        return bias.expand(batch, heads, queries, keys)
    mask = params.attn_mask.detach()
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), convert.MINUS_INFINITY)
    shape = (*mask.shape[:2], queries, memory.shape[1])
    whole = params.query.new_empty(shape, dtype=dtype)[..., :keys]
    return whole.copy_(bias + mask.to(dtype)).expand(batch, heads, queries, keys)


def _cleared(params: SDPAParams, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return out with 0, and lse with minus infinity, for rows that mask and band leave without a key."""
    if params.attn_mask is None:
        return convert.cleared(params, out, lse)
    seen = params.attn_mask if params.attn_mask.dtype == torch.bool else params.attn_mask != convert.MINUS_INFINITY
    if (hidden := convert.hidden(params)) is not None:
        seen = seen & ~hidden
    blind = seen.any(-1).logical_not()
    return out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, convert.MINUS_INFINITY)


kernel = XFormers("xformers.ops")
