"""The kernel `math_ref`: the formulas, one part of a call after the other.

Backward computes the probabilities again: between forward and backward, only the seed of dropout is
kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnplug import SDPAParams
from attnplug_math_ref.blocks import accumulation_dtype, parts, take
from attnplug_math_ref.dropout import draw_seed
from attnplug_math_ref.formulas import attention, attention_backward
from attnplug_math_ref.layout import as_problem, pack_key_gradient, pack_rows, pad_rows

composite = True


def forward(params: SDPAParams) -> tuple[Tensor, ...]:
    """Return out, lse and, with dropout, its seed.

    out is `(B, Hq, Sq, Ev)` in the query's dtype, or `(Tq, Hq, Ev)`; lse is `(B, Hq, Sq)`, or `(Hq, Tq)`,
    in float32, or float64 for float64.
    """
    seed = draw_seed(params.query.device) if params.dropout > 0 else None
    problem = as_problem(params)
    # Made before the loop: results kept between a part's temporaries would fragment the heap.
    rows, dtype = problem.query.shape[:3], accumulation_dtype(params.query)
    out = params.query.new_empty(*rows, problem.value.shape[3])
    lse = params.query.new_empty(rows, dtype=dtype)
    for part in parts(problem.query, problem.key):
        part_out, part_lse = attention(take(problem, part, seed))
        part.of_rows(out).copy_(part_out)
        part.of_rows(lse).copy_(part_lse)
    if params.is_varlen:
        out = pack_rows(params, out, outside=0.0)
        lse = pack_rows(params, lse[..., None], outside=float("-inf"))[..., 0].T.contiguous()
    return (out, lse) if seed is None else (out, lse, seed)


def backward(
    params: SDPAParams,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, attn_mask and sinks, differentiable in turn.

    `out` and `lse` are not used; `attention_backward` says why.
    """
    problem, dtype = as_problem(params), accumulation_dtype(params.query)
    if params.is_varlen:
        grad_out = pad_rows(params, grad_out)
        grad_lse = None if grad_lse is None else pad_rows(params, grad_lse.T[..., None])[..., 0]

    query = torch.zeros_like(problem.query)
    key, value = (torch.zeros_like(tensor, dtype=dtype) for tensor in (problem.key, problem.value))
    mask = _zeros_if_wanted(params.attn_mask, dtype)
    sinks = _zeros_if_wanted(params.sinks, dtype)
    for part in parts(problem.query, problem.key):
        added = attention_backward(
            take(problem, part, seed),
            part.of_rows(grad_out).to(dtype),
            None if grad_lse is None else part.of_rows(grad_lse),
        )
        part.of_rows(query).copy_(added.query)
        part.of_keys(key).add_(added.key)
        part.of_keys(value).add_(added.value)
        if mask is not None:
            at = part.of_rows(mask)
            at.add_(added.mask.sum_to_size(at.shape))
        if sinks is not None and added.sinks is not None:
            sinks[part.heads.start : part.heads.stop] += added.sinks

    if params.is_varlen:
        query = pack_rows(params, query, outside=0.0)
        key, value = pack_key_gradient(params, key), pack_key_gradient(params, value)
    key, value = key.to(params.key.dtype), value.to(params.value.dtype)
    return query, key, value, mask, None if sinks is None else sinks.to(params.sinks.dtype)


def _zeros_if_wanted(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return where the gradient of `tensor` is summed, or None if it has none."""
    return None if tensor is None or not tensor.requires_grad else torch.zeros_like(tensor, dtype=dtype)
