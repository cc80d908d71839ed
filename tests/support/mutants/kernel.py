"""A correct kernel in PyTorch operators, in many small methods: each wrong kernel replaces one of them.

It is built like a fused kernel, so that it can be wrong in a fused kernel's ways: an online softmax over
blocks of keys in forward, and a backward that makes the probabilities again from lse. One sequence is
computed at a time; H is the number of query heads, Hkv that of key/value heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnplug import Capabilities, CausalVariant, Feature, SDPAParams

INF = float("inf")
BLOCK = 32
CAPABILITIES = Capabilities(dtypes=("float16", "bfloat16", "float32", "float64"), features=frozenset(Feature))


@dataclass
class Sequence:
    """One sequence of a call: query `(H, Sq, E)`, key `(Hkv, Sk, E)`, value `(Hkv, Sk, Ev)`.

    `mask` is `(1 or H, 1 or Sq, 1 or Sk)` or None, `factors` of dropout `(H, Sq, Sk)` or None.
    """

    index: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    slopes: Tensor | None
    factors: Tensor | None
    offset: int


class Kernel:
    """The correct kernel."""

    composite = False

    # What there is to compute.

    def sequences(self, params: SDPAParams, seed: Tensor | None) -> Iterator[Sequence]:
        """Yield the sequences of the call, in the dtype of the computation."""
        dtype = self.compute_dtype(params)
        for b in range(self.batch(params)):
            query, key, value = (tensor.to(dtype) for tensor in self.tensors(params, b))
            heads, queries, keys = query.shape[0], query.shape[1], key.shape[1]
            factors = None if seed is None else self.dropout_factors(params, seed, b, (heads, queries, keys))
            yield Sequence(
                b, query, key, value, self.mask_of(params, b, keys), self.slopes_of(params, b),
                None if factors is None else factors.to(dtype), self.offset(params, b, queries, keys),
            )  # fmt: skip

    def compute_dtype(self, params: SDPAParams) -> torch.dtype:
        return torch.float64 if params.query.dtype == torch.float64 else torch.float32

    def batch(self, params: SDPAParams) -> int:
        return params.query.shape[0] if params.cu_seq_q is None else params.cu_seq_q.numel() - 1

    def tensors(self, params: SDPAParams, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value of sequence `b`, with as many keys as are used."""
        query, key, value = self.views(params)
        if params.cu_seq_q is None:
            used = self.used(params, b)
            return query[b], key[b, :, :used], value[b, :, :used]
        start, stop = self.rows(params, b)
        where = self.key_places(params, b)
        return query[start:stop].transpose(0, 1), self.gather(key, where), self.gather(value, where)

    def views(self, params: SDPAParams) -> tuple[Tensor, Tensor, Tensor]:
        return params.query, params.key, params.value

    def rows(self, params: SDPAParams, b: int) -> tuple[int, int]:
        return int(params.cu_seq_q[b]), int(params.cu_seq_q[b + 1])

    def used(self, params: SDPAParams, b: int) -> int:
        """Return how many keys sequence `b` has."""
        if params.seqused_k is not None:
            return int(params.seqused_k[b])
        if params.cu_seq_k is not None:
            return int(params.cu_seq_k[b + 1] - params.cu_seq_k[b])
        return params.key.shape[2]

    def key_places(self, params: SDPAParams, b: int) -> Tensor:
        """Return where in all tokens, or in all pages one after the other, the keys of sequence `b` are."""
        position = torch.arange(self.used(params, b), device=params.query.device)
        if params.block_table is None:
            return position + int(params.cu_seq_k[b])
        page_size = params.key.shape[1]
        return params.block_table[b].long()[position // page_size] * page_size + position % page_size

    def gather(self, tokens: Tensor, where: Tensor) -> Tensor:
        return tokens.reshape(-1, *tokens.shape[-2:])[where].transpose(0, 1)

    def mask_of(self, params: SDPAParams, b: int, keys: int) -> Tensor | None:
        mask = params.attn_mask
        if mask is None:
            return None
        mask = mask[b if mask.shape[0] > 1 else 0]
        return mask[..., :keys] if mask.shape[-1] > 1 else mask

    def slopes_of(self, params: SDPAParams, b: int) -> Tensor | None:
        slopes = params.alibi_slopes
        return slopes[b] if slopes is not None and slopes.dim() == 2 else slopes

    def offset(self, params: SDPAParams, b: int, queries: int, keys: int) -> int:
        """Return the key position of the first query."""
        return keys - queries if params.causal_variant == CausalVariant.LOWER_RIGHT else 0

    def kv_heads(self, heads: int, kv_heads: int) -> Tensor:
        """Return the key/value head that each query head reads."""
        return torch.arange(heads) // (heads // kv_heads)

    # Dropout.

    def draw_seed(self, params: SDPAParams) -> Tensor | None:
        return torch.randint(2**40, (1,)) if params.dropout > 0 else None

    def dropout_factors(self, params: SDPAParams, seed: Tensor, b: int, shape: tuple[int, int, int]) -> Tensor:
        """Return what the probabilities of a sequence are multiplied with."""
        generator = torch.Generator().manual_seed(int(seed) + b)
        kept = torch.rand(shape, generator=generator, dtype=torch.float64) >= params.dropout
        return kept.double() * self.dropout_scale(params)

    def dropout_scale(self, params: SDPAParams) -> float:
        return 1 / (1 - params.dropout) if params.dropout < 1 else 0.0

    # Logits.

    def logits(self, params: SDPAParams, one: Sequence, start: int, stop: int) -> Tensor:
        """Return the logits of all queries and the keys from `start` to `stop`, `(H, Sq, n)`."""
        i = torch.arange(one.query.shape[1])[:, None] + one.offset
        j = torch.arange(start, stop)
        logits = self.capped(params, self.products(params, one, start, stop))
        logits = self.biased(params, one, logits, i, j)
        logits = self.masked(params, one, logits, start, stop)
        return logits.masked_fill(~self.visible(params, i, j), -INF)

    def products(self, params: SDPAParams, one: Sequence, start: int, stop: int) -> Tensor:
        index = self.kv_heads(one.query.shape[0], one.key.shape[0])
        return one.query @ one.key[index, start:stop].mT * self.scale(params)

    def scale(self, params: SDPAParams) -> float:
        return params.scale

    def capped(self, params: SDPAParams, logits: Tensor) -> Tensor:
        return params.softcap * torch.tanh(logits / params.softcap) if params.softcap > 0 else logits

    def biased(self, params: SDPAParams, one: Sequence, logits: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if one.slopes is None:
            return logits
        return logits - one.slopes[:, None, None].to(logits.dtype) * self.alibi_distance(one, i, j)

    def alibi_distance(self, one: Sequence, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs()

    def masked(self, params: SDPAParams, one: Sequence, logits: Tensor, start: int, stop: int) -> Tensor:
        if one.mask is None:
            return logits
        mask = one.mask[..., start:stop] if one.mask.shape[-1] > 1 else one.mask
        return self.with_mask(params, logits, mask)

    def with_mask(self, params: SDPAParams, logits: Tensor, mask: Tensor) -> Tensor:
        return logits.masked_fill(~mask, -INF) if mask.dtype == torch.bool else logits + mask.to(logits.dtype)

    def visible(self, params: SDPAParams, i: Tensor, j: Tensor) -> Tensor:
        """Return which queries see which keys; `i` is already shifted by the offset."""
        left, right = params.window_size
        seen = torch.ones(i.shape[0], j.shape[0], dtype=torch.bool)
        if params.is_causal:
            seen &= self.causal(i, j)
        if left >= 0:
            seen &= j >= i - left
        if right >= 0:
            seen &= j <= i + right
        return seen

    def causal(self, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    # Forward.

    def forward(self, params: SDPAParams) -> tuple[Any, ...]:
        if params.query.is_nested:
            return self.nested(params), None
        seed = self.draw_seed(params)
        out, lse = self.allocate(params)
        for one in self.sequences(params, seed):
            part, part_lse = self.attend(params, one)
            self.store(params, one.index, out, lse, part, part_lse)
        if params.cu_seq_q is not None:
            last = int(params.cu_seq_q[-1])
            out[last:], lse[:, last:] = 0.0, -INF
        return (out, lse) if seed is None else (out, lse, seed)

    def nested(self, params: SDPAParams) -> Tensor:
        """Return out of nested tensors `(B, H, S, E)` with S jagged."""
        parts = zip(*(tensor.unbind() for tensor in (params.query, params.key, params.value)), strict=True)
        outs = [self.of_nested(params, *(tensor[None] for tensor in part))[0].transpose(0, 1) for part in parts]
        return torch.nested.nested_tensor(outs, layout=torch.jagged).transpose(1, 2)

    def of_nested(self, params: SDPAParams, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scale = query.shape[-1] ** -0.5 if params.scale is None else params.scale
        return self.forward(replace(params, query=query, key=key, value=value, scale=scale))[0]

    def allocate(self, params: SDPAParams) -> tuple[Tensor, Tensor]:
        query, value_size = params.query, params.value.shape[-1]
        out = torch.empty(*query.shape[:-1], value_size, dtype=query.dtype)
        rows = query.shape[:3] if params.cu_seq_q is None else (query.shape[1], query.shape[0])
        return out, torch.empty(rows, dtype=self.compute_dtype(params))

    def store(self, params: SDPAParams, b: int, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        if params.cu_seq_q is None:
            out[b], lse[b] = part, part_lse
            return
        start, stop = self.rows(params, b)
        out[start:stop] = part.transpose(0, 1)
        lse[:, start:stop] = part_lse

    def attend(self, params: SDPAParams, one: Sequence) -> tuple[Tensor, Tensor]:
        """Return out `(H, Sq, Ev)` and lse `(H, Sq)` of a sequence, block by block of its keys."""
        heads, queries, _ = one.query.shape
        top = one.query.new_full((heads, queries, 1), -INF)
        total, summed = torch.zeros_like(top), one.query.new_zeros(heads, queries, one.value.shape[2])
        if params.sinks is not None:
            top, total = self.with_sinks(params, top, total)
        for start, stop in self.blocks(params, one):
            logits = self.logits(params, one, start, stop)
            higher = self.maximum(top, logits)
            weights = torch.exp(logits - finite(higher))
            rescale = torch.exp(top - finite(higher))
            total = self.next_total(total, rescale, self.weights_for_total(one, weights, start, stop))
            summed = self.next_sum(summed, rescale, self.weighted_values(one, weights, start, stop))
            top = higher
        return self.finish(params, one, top, total, summed)

    def blocks(self, params: SDPAParams, one: Sequence) -> Iterator[tuple[int, int]]:
        keys = one.key.shape[1]
        for start in range(0, keys, BLOCK):
            yield start, min(start + BLOCK, keys)

    def with_sinks(self, params: SDPAParams, top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        return top.clone().copy_(self.sinks(params, top.dtype)), torch.ones_like(total)

    def sinks(self, params: SDPAParams, dtype: torch.dtype) -> Tensor:
        return params.sinks.to(dtype)[:, None, None]

    def maximum(self, top: Tensor, logits: Tensor) -> Tensor:
        return torch.maximum(top, logits.amax(-1, keepdim=True))

    def next_total(self, total: Tensor, rescale: Tensor, weights: Tensor) -> Tensor:
        return total * rescale + weights.sum(-1, keepdim=True)

    def next_sum(self, summed: Tensor, rescale: Tensor, added: Tensor) -> Tensor:
        return summed * rescale + added

    def weights_for_total(self, one: Sequence, weights: Tensor, start: int, stop: int) -> Tensor:
        return weights

    def weighted_values(self, one: Sequence, weights: Tensor, start: int, stop: int) -> Tensor:
        index = self.kv_heads(one.query.shape[0], one.key.shape[0])
        if one.factors is not None:
            weights = weights * one.factors[..., start:stop]
        return weights @ one.value[index, start:stop]

    def finish(
        self, params: SDPAParams, one: Sequence, top: Tensor, total: Tensor, summed: Tensor
    ) -> tuple[Tensor, Tensor]:
        blind = total == 0
        out = summed / total.masked_fill(blind, 1)
        return out, self.lse(params, finite(top), total.masked_fill(blind, 1)).masked_fill(blind, -INF)[..., 0]

    def lse(self, params: SDPAParams, top: Tensor, total: Tensor) -> Tensor:
        return top + torch.log(total)

    # Backward.

    def backward(
        self,
        params: SDPAParams,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        seed: Tensor | None = None,
    ) -> tuple[Any, ...]:
        parts = []
        for one in self.sequences(params, seed):
            rows = (self.of_sequence(params, one.index, tensor) for tensor in (grad_out, out))
            rows_lse = (self.lse_of(params, one.index, tensor) for tensor in (grad_lse, lse))
            parts.append(self.attend_backward(params, one, *rows, *rows_lse))
        names = ("query", "key", "value")
        query, key, value = (self.joined(params, name, [part[name] for part in parts]) for name in names)
        mask = sinks = None
        if params.attn_mask is not None and params.attn_mask.requires_grad:
            mask = self.joined_mask(params, [part["mask"] for part in parts])
        if params.sinks is not None and params.sinks.requires_grad:
            sinks = self.joined_sinks([part["sinks"] for part in parts]).to(params.sinks.dtype)
        return query, key, value, mask, sinks

    def of_sequence(self, params: SDPAParams, b: int, tensor: Tensor) -> Tensor:
        if params.cu_seq_q is None:
            return tensor[b].to(self.compute_dtype(params))
        start, stop = self.rows(params, b)
        return tensor[start:stop].transpose(0, 1).to(self.compute_dtype(params))

    def lse_of(self, params: SDPAParams, b: int, lse: Tensor | None) -> Tensor | None:
        if lse is None or params.cu_seq_q is None:
            return None if lse is None else lse[b]
        start, stop = self.rows(params, b)
        return lse[:, start:stop]

    def attend_backward(
        self, params: SDPAParams, one: Sequence, grad_out: Tensor, out: Tensor, grad_lse: Tensor | None, lse: Any
    ) -> dict[str, Tensor]:
        """Return the gradients of a sequence: the formulas of FlashAttention, all keys at once."""
        keys, heads, kv_heads = one.key.shape[1], one.query.shape[0], one.key.shape[0]
        index = self.kv_heads(heads, kv_heads)
        probabilities = self.probabilities(params, one, lse)
        blind = lse == -INF
        grad_out = grad_out.masked_fill(blind[..., None], 0)
        grad_weights = grad_out @ one.value[index].mT
        dropped = probabilities
        if one.factors is not None:
            dropped = probabilities * one.factors
            grad_weights = self.through_dropout(one, grad_weights)
        delta = self.delta(grad_out, out)
        if grad_lse is not None:
            delta = self.with_lse_gradient(delta, grad_lse.masked_fill(blind, 0)[..., None])
        grad_logits = probabilities * (grad_weights - delta)
        found = {"mask": grad_logits}
        if params.sinks is not None:
            sink = torch.exp(self.sinks(params, lse.dtype)[..., 0] - lse)
            found["sinks"] = self.sinks_gradient(sink, delta[..., 0])
        if params.softcap > 0:
            capped = self.capped(params, self.products(params, one, 0, keys))
            grad_logits = grad_logits * self.cap_derivative(params, capped)
        grad_logits = self.scaled_gradient(params, grad_logits)
        found["query"] = grad_logits @ one.key[index]
        found["key"] = self.summed_over_group(grad_logits.mT @ one.query, kv_heads)
        found["value"] = self.summed_over_group(dropped.mT @ grad_out, kv_heads)
        return found

    def probabilities(self, params: SDPAParams, one: Sequence, lse: Tensor) -> Tensor:
        logits = self.logits(params, one, 0, one.key.shape[1])
        return torch.exp(logits - lse.masked_fill(lse == -INF, 0)[..., None])

    def through_dropout(self, one: Sequence, grad_weights: Tensor) -> Tensor:
        return grad_weights * one.factors

    def delta(self, grad_out: Tensor, out: Tensor) -> Tensor:
        return (grad_out * out).sum(-1, keepdim=True)

    def with_lse_gradient(self, delta: Tensor, grad_lse: Tensor) -> Tensor:
        return delta - grad_lse

    def sinks_gradient(self, sink: Tensor, delta: Tensor) -> Tensor:
        return -(sink * delta).sum(-1)

    def cap_derivative(self, params: SDPAParams, capped: Tensor) -> Tensor:
        return 1 - (capped / params.softcap) ** 2

    def scaled_gradient(self, params: SDPAParams, grad_logits: Tensor) -> Tensor:
        return grad_logits * self.scale(params)

    def summed_over_group(self, gradient: Tensor, kv_heads: int) -> Tensor:
        """Sum `(H, Sk, n)` over the query heads that read a key/value head."""
        return gradient.unflatten(0, (kv_heads, gradient.shape[0] // kv_heads)).sum(1)

    # Putting the gradients of sequences together.

    def joined(self, params: SDPAParams, name: str, parts: list[Tensor]) -> Tensor:
        like: Tensor = getattr(params, name)
        if params.cu_seq_q is None:
            padded = [pad(part, like.shape[2], 1) for part in parts]
            return torch.stack(padded).to(like.dtype)
        tokens = parts[0].new_zeros(like.shape).reshape(-1, *like.shape[-2:])
        for b, part in enumerate(parts):
            where = torch.arange(*self.rows(params, b)) if name == "query" else self.key_places(params, b)
            tokens = tokens.index_add(0, where, part.transpose(0, 1))
        return tokens.reshape(like.shape).to(like.dtype)

    def joined_mask(self, params: SDPAParams, parts: list[Tensor]) -> Tensor:
        return torch.stack([pad(part, params.key.shape[2], 2) for part in parts])

    def joined_sinks(self, parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).sum(0)


def finite(top: Tensor) -> Tensor:
    """Return the maximum to take out; 0 for a row that has seen nothing, for -inf - -inf is no number."""
    return top.masked_fill(top == -INF, 0)


def pad(part: Tensor, length: int, dim: int) -> Tensor:
    """Add zeros up to `length`: keys that are not used have no gradient."""
    missing = list(part.shape)
    missing[dim] = length - part.shape[dim]
    return torch.cat([part, part.new_zeros(missing)], dim)
