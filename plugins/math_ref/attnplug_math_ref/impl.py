"""The kernel `math_ref`: the formulas, one part of a call after the other.

Backward computes the probabilities again: between forward and backward, only the seed of dropout is
kept.
"""

from __future__ import annotations

from torch import Tensor

from attnplug import SDPAParams
from attnplug_math_ref.blocks import accumulation_dtype, parts, take
from attnplug_math_ref.dropout import draw_seed
from attnplug_math_ref.formulas import Gradients, Problem, attention, attention_backward
from attnplug_math_ref.layout import as_problem, pack_key_gradient, pack_rows, pad_rows

composite = True


def forward(params: SDPAParams) -> tuple[Tensor, ...]:
    """Return out, lse and, with dropout, its seed.

    out is `(B, Hq, Sq, Ev)` in the query's dtype, or `(Tq, Hq, Ev)`; lse is `(B, Hq, Sq)`, or `(Hq, Tq)`,
    in float32, or float64 for float64.
    """
    seed = draw_seed(params.query.device) if params.dropout > 0 else None
    problem = as_problem(params)
    rows, out, lse = problem.query.shape[:3], None, None
    for part in parts(problem.query, problem.key):
        part_out, part_lse = attention(take(problem, part, seed))
        if part.is_whole:
            out, lse = part_out.to(params.query.dtype), part_lse
            break
        if out is None or lse is None:
            # Whole from the first part on: results kept between the parts' temporaries would fragment the heap. Like
            # the first part's own, because vmap may have a dimension that only one of the inputs has.
            out = part_out.new_empty(*rows, problem.value.shape[3], dtype=params.query.dtype)
            lse = part_lse.new_empty(rows)
        part.of_rows(out).copy_(part_out)
        part.of_rows(lse).copy_(part_lse)
    assert out is not None
    assert lse is not None
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

    whole: Gradients | None = None
    for part in parts(problem.query, problem.key):
        added = attention_backward(
            take(problem, part, seed),
            part.of_rows(grad_out).to(dtype),
            None if grad_lse is None else part.of_rows(grad_lse),
        )
        if whole is None:
            whole = _zeros(params, problem, added)
        part.of_rows(whole.query).copy_(added.query)
        part.of_keys(whole.key).add_(added.key)
        part.of_keys(whole.value).add_(added.value)
        if whole.mask is not None and added.mask is not None:
            at = part.of_rows(whole.mask)
            at.add_(added.mask.sum_to_size(at.shape))
        if whole.sinks is not None and added.sinks is not None:
            whole.sinks[part.heads.start : part.heads.stop] += added.sinks
    assert whole is not None

    query, key, value, sinks = whole.query, whole.key, whole.value, whole.sinks
    if params.is_varlen:
        query = pack_rows(params, query, outside=0.0)
        key, value = pack_key_gradient(params, key), pack_key_gradient(params, value)
    key, value = key.to(params.key.dtype), value.to(params.value.dtype)
    return query, key, value, whole.mask, None if sinks is None else sinks.to(params.sinks.dtype)


def _zeros(params: SDPAParams, problem: Problem, part: Gradients) -> Gradients:
    """Return where the gradients are summed, each of the kind of a part's own: vmap may have a dimension in it."""

    def zeros(gradient: Tensor | None, tensor: Tensor | None) -> Tensor | None:
        if gradient is None or tensor is None or not tensor.requires_grad:
            return None
        return gradient.new_zeros(tensor.shape)

    return Gradients(
        query=part.query.new_zeros(problem.query.shape, dtype=problem.query.dtype),
        key=part.key.new_zeros(problem.key.shape),
        value=part.value.new_zeros(problem.value.shape),
        mask=zeros(part.mask, params.attn_mask),
        sinks=zeros(part.sinks, params.sinks),
    )
