"""The formulas of one call, written once more, to hold every kernel against.

Nothing here is shared with an implementation, `math_ref` included: that one is tested too. One function
gives both results that a comparison needs: `ref`, in float64, and `low`, the plain
formula with every operation in the input's own dtype. Both are differentiable.

A formula does not say in which order to round, and the largest error of one order is a matter of luck: so
`low` is computed in the orders that kernels have, and the worst one counts. `ref` has an order of its own:
for float64 inputs the numbers would else be the same, and leave no room for any other order.

Scores take memory for each pair of query and key. Of a long sequence only a block of rows is computed at a time,
and computed again in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOWER_RIGHT = 2
DIVIDED, HALVED, THROUGH_LSE, OPPOSITE = "divided", "halved", "through lse", "opposite"
"""Orders of rounding: weights divided by their sum; the same with each sum in two halves; as in a fused
kernel, whose backward has probabilities from lse, the sum of each row from out, and the rows of a group
of heads together; and, for `ref`, scaled earlier and summed from the other end."""
LOWS = (DIVIDED, HALVED, THROUGH_LSE)
SCORES = {"cpu": 2**22, "cuda": 2**25}
"""How many scores a block has at most, for each device type."""
_INF = float("inf")


@dataclass(frozen=True)
class Form:
    """What a block is computed with, beside its tensors.

    Attributes:
        dtype: what to compute in.
        order: of rounding.
        first: the key position of the block's first query.
        scale, softcap, is_causal, window_size: as in the call.
    """

    dtype: torch.dtype
    order: str
    first: int
    scale: float
    softcap: float = 0.0
    is_causal: bool = False
    window_size: tuple[int, int] = (-1, -1)


@dataclass(frozen=True)
class Block:
    """The tensors of a block: `query (B, Hq, n, E)`, `key (B, Hkv, Sk, E)`, `value (B, Hkv, Sk, Ev)`.

    `mask` has four dimensions that broadcast to `(B, Hq, n, Sk)`, `sinks` is `(Hq,)`, `slopes` `(1 or B, Hq, 1, 1)`,
    `factors` of dropout `(B, Hq, n, Sk)`; each may be None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    factors: Tensor | None = None

    def rows(self, start: int, stop: int) -> Block:
        """Return the block of some of the queries."""
        mask, factors = self.mask, self.factors
        return Block(
            self.query[:, :, start:stop],
            self.key,
            self.value,
            mask[:, :, start:stop] if mask is not None and mask.shape[2] > 1 else mask,
            self.sinks,
            self.slopes,
            None if factors is None else factors[:, :, start:stop],
        )

    def sequence(self, b: int, used: int | None = None) -> Block:
        """Return the block of one sequence of the batch, with only the `used` first of its keys."""
        mask, slopes = self.mask, self.slopes
        if mask is not None:
            mask = mask[b : b + 1] if mask.shape[0] > 1 else mask
            mask = mask[..., :used] if mask.shape[3] > 1 else mask
        return Block(
            self.query[b : b + 1],
            self.key[b : b + 1, :, :used],
            self.value[b : b + 1, :, :used],
            mask,
            self.sinks,
            slopes[b : b + 1] if slopes is not None and slopes.shape[0] > 1 else slopes,
            None if self.factors is None else self.factors[b : b + 1, ..., :used],
        )

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.query, self.key, self.value, self.mask, self.sinks, self.slopes, self.factors


Compute = Callable[..., tuple[Tensor, Tensor]]


def plain(form: Form, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return out `(B, Hq, n, Ev)` and lse `(B, Hq, n)` of a block; the numbers are those of "Semantics"."""
    block = Block(*tensors)  # type: ignore[arg-type]  # `Block.tensors` gave them
    value = block.value.to(form.dtype)
    probabilities, total, lse = _softmax(logits(form, block), block.sinks, form.order)
    if block.factors is not None:  # 8
        probabilities = probabilities * block.factors.to(form.dtype)
    out = grouped_product(probabilities, value, form.order)
    if form.order == THROUGH_LSE:  # adds 0; the gradient of the row's sum is then that of out times out
        out = out - out.detach() * (total - total.detach())
    return out, lse


def attention(
    arguments: dict[str, Any],
    dtype: torch.dtype,
    order: str,
    factors: Tensor | None = None,
    compute: Compute = plain,
) -> tuple[Tensor, Tensor]:
    """Return out and lse of a call, dense or of variable length, in `dtype`.

    Args:
        arguments: those of `attnplug.scaled_dot_product_attention` (four dimensions) or, if `cu_seq_q` is
            among them, of `attnplug.varlen_attn`.
        dtype: what to compute in.
        order: of rounding.
        factors: what dropout multiplies the probabilities with, in the shape of out: for each query, as many
            as there are columns in value, which must then be no fewer than the keys of any sequence.
        compute: of one block.
    """
    query, used = arguments["query"], arguments.get("seqused_k")
    scale = arguments.get("scale")
    common: dict[str, Any] = {
        "dtype": dtype,
        "order": order,
        "scale": query.shape[-1] ** -0.5 if scale is None else scale,
        "softcap": arguments.get("softcap", 0.0),
        "is_causal": arguments.get("is_causal", False),
        "window_size": tuple(arguments.get("window_size", (-1, -1))),
    }
    if arguments.get("cu_seq_q") is not None:
        return _varlen(arguments, used, factors, common, compute)
    whole = _dense_block(arguments, factors)
    variant = int(arguments.get("causal_variant", 1))
    if used is None:
        return _in_blocks(whole, variant, common, compute)
    rows = [_in_blocks(whole.sequence(b, int(n)), variant, common, compute) for b, n in enumerate(used)]
    return torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows])


def _dense_block(arguments: dict[str, Any], factors: Tensor | None) -> Block:
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    mask, slopes = arguments.get("attn_mask"), arguments.get("alibi_slopes")
    if not query.dim() == key.dim() == value.dim() == 4:
        raise ValueError(f"query: expected four dimensions (B, Hq, Sq, E), got {tuple(query.shape)}")
    return Block(
        query,
        key,
        value,
        None if mask is None else mask.reshape((1,) * (4 - mask.dim()) + mask.shape),
        arguments.get("sinks"),
        None if slopes is None else slopes.reshape(-1, query.shape[1], 1, 1),
        None if factors is None else factors[..., : key.shape[2]],
    )


def _in_blocks(whole: Block, variant: int, common: dict[str, Any], compute: Compute) -> tuple[Tensor, Tensor]:
    """Compute a dense block, or, if it has too many scores, some rows of it at a time."""
    (batch, heads, queries, _), keys = whole.query.shape, whole.key.shape[2]
    first = keys - queries if variant == LOWER_RIGHT else 0
    most = SCORES.get(whole.query.device.type, SCORES["cpu"])
    if batch * heads * queries * keys <= most:
        return compute(Form(first=first, **common), *whole.tensors())
    step = max(1, most // max(1, heads * keys))
    outs, lses = [], []
    for one in (whole.sequence(b) for b in range(batch)):
        parts = [
            _again_in_backward(compute, Form(first=first + start, **common), one.rows(start, start + step))
            for start in range(0, queries, step)
        ]
        outs.append(torch.cat([out for out, _ in parts], 2))
        lses.append(torch.cat([lse for _, lse in parts], 2))
    return torch.cat(outs), torch.cat(lses)


def _again_in_backward(compute: Compute, form: Form, block: Block) -> tuple[Tensor, Tensor]:
    if not torch.is_grad_enabled():
        return compute(form, *block.tensors())
    made: tuple[Tensor, Tensor] = checkpoint(
        compute, form, *block.tensors(), use_reentrant=False, preserve_rng_state=False
    )
    return made


def visible(form: Form, queries: int, keys: int, device: torch.device) -> Tensor:
    """(5), (6) Return which of the block's queries may see which keys, as far as positions decide."""
    position = torch.arange(queries, device=device)[:, None] + form.first
    j = torch.arange(keys, device=device)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if form.is_causal:
        seen = seen & (j <= position)
    left, right = form.window_size
    if left >= 0:
        seen = seen & (j >= position - left)
    if right >= 0:
        seen = seen & (j <= position + right)
    return seen


def products(form: Form, block: Block) -> Tensor:
    """(1), (2) Return the scaled and capped products of queries and keys."""
    query, key = block.query.to(form.dtype), block.key.to(form.dtype)
    if form.order == DIVIDED:
        scaled = grouped_product(query, key.mT, form.order) * form.scale
    else:
        scaled = grouped_product(query * form.scale, key.mT, form.order)
    return form.softcap * torch.tanh(scaled / form.softcap) if form.softcap > 0 else scaled


def logits(form: Form, block: Block) -> Tensor:
    """(1) to (6) Return what the softmax is taken of."""
    found = products(form, block)
    queries, keys = found.shape[2:]
    if block.slopes is not None:  # 3
        position = torch.arange(queries, device=found.device)[:, None] + form.first
        distance = (position - torch.arange(keys, device=found.device)).abs()
        found = found - block.slopes.to(form.dtype) * distance.to(form.dtype)
    hidden = ~visible(form, queries, keys, found.device)
    if block.mask is not None and block.mask.dtype == torch.bool:  # 4
        hidden = hidden | ~block.mask
    elif block.mask is not None:
        found = found + block.mask.to(form.dtype)
    return found.masked_fill(hidden, -_INF)


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
    if order == THROUGH_LSE:  # which is float32 for half types, in every kernel
        wide = torch.promote_types(logits.dtype, torch.float32)
        row = top.masked_fill(blind, 0).to(wide) + torch.log(denominator.detach().to(wide))
        probabilities = torch.exp(logits - row).to(logits.dtype)
    else:
        probabilities = weights / denominator
    total = probabilities.sum(-1, keepdim=True)
    return probabilities if sinks is None else probabilities[..., :-1], total, lse


def grouped_product(rows: Tensor, columns: Tensor, order: str) -> Tensor:
    """(11) Multiply `(B, Hq, Sq, n)` with `(B, Hkv, n, m)`, query head `h` with head `h // (Hq / Hkv)`."""
    heads, kv_heads = rows.shape[1], columns.shape[1]
    if order == THROUGH_LSE and heads != kv_heads:
        together = rows.unflatten(1, (kv_heads, heads // kv_heads)).flatten(2, 3)
        return _product(together, columns, order).unflatten(2, (heads // kv_heads, rows.shape[2])).flatten(1, 2)
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


def _varlen(
    arguments: dict[str, Any], used: Tensor | None, factors: Tensor | None, common: dict[str, Any], compute: Compute
) -> tuple[Tensor, Tensor]:
    """(5), (12) Sequence by sequence, each aligned to its lower right."""
    query, slopes = arguments["query"], arguments.get("alibi_slopes")
    starts = arguments["cu_seq_q"].tolist()
    outs, lses = [], []
    for b, (start, stop) in enumerate(pairwise(starts)):
        key, value = (_tokens(arguments, name, b, used) for name in ("key", "value"))
        one = Block(
            query[None, start:stop].transpose(1, 2),
            key,
            value,
            sinks=arguments.get("sinks"),
            slopes=None if slopes is None else slopes.expand(len(starts) - 1, -1)[b].reshape(1, -1, 1, 1),
            factors=None if factors is None else factors[None, start:stop, :, : key.shape[2]].transpose(1, 2),
        )
        out, lse = _in_blocks(one, LOWER_RIGHT, common, compute)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    if not outs:
        return query.new_zeros((0, query.shape[1], arguments["value"].shape[-1])), query.new_zeros((query.shape[1], 0))
    return torch.cat(outs), torch.cat(lses, 1)


def _tokens(arguments: dict[str, Any], name: str, b: int, used: Tensor | None) -> Tensor:
    """Return the keys or values of sequence `b`, `(1, Hkv, Sk, E)`, wherever they are."""
    tokens, table = arguments[name], arguments.get("block_table")
    cu_seq_k: Any = arguments.get("cu_seq_k")  # None only where a table says where keys are, and `used` how many
    count = int(used[b]) if used is not None else int(cu_seq_k[b + 1] - cu_seq_k[b])
    if table is not None:
        found = tokens[table[b].long().clamp(0, tokens.shape[0] - 1)].flatten(0, 1)[:count]
    else:
        start = int(cu_seq_k[b])
        found = tokens[start : start + count]
    return found[None].transpose(1, 2)
