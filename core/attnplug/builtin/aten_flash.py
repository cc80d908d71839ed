"""PyTorch's flash kernels, called directly: FlashAttention-2 on CUDA, its blocked equivalent on CPU.

Calling the leaf itself leaves PyTorch's process-wide backend flags, which other threads see, alone. The
operators are differentiable in PyTorch, so autograd goes through them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnplug import SDPAParams, compute_capability
from attnplug.builtin.faults import OF_FLASH
from attnplug.builtin.gpus import counts_too_far, lacks_backward
from attnplug.builtin.masks import as_additive
from attnplug.builtin.operators import bound, operator, with_scale
from attnplug.builtin.rewrites import ALIGNMENT, divisible, halves, is_aligned

composite = True
SMALL = 2**22
"""Of fewer elements no query is too large for backward, see `faults.TOO_FAR`, whatever its lengths are.

One query of head size 8, the smallest here, counts as 128 of 32. The core has the same for its passthrough, as `LARGE`.
"""
_flash_cpu = operator(
    "aten::_scaled_dot_product_flash_attention_for_cpu(Tensor query, Tensor key, Tensor value, float dropout_p=0., "
    "bool is_causal=False, *, Tensor? attn_mask=None, float? scale=None) -> (Tensor output, Tensor logsumexp)"
)
_flash_cuda = operator(
    "aten::_scaled_dot_product_flash_attention(Tensor query, Tensor key, Tensor value, float dropout_p=0., "
    "bool is_causal=False, bool return_debug_mask=False, *, float? scale=None) -> (Tensor output, Tensor logsumexp, "
    "Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, Tensor rng_state, Tensor unused, "
    "Tensor debug_attn_mask)"
)


@cache
def _backward(device_type: str) -> Any:
    """Return the operator of backward, which only several ranks call: PyTorch differentiates forward by itself."""
    if device_type == "cpu":
        return operator(
            "aten::_scaled_dot_product_flash_attention_for_cpu_backward(Tensor grad_out, Tensor query, Tensor key, "
            "Tensor value, Tensor out, Tensor logsumexp, float dropout_p, bool is_causal, *, Tensor? attn_mask=None, "
            "float? scale=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
        )
    return operator(
        "aten::_scaled_dot_product_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, "
        "Tensor out, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, "
        "float dropout_p, bool is_causal, Tensor philox_seed, Tensor philox_offset, *, float? scale=None) -> "
        "(Tensor grad_query, Tensor grad_key, Tensor grad_value)"
    )


def supports(params: SDPAParams) -> str | None:
    """Decline what FlashAttention-2's backward refuses on some GPUs."""
    gpu, size = compute_capability(params.query.device), params.query.shape[-1]
    if gpu is None or not lacks_backward(gpu, params):
        return None
    dropout = " with dropout" if size > 224 else ""
    return f"has no backward for head size {size}{dropout} on compute capability {gpu[0]}.{gpu[1]}"


def forward(params: SDPAParams) -> tuple[Tensor, Tensor]:
    """Return `out (B, Hq, Sq, E)` and `lse (B, Hq, Sq)`."""
    params = OF_FLASH.rewritten(params)
    if params.query.device.type == "cpu":
        return _forward_cpu(params)
    if (dim := OF_FLASH.cut(params)) is not None:
        outs, lses = zip(*map(forward, halves(params, dim)), strict=True)
        return torch.cat(outs, dim), torch.cat(lses, dim + 1)
    return _forward_cuda(params)


def partial_backward(params: SDPAParams, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value from `out` and `lse` over more keys than these; without dropout."""
    # Inside a backward nothing needs a gradient, which is what the fault's own question would begin with.
    if counts_too_far(params.query) and (dim := divisible(params)) is not None:
        return _partial_backward_in_halves(params, dim, grad_out, out, lse)
    call = OF_FLASH.rewritten(params)
    query, key, value = _with_dense_rows(call)
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))  # the probability of a key that no row sees is 0
    if query.device.type == "cpu":
        mask = as_additive(call.attn_mask, query.dtype)
        grads = _backward("cpu")(
            *(grad_out, query, key, value, out, lse, 0.0, call.is_causal), attn_mask=mask, scale=call.scale
        )
    else:
        none = torch.zeros(2, dtype=torch.uint64, device=query.device)
        grads = _backward("cuda")(
            *(grad_out, query, key, value, out, lse, None, None, query.shape[2], key.shape[2], 0.0, call.is_causal),
            *(none, none[1:].view(())),
            scale=call.scale,
        )
    if call.scale != params.scale:
        assert params.scale is not None
        grads = (grads[0] * (-1 if params.scale < 0 else 0), *grads[1:])
    return tuple(grads)


def _partial_backward_in_halves(
    params: SDPAParams, dim: int, grad_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    first, second = halves(params, dim)
    sizes = [half.query.shape[dim] for half in (first, second)]
    rows = zip(grad_out.split(sizes, dim), out.split(sizes, dim), lse.split(sizes, dim + 1), strict=True)
    grads = [partial_backward(half, *each) for half, each in zip((first, second), rows, strict=True)]
    query, key, value = (
        torch.cat(pair, dim) if pair[0].shape != whole.shape else pair[0] + pair[1]  # both halves have what is not cut
        for whole, pair in zip((params.query, params.key, params.value), zip(*grads, strict=True), strict=True)
    )
    return query, key, value


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor]:
    """Do what `forward` does, at once where the operator takes the tensors as they are."""
    if attn_mask is None and (scale is None or scale > 0.0):
        if query.is_cpu:
            if scale is not None:
                return _flash_cpu(query, key, value, 0.0, is_causal, scale=scale)
            return _flash_cpu(query, key, value, 0.0, True) if is_causal else _flash_cpu(query, key, value)
        if dropout < 1.0 and query.numel() < SMALL and is_aligned(query) and is_aligned(key) and is_aligned(value):
            out, lse, *_ = _flash_cuda(query, key, value, dropout, is_causal, scale=scale)
            return out, lse
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    if attn_mask is not None and attn_mask.dim() < 4:
        attn_mask = attn_mask.view(*(1,) * (4 - attn_mask.dim()), *attn_mask.shape)
    return forward(SDPAParams(query, key, value, attn_mask, dropout, is_causal, enable_gqa, scale=scale))


def prepare(params: SDPAParams) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor] | None] | None:
    """Return what runs a call on CUDA whose tensors are like these, if the operator takes them as they are."""
    if params.query.is_cpu or OF_FLASH.rewritten(params) is not params or OF_FLASH.cut(params) is not None:
        return None
    flash, dropout, is_causal = with_scale(bound(_flash_cuda), params), params.dropout, params.is_causal
    is_bare = not is_causal and dropout == 0  # an argument takes the binding 0.2 us to read

    def run(query: Tensor, key: Tensor, value: Tensor, mask: None = None) -> tuple[Tensor, Tensor] | None:
        if (query.data_ptr() | key.data_ptr() | value.data_ptr()) % ALIGNMENT:
            return None
        found = flash(query, key, value) if is_bare else flash(query, key, value, dropout, is_causal)
        return found[0], found[1]

    return run


def _forward_cpu(params: SDPAParams) -> tuple[Tensor, Tensor]:
    mask = as_additive(params.attn_mask, params.query.dtype)
    if mask is not None:
        # The operator rejects a mask that could have a gradient, wanted or not; `detach` would drop its tangent.
        mask = mask.view_as(mask)
    query, key, value = _with_dense_rows(params)
    out, lse = _flash_cpu(query, key, value, 0.0, params.is_causal, attn_mask=mask, scale=params.scale)
    if query.dtype is torch.float64:
        lse = lse.to(query.dtype)  # which it is; a trace of PyTorch 2.11 takes it for float32
    if mask is not None and params.return_lse:
        # The kernel writes 0 for a row that sees no key, where the logarithm of an empty sum is -inf.
        blind = (mask == float("-inf")).all(-1)
        if params.is_causal:
            blind = _blind_under_causal(mask, params.query.shape[-2], params.key.shape[-2])
        lse = lse.masked_fill(blind, float("-inf"))
    return out, lse


def _with_dense_rows(params: SDPAParams) -> tuple[Tensor, ...]:
    """Return query, key and value with a last stride of 1: the CPU kernel assumes it, and does not look."""
    query, key, value = params.query, params.key, params.value
    if query.stride()[-1] == key.stride()[-1] == value.stride()[-1] == 1:  # to ask for one stride takes twice as long
        return query, key, value
    return query.contiguous(), key.contiguous(), value.contiguous()


def _blind_under_causal(mask: Tensor, queries: int, keys: int) -> Tensor:
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu(1)
    return ((mask == float("-inf")) | hidden).all(-1)


def _forward_cuda(params: SDPAParams) -> tuple[Tensor, Tensor]:
    query, key, value = _with_dense_rows(params)
    out, lse, *_ = _flash_cuda(query, key, value, params.dropout, params.is_causal, scale=params.scale)
    # FlashAttention-2 marks a row that sees no key with +inf.
    return out, lse.masked_fill(lse == float("inf"), float("-inf")) if params.return_lse else lse
