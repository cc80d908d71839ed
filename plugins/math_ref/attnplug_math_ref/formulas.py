"""The formulas of scaled dot product attention and of its gradients.

This is the place to look up what an argument means. The numbers (1) to (15) are those of the page
"Semantics" in attnplug's documentation. Symbols: B batch, Hq query heads, Hkv key/value heads, Sq queries, Sk keys, E
and Ev head sizes; query `i`, key `j`.

Every function is made of differentiable PyTorch operators, the gradients too: second derivatives need
no further formulas. All logits are in memory at once; `blocks` splits a call so that they are few.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnplug_math_ref.dropout import keep_mask

_INF = float("inf")


@dataclass(frozen=True)
class Problem:
    """One call, or a part of one, as dense tensors.

    Attributes:
        query: `(B, Hq, Sq, E)`.
        key: `(B, Hkv, Sk, E)`, zero where no key exists.
        value: `(B, Hkv, Sk, Ev)`, zero where no key exists.
        mask: boolean or floating, of four dimensions, each 1 or that of `(B, Hq, Sq, Sk)`; or None.
        slopes: `(B or 1, Hq, 1, 1)`, or None.
        sinks: `(1, Hq, 1, 1)`, or None.
        used: how many keys exist, `(B, 1, 1, 1)`; None if all do.
        offset: query `i` stands at key position `i + offset`; a number or `(B, 1, 1, 1)`.
        dropout: `dropout_p`.
        streams: of dropout's random numbers, int64 `(B, Hq, Sq, 1)`; None without dropout.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    slopes: Tensor | None
    sinks: Tensor | None
    used: Tensor | None
    offset: int | Tensor
    scale: float
    softcap: float
    is_causal: bool
    window_size: tuple[int, int]
    dropout: float
    streams: Tensor | None


@dataclass(frozen=True)
class Gradients:
    """Gradients of a problem's tensors.

    `mask` is that of the logits after (4), `(B, Hq, Sq, Sk)`, still to be summed where the mask broadcasts;
    `sinks` is `(Hq,)`. Each is None where it has no gradient.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    sinks: Tensor | None


def attention(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return out `(B, Hq, Sq, Ev)` and lse `(B, Hq, Sq)`."""
    logits = masked_logits(problem, capped_products(problem))
    probabilities, lse = softmax(logits, problem.sinks)
    if problem.streams is not None:
        probabilities = probabilities * dropout_factors(problem)
    out = _per_kv_head(problem, probabilities) @ problem.value
    return _per_query_head(problem, out), lse


def capped_products(problem: Problem) -> Tensor:
    """(1) `scale * q @ k.T`, then (2) `softcap * tanh(... / softcap)`."""
    products = _per_kv_head(problem, problem.query * problem.scale) @ problem.key.mT
    if problem.softcap > 0:
        products = problem.softcap * torch.tanh(products / problem.softcap)
    return _per_query_head(problem, products)


def masked_logits(problem: Problem, logits: Tensor) -> Tensor:
    """(3) ALiBi, (4) attn_mask, (5) causality, (6) window: -inf where query `i` does not see key `j`."""
    queries, keys = logits.shape[-2:]
    i = torch.arange(queries, device=logits.device)[:, None]
    j = torch.arange(keys, device=logits.device)
    behind = i + problem.offset - j
    left, right = problem.window_size

    if problem.slopes is not None:
        logits = logits - problem.slopes * behind.abs()
    if problem.mask is not None:
        if problem.mask.dtype == torch.bool:
            logits = logits.masked_fill(~problem.mask, -_INF)
        else:
            logits = logits + problem.mask.to(logits.dtype)
    if problem.is_causal:
        logits = logits.masked_fill(behind < 0, -_INF)
    if left >= 0:
        logits = logits.masked_fill(behind > left, -_INF)
    if right >= 0:
        logits = logits.masked_fill(behind < -right, -_INF)
    if problem.used is not None:  # (12)
        logits = logits.masked_fill(j >= problem.used, -_INF)
    return logits


def softmax(logits: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """(7), (8), (9): return the probabilities `(B, Hq, Sq, Sk)` and the lse `(B, Hq, Sq)`.

    With the largest logit taken out first, the denominator is at least 1 and nothing overflows. Only a
    row that sees no key, and has no sink, has the denominator 0: (10) its probabilities are 0 and its
    lse is -inf. The replaced values keep every derivative of such a row 0 rather than NaN.
    """
    top = logits.detach().amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks.detach())
    top = top.masked_fill(top == -_INF, 0)
    weights = torch.exp(logits - top)
    denominator = weights.sum(-1, keepdim=True)
    if sinks is not None:
        denominator = denominator + torch.exp(sinks - top)
    empty = denominator == 0
    denominator = denominator.masked_fill(empty, 1)
    lse = (top + torch.log(denominator)).masked_fill(empty, -_INF)
    return weights / denominator, lse.squeeze(-1)


def dropout_factors(problem: Problem) -> Tensor:
    """(8) Return what probabilities are multiplied by: 0, or `1 / (1 - dropout_p)` where kept."""
    assert problem.streams is not None
    kept = keep_mask(problem.streams, problem.key.shape[2], problem.dropout)
    return kept.to(problem.query.dtype) * (1 / (1 - problem.dropout) if problem.dropout < 1 else 0.0)


def attention_backward(problem: Problem, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """(15) Return the gradients, given those of out `(B, Hq, Sq, Ev)` and of lse `(B, Hq, Sq)` or None.

    With `S` the logits, `C` the capped products, `P = softmax(S)`, `Z` the dropout factors (1 without
    dropout), `p` the sink's own probability and `'` for gradients:

        out = (P Z) V                  V' = (P Z)^T out'          P' = Z (out' V^T)
        P, lse = softmax(S, sink)      S' = P (P' + r)            sink' = sum_i p r
                                       r = lse' - sum_j P P'
        S = C + mask                   mask' = C' = S'
        C = cap(scale Q K^T)           Q' = scale D K             K' = scale D^T Q
                                       D = C' (1 - (C / softcap)^2)

    The probabilities are computed anew from the logits rather than from forward's lse, and `sum_j P P'`
    is not taken from forward's out: so when this is differentiated again, its graph is complete.
    """
    capped = capped_products(problem)
    logits = masked_logits(problem, capped)
    probabilities, lse = softmax(logits, problem.sinks)
    # (10) A row's gradients are 0 if it sees nothing, whatever comes in for its constant results.
    blind = logits.detach().amax(-1, keepdim=True) == -_INF
    grad_out = _per_kv_head(problem, grad_out.masked_fill(blind, 0))
    # Here and below, what is as large as the logits goes as soon as it can.
    del logits

    grad_probabilities = _per_query_head(problem, grad_out @ problem.value.mT)
    dropped = probabilities
    if problem.streams is not None:
        factors = dropout_factors(problem)
        dropped = probabilities * factors
        grad_probabilities = grad_probabilities * factors
        del factors
    grad_value = _per_kv_head(problem, dropped).mT @ grad_out
    del dropped

    rest = -(probabilities * grad_probabilities).sum(-1)
    if grad_lse is not None:
        rest = rest + grad_lse.masked_fill(lse == -_INF, 0)
    grad_logits = probabilities * (grad_probabilities + rest[..., None])
    del probabilities, grad_probabilities
    grad_sinks = None
    if problem.sinks is not None:
        sink_probability = torch.exp(problem.sinks[..., 0] - lse.masked_fill(lse == -_INF, 0))
        grad_sinks = (sink_probability * rest).sum((0, 2))

    grad_products = grad_logits
    if problem.softcap > 0:
        grad_products = grad_logits * (1 - (capped / problem.softcap) ** 2)
    del capped
    grad_products = _per_kv_head(problem, grad_products)
    query = _per_kv_head(problem, problem.query * problem.scale)
    return Gradients(
        query=_per_query_head(problem, grad_products @ problem.key) * problem.scale,
        key=grad_products.mT @ query,
        value=grad_value,
        mask=grad_logits,
        sinks=grad_sinks,
    )


def _per_kv_head(problem: Problem, rows: Tensor) -> Tensor:
    """(11) View `(B, Hq, Sq, n)` as `(B, Hkv, Hq / Hkv * Sq, n)`: all rows that read one key/value head.

    So grouped queries need no repeated keys and values, and a product that sums over rows sums the
    gradients of a group.
    """
    batch, heads, queries, size = rows.shape
    kv_heads = problem.key.shape[1]
    return rows.reshape(batch, kv_heads, heads // kv_heads * queries, size)


def _per_query_head(problem: Problem, rows: Tensor) -> Tensor:
    """View `(B, Hkv, Hq / Hkv * Sq, n)` as `(B, Hq, Sq, n)`."""
    return rows.reshape(*problem.query.shape[:3], rows.shape[3])
