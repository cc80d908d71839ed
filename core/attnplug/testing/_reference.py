"""The formulas of one call, written once more, to hold every kernel against.

Nothing here is shared with an implementation, `math_ref` included: that one is tested too. One function
gives both results that a comparison needs: `ref`, in float64, and `low`, the plain
formula with every operation in the input's own dtype. Both are differentiable.

A formula does not say in which order to round, and the largest error of one order is a matter of luck: so
`low` is computed in the orders that kernels have, and the worst one counts. `ref` has an order of its own:
for float64 inputs the numbers would else be the same, and leave no room for any other order.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

LOWER_RIGHT = 2
DIVIDED, HALVED, THROUGH_LSE, OPPOSITE = "divided", "halved", "through lse", "opposite"
"""Orders of rounding: weights divided by their sum; the same with each sum in two halves; as in a fused
kernel, whose backward has probabilities from lse, the sum of each row from out, and the rows of a group
of heads together; and, for `ref`, scaled earlier and summed from the other end."""
LOWS = (DIVIDED, HALVED, THROUGH_LSE)
_INF = float("inf")


def attention(
    arguments: dict[str, Any], dtype: torch.dtype, order: str, factors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return out and lse of a call, dense or of variable length, in `dtype`.

    Args:
        arguments: those of `attnplug.scaled_dot_product_attention` (four dimensions) or, if `cu_seq_q` is
            among them, of `attnplug.varlen_attn`.
        dtype: what to compute in.
        order: of rounding.
        factors: what dropout multiplies the probabilities with, in the shape of out: for each query, as many
            as there are columns in value, which must then be no fewer than the keys of any sequence.
    """
    given = {**arguments, "dtype": dtype, "order": order, "factors": factors}
    used = given.pop("seqused_k", None)
    if "cu_seq_q" in given:
        return _varlen(given, used)
    given["causal_variant"] = int(given.get("causal_variant", 1))
    if used is None:
        return dense(**given)
    rows = [_one_sequence(given, b, int(n)) for b, n in enumerate(used)]
    return torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows])


def dense(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dtype: torch.dtype,
    order: str,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_variant: int = 1,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    factors: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return out `(B, Hq, Sq, Ev)` and lse `(B, Hq, Sq)`; the numbers are those of the documentation's
    page "Semantics"."""
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if order == DIVIDED:  # 1
        logits = _grouped_product(query, key.mT, order) * scale
    else:
        logits = _grouped_product(query * scale, key.mT, order)
    if softcap > 0:  # 2
        logits = softcap * torch.tanh(logits / softcap)
    offset = keys - queries if causal_variant == LOWER_RIGHT else 0
    position = torch.arange(queries, device=query.device)[:, None] + offset
    j = torch.arange(keys, device=query.device)
    if alibi_slopes is not None:  # 3
        logits = logits - alibi_slopes.to(dtype).reshape(-1, heads, 1, 1) * (position - j).abs().to(dtype)
    hidden = torch.zeros(queries, keys, dtype=torch.bool, device=query.device)
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # 4
        hidden = hidden | ~attn_mask
    elif attn_mask is not None:
        logits = logits + attn_mask.to(dtype)
    if is_causal:  # 5
        hidden = hidden | (j > position)
    left, right = window_size
    if left >= 0:  # 6
        hidden = hidden | (j < position - left)
    if right >= 0:
        hidden = hidden | (j > position + right)
    probabilities, total, lse = _softmax(logits.masked_fill(hidden, -_INF), sinks, order)
    if factors is not None:  # 8
        probabilities = probabilities * factors[..., :keys].to(dtype)
    out = _grouped_product(probabilities, value, order)
    if order == THROUGH_LSE:  # adds 0; the gradient of the row's sum is then that of out times out
        out = out - out.detach() * (total - total.detach())
    return out, lse


def _softmax(logits: Tensor, sinks: Tensor | None, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """(7) to (10): probabilities, their sums with the sink's, and lse.

    The replaced infinities keep every gradient of a row that sees nothing 0.
    """
    if sinks is not None:
        batch, heads, queries, _ = logits.shape
        column = sinks.to(logits.dtype)[None, :, None, None].expand(batch, heads, min(queries, 1), 1)
        # The same tensor again and again has its gradient summed one query after the other, as kernels do.
        column = torch.cat([column] * max(queries, 1), 2) if order == HALVED else column.expand(-1, -1, queries, 1)
        logits = torch.cat([logits, column], -1)
    top = logits.detach().amax(-1, keepdim=True) if logits.shape[-1] else logits.new_full((*logits.shape[:3], 1), -_INF)
    blind = top == -_INF
    weights = torch.exp(logits - top.masked_fill(blind, 0))
    denominator = (weights.flip(-1) if order == OPPOSITE else weights).sum(-1, keepdim=True).masked_fill(blind, 1)
    lse = (top.masked_fill(blind, 0) + torch.log(denominator)).masked_fill(blind, -_INF).squeeze(-1)
    if order == THROUGH_LSE:
        probabilities = torch.exp(logits - lse.detach().masked_fill(lse == -_INF, 0)[..., None])
    else:
        probabilities = weights / denominator
    total = probabilities.sum(-1, keepdim=True)
    return probabilities if sinks is None else probabilities[..., :-1], total, lse


def _grouped_product(rows: Tensor, columns: Tensor, order: str) -> Tensor:
    """(11) Multiply `(B, Hq, Sq, n)` with `(B, Hkv, n, m)`, query head `h` with head `h // (Hq / Hkv)`."""
    heads, kv_heads = rows.shape[1], columns.shape[1]
    if order == THROUGH_LSE and heads != kv_heads:
        together = rows.unflatten(1, (kv_heads, heads // kv_heads)).flatten(2, 3)
        return _product(together, columns, order).unflatten(2, (-1, rows.shape[2])).flatten(1, 2)
    return _product(rows, columns.repeat_interleave(heads // max(1, kv_heads), 1), order)


def _product(left: Tensor, right: Tensor, order: str) -> Tensor:
    if order == OPPOSITE:
        return _matmul(left.flip(-1), right.flip(-2))
    if order == HALVED:
        half = left.shape[-1] // 2
        return _matmul(left[..., :half], right[..., :half, :]) + _matmul(left[..., half:], right[..., half:, :])
    return _matmul(left, right)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """(13) Sums of half types are float32: not every library's are by themselves, and on a CPU they are slow."""
    if left.dtype in (torch.float16, torch.bfloat16):
        return (left.float() @ right.float()).to(left.dtype)
    return left @ right


def _one_sequence(given: dict[str, Any], b: int, used: int) -> tuple[Tensor, Tensor]:
    """(12) A sequence of a dense batch, with only the `used` first of its keys."""
    one = dict(given)
    one["query"] = given["query"][b : b + 1]
    one["key"], one["value"] = (given[name][b : b + 1, :, :used] for name in ("key", "value"))
    mask, slopes = given.get("attn_mask"), given.get("alibi_slopes")
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        mask = mask[b : b + 1] if mask.shape[0] > 1 else mask
        one["attn_mask"] = mask[..., :used] if mask.shape[-1] > 1 else mask
    if slopes is not None and slopes.dim() == 2:
        one["alibi_slopes"] = slopes[b]
    if given["factors"] is not None:
        one["factors"] = given["factors"][b : b + 1]
    return dense(**one)


def _varlen(given: dict[str, Any], used: Tensor | None) -> tuple[Tensor, Tensor]:
    """(5), (12) Sequence by sequence, each aligned to its lower right."""
    cu_seq_q, cu_seq_k, table = (given.pop(name, None) for name in ("cu_seq_q", "cu_seq_k", "block_table"))
    starts = cu_seq_q.tolist()
    query, slopes = given["query"], given.get("alibi_slopes")
    outs, lses = [], []
    for b, (start, stop) in enumerate(pairwise(starts)):
        one = dict(given, query=query[None, start:stop].transpose(1, 2), causal_variant=LOWER_RIGHT)
        for name in ("key", "value"):
            tokens = _tokens(given[name], cu_seq_k, table, used, b)
            one[name] = tokens[None].transpose(1, 2)
        if slopes is not None and slopes.dim() == 2:
            one["alibi_slopes"] = slopes[b]
        if given["factors"] is not None:
            one["factors"] = given["factors"][None, start:stop].transpose(1, 2)
        out, lse = dense(**one)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def _tokens(keys: Tensor, cu_seq_k: Tensor | None, table: Tensor | None, used: Tensor | None, b: int) -> Tensor:
    """Return the keys or values of sequence `b`, `(Sk, Hkv, E)`, wherever they are."""
    count = int(used[b]) if used is not None else int(cu_seq_k[b + 1] - cu_seq_k[b])  # type: ignore[index]
    if table is not None:
        return keys[table[b].long().clamp(0, keys.shape[0] - 1)].flatten(0, 1)[:count]
    start = int(cu_seq_k[b])  # type: ignore[index]
    return keys[start : start + count]
