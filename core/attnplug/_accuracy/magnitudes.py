"""How large the sums are that each element of a result is made of.

A kernel may round every term of a sum differently, and no more: what that can change is a few units in the last
place of the sum of the terms' absolute values. These are the formulas of a call with every product replaced by its
absolute value: `out`: `P|V|`; `grad V`: `P'|dO|`; `|dP| = |dO||V|'`, `delta = sum |dO||out|`,
`|dS| = P (|dP| + delta)`; `grad Q`: `scale |dS||K|`; `grad K`: `scale |dS|'|Q|`; mask and sinks likewise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnplug._accuracy.formula import OPPOSITE, Block, Form, grouped_product, logits, products

_INF = float("inf")


def sums(form: Form, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute a block as `formula.plain` does, but for absolute values, forward and backward.

    Everything between the call and its blocks (sequences, pages, broadcast masks, sinks of all queries) only copies
    and adds, so autograd carries the sums of a block to those of the call.
    """
    block = Block(*tensors)  # type: ignore[arg-type]  # `Block.tensors` gave them
    rows = (*block.query.shape[:3], block.key.shape[2])
    mask = block.mask
    bias = mask.to(form.dtype).expand(rows) if mask is not None and mask.is_floating_point() else None
    column = None
    if block.sinks is not None:
        column = block.sinks.to(form.dtype)[None, :, None].expand(rows[:3])
    query, key, value = (tensor.to(form.dtype) for tensor in (block.query, block.key, block.value))
    made: tuple[Tensor, Tensor] = _Sums.apply(query, key, value, bias, column, block, form)
    return made


class _Sums(torch.autograd.Function):
    apply: Any  # PyTorch's has no types

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        *tensors, block, form = given
        ctx.save_for_backward(*tensors)
        ctx.block, ctx.form = block, form
        value, column = tensors[2], tensors[4]
        probabilities, _, lse = _probabilities(form, block, column)
        kept = probabilities if block.factors is None else probabilities * block.factors
        return grouped_product(kept, value.abs(), OPPOSITE), lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, bias, column = ctx.saved_tensors
        block, form = ctx.block, ctx.form
        probabilities, sink, lse = _probabilities(form, block, column)
        factors = torch.ones_like(probabilities) if block.factors is None else block.factors
        grad_out = grad_out.abs()
        out = grouped_product(probabilities * factors, value, OPPOSITE)
        delta = (grad_out * out.abs()).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta + grad_lse.abs().masked_fill(lse == -_INF, 0)[..., None]
        grad_weights = factors * grouped_product(grad_out, value.abs().mT, OPPOSITE)
        grad_logits = probabilities * (grad_weights + delta)
        grad_products = grad_logits
        if form.softcap > 0:
            grad_products = grad_logits * (1 - (products(form, block) / form.softcap) ** 2)
        grad_products = abs(form.scale) * grad_products
        kv_heads = key.shape[1]
        return (
            grouped_product(grad_products, key.abs(), OPPOSITE),
            _of_groups(grad_products.mT @ query.abs(), kv_heads),
            _of_groups((probabilities * factors).mT @ grad_out, kv_heads),
            None if bias is None else grad_logits,
            None if sink is None else sink * delta[..., 0],
            None,
            None,
        )


def _probabilities(form: Form, block: Block, column: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the probabilities, that of the sink, and lse."""
    with torch.no_grad():
        found = logits(form, block)
        lse = torch.logsumexp(found, -1) if found.shape[-1] else found.new_full(found.shape[:3], -_INF)
        if column is not None:
            lse = torch.logaddexp(lse, column)
        finite = lse.masked_fill(lse == -_INF, 0)
        sink = None if column is None else torch.exp(column - finite)
        return torch.exp(found - finite[..., None]), sink, lse


def _of_groups(gradient: Tensor, kv_heads: int) -> Tensor:
    """Sum `(B, Hq, Sk, n)` over the query heads that read a key/value head."""
    heads = gradient.shape[1]
    return gradient if heads == kv_heads else gradient.unflatten(1, (kv_heads, heads // kv_heads)).sum(2)
