"""`efficient_cuda`: the CUTLASS kernel behind PyTorch's memory-efficient attention, called directly.

`F.scaled_dot_product_attention` reaches a part of what this kernel does, and never says why it did not.
Where the kernel departs from the contract, the modules beside this one convert, or `supports` declines;
the sources are PyTorch's `attention.cu`, `attention_backward.cu` and `mem_eff_attention/kernel_*.h`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnplug import SDPAParams
from attnplug_efficient_cuda import dense, geometry, hardware, layout, operators, packed


def forward(params: SDPAParams) -> tuple[Tensor, ...]:
    """Return `out`, `lse` and, with dropout, the seed and offset of each launch."""
    params, _ = params.with_positive_scale()
    if params.is_varlen:
        return packed.forward(params)
    if params.seqused_k is not None:
        out, lse = packed.forward(packed.from_dense(params))
        batch = params.query.shape[0]
        return packed.to_dense(out, batch), layout.compact(lse.reshape(lse.shape[0], batch, -1).transpose(0, 1))
    if not geometry.causal_or_open(params) or (params.dropout > 0 and geometry.shifted_window(params)):
        params = geometry.window_as_mask(params)  # as backward does, which numbers its draws by what it is given
    if params.dropout == 1:  # nothing is left, and the kernel would divide by what is
        out, lse = dense.forward(replace(params, dropout=0.0))
        return torch.zeros_like(out), lse
    return dense.forward(params)


def backward(
    params: SDPAParams, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor | None, *saved: Tensor
) -> tuple[Any, ...]:
    """Return the gradients of query, key, value and, of a dense call, the mask; lse has none here."""
    if lse is None:  # as it was prepared
        lse, saved = layout.part(saved[0], 2, (0, params.query.shape[2])), ()
    params, sign = params.with_positive_scale()
    grad_query, *others = _backward(params, grad_out, out, lse, *saved)
    return grad_query if sign == 1 else grad_query * sign, *others


def _backward(params: SDPAParams, grad_out: Tensor, out: Tensor, lse: Tensor, *saved: Tensor) -> tuple[Any, ...]:
    if params.is_varlen:
        return packed.backward(params, grad_out, out, lse)
    if params.seqused_k is not None:
        tokens, batch = packed.from_dense(params), params.query.shape[0]
        grad_tokens, out_tokens = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (grad_out, out))
        grads = packed.backward(tokens, grad_tokens, out_tokens, lse.transpose(0, 1).flatten(1))
        return tuple(packed.to_dense(grad, batch) for grad in grads)
    if params.dropout == 1:
        tensors = (params.query, params.key, params.value, params.attn_mask)
        return tuple(None if tensor is None else torch.zeros_like(tensor) for tensor in tensors)
    if not geometry.causal_or_open(params) or geometry.shifted_window(params):
        params = geometry.window_as_mask(params)
    return dense.backward(params, grad_out, out, lse, *saved)


prepare, prepare_packed, prepare_backward = dense.prepare, packed.prepare, dense.prepare_backward


def unavailable() -> tuple[str, ...]:
    """Return how PyTorch's operators differ from those that this plugin was written for."""
    return operators.changed("_efficient_attention_forward", "_efficient_attention_backward")


def supports(params: SDPAParams) -> list[str]:
    """Return each reason why the kernel cannot take this call, or would take it wrongly."""
    reasons: list[str] = []
    if too_new := hardware.too_new(params.query.device):
        reasons.append(too_new)
    if params.is_varlen or params.seqused_k is not None:
        reasons += _sequence_reasons(params)
    return reasons


def _sequence_reasons(params: SDPAParams) -> list[str]:
    """Return what goes wrong, or is missing, where each sequence has a length of its own."""
    where = "with variable-length sequences or seqused_k"
    reasons = []
    if not geometry.causal_or_open(params):
        reasons.append(
            f"has windows {where} only up to the diagonal (right side 0, or is_causal), "
            f"got window_size={params.window_size}"
        )
    if geometry.shifted_window(params) and params.needs_grad:
        reasons.append(f"has a backward {where} that places windows without the lower-right offset")
    if params.attn_mask is not None:
        reasons.append(f"takes no attn_mask {where}")
    if params.dropout > 0:
        reasons.append(f"draws other random numbers in the backward {where} than in the forward")
    return reasons


def fake(params: SDPAParams) -> tuple[Tensor, ...]:
    """Return tensors of the shapes and strides of forward's."""
    query, value = params.query, params.value
    if not params.is_varlen:
        return dense.empty_result(params)
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
    return query.new_empty((*query.shape[:-1], value.shape[-1])), lse
