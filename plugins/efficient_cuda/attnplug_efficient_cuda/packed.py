"""Sequences packed one after the other, as the CUTLASS kernel takes them: `(1, T, H, E)` and cumulative lengths.

The kernel's own arguments are not enough for the contract. Its backward takes no lengths of used keys; the
lower right diagonal of a sequence with fewer keys than queries wraps around; and what belongs to no
sequence is never written. So a sequence that may have any of this is given to it as three:

1. its first queries, those that see no key, with no keys;
2. the queries that see one, with the keys that are used;
3. the keys that are not used, with no queries.

Nothing of this looks at a length on the host. `lse` comes back as `(sequences, H, longest)` and leaves as
`(H, T)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnplug import CausalVariant, SDPAParams
from attnplug_efficient_cuda import geometry, layout, operators, sequences
from attnplug_efficient_cuda.dense import GRID, LSE_ROWS, MINUS_INFINITY
from attnplug_efficient_cuda.sequences import Tokens


@dataclass(frozen=True)
class _Sequences:
    """What the kernel is told of the sequences, and where its rows and the caller's tokens meet.

    Attributes:
        starts_q, starts_k: cumulative lengths, int32.
        mask_type, window: the kernel's mask within each sequence.
        queries: the caller's tokens, in the sequences of `starts_q`; None if these are not the caller's.
        blind: `(Tq,)`, True for queries that see no key.
    """

    starts_q: Tensor
    starts_k: Tensor
    max_q: int
    max_k: int
    mask_type: int
    window: int | None
    queries: Tokens | None
    blind: Tensor

    @classmethod
    def of(cls, params: SDPAParams) -> _Sequences:
        left, right = geometry.band(params)
        lower_right = params.causal_variant == CausalVariant.LOWER_RIGHT
        cu_q, cu_k = params.cu_seq_q, params.cu_seq_k
        tokens_q, tokens_k = params.query.shape[0], params.key.shape[0]
        used = _used(params)
        queries = Tokens.of(cu_q, tokens_q)
        lengths_q = cu_q.diff() if lower_right and (left, right) != (-1, -1) else None
        blind = sequences.blind(queries, used, (left, right), lengths_q)
        starts_q, starts_k = cu_q, cu_k
        if (right == 0 and lower_right) or params.seqused_k is not None:
            begin = sequences.starts(cu_q)
            if right == 0 and lengths_q is not None:
                begin = begin + (lengths_q - used).clamp(min=0)
            starts_q = _joined(cu_q, begin, sequences.ends(cu_q))
            starts_k = _joined(cu_k, sequences.starts(cu_k), sequences.starts(cu_k) + used)
        if starts_q.shape[0] - 1 > GRID:
            raise ValueError(
                f"efficient_cuda: {cu_q.shape[0] - 1} sequences make {starts_q.shape[0] - 1} in the kernel's grid, "
                f"which holds {GRID}; use another implementation for this call"
            )
        causal_type = geometry.LOWER_RIGHT if lower_right else geometry.UPPER_LEFT
        return cls(
            layout.compact(starts_q),
            layout.compact(starts_k),
            max(1, min(params.max_q, tokens_q)),
            max(1, min(params.max_k, tokens_k)),
            causal_type if right == 0 else geometry.NO_MASK,
            None if left < 0 else left + 1,
            queries if starts_q is cu_q else None,
            blind,
        )

    def rows(self, longest: int) -> Tensor:
        """Return the row of each query among the `(sequences, longest)` of an lse; some row for a query of none."""
        tokens = Tokens.of(self.starts_q, self.blind.shape[0]) if self.queries is None else self.queries
        return tokens.sequence * longest + tokens.positions().clamp(max=longest - 1)


def forward(params: SDPAParams) -> tuple[Tensor, Tensor]:
    """Return `out (Tq, Hq, Ev)` and `lse (Hq, Tq)`."""
    told, out, lse = _forward(params)
    lse = lse.transpose(1, 2).flatten(0, 1).index_select(0, told.rows(lse.shape[2])).transpose(0, 1)
    return out, layout.compact(lse.masked_fill(told.blind, MINUS_INFINITY))


def prepare(params: SDPAParams) -> Callable[..., tuple[Tensor, None]] | None:
    """Return what runs a call of sequences like these, if nobody wants its lse."""
    if params.return_lse or params.needs_grad or params.scale is None or params.scale <= 0:
        return None
    others = {name: value for name, value in vars(params).items() if not isinstance(value, Tensor)}

    def run(
        query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, *rest: Tensor | None
    ) -> tuple[Tensor, None]:
        *_, used, _ = rest  # no sinks, no slopes, no pages: see `Capabilities`
        given = {"query": query, "key": key, "value": value, "cu_seq_q": starts_q, "cu_seq_k": starts_k}
        return _forward(SDPAParams(**{**others, **given, "seqused_k": used}))[1], None

    return run


def _forward(params: SDPAParams) -> tuple[_Sequences, Tensor, Tensor]:
    """Return what the kernel was told, out, and the kernel's lse: `(sequences, H, longest)`."""
    told = _Sequences.of(params)
    query, key, value = _kernel_tensors(params, told.max_k)
    out, lse = operators.efficient_forward(
        *(query, key, value, None),
        *(told.starts_q, told.starts_k, told.max_q, told.max_k),
        0.0,
        told.mask_type,
        True,
        scale=params.scale,
        window_size=told.window,
    )[:2]
    out = layout.first(out.squeeze(0), params.value.shape[-1])
    return told, layout.compact(sequences.clear(out, told.blind)), lse


def backward(params: SDPAParams, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Any, ...]:
    """Return the gradients of query, key and value."""
    told = _Sequences.of(params)
    query, key, value = _kernel_tensors(params, told.max_k)
    longest = -(-(told.max_q + 1) // LSE_ROWS) * LSE_ROWS  # with a row to spare for queries of no sequence
    count, heads = told.starts_q.shape[0] - 1, query.shape[2]
    kernel_lse = lse.new_full((count * longest, heads), float("inf"))
    kernel_lse.index_copy_(0, told.rows(longest), lse.masked_fill(told.blind, float("inf")).transpose(0, 1))
    kernel_lse = layout.compact(kernel_lse.view(count, longest, heads).transpose(1, 2))
    unused = torch.zeros((), dtype=torch.long, device="cpu")
    grads = operators.efficient_backward(
        layout.packed(grad_out.unsqueeze(0)),
        *(query, key, value, None),
        layout.packed(out.unsqueeze(0)),
        *(told.starts_q, told.starts_k, told.max_q, told.max_k),
        kernel_lse,
        0.0,
        *(unused, unused),
        told.mask_type,
        False,
        scale=params.scale,
        # With more than one, a sequence without queries makes the kernel divide by zero.
        num_splits_key=1,
        window_size=told.window,
    )[:3]
    keys = Tokens.of(params.cu_seq_k, params.key.shape[0])
    idle = sequences.unused(keys, _used(params), params.cu_seq_q.diff())
    cleared = [
        sequences.clear(grad.squeeze(0), nothing) for grad, nothing in zip(grads, (told.blind, idle, idle), strict=True)
    ]
    return (
        layout.first(cleared[0], params.query.shape[-1]),
        _sum_groups(cleared[1], params.key),
        _sum_groups(cleared[2], params.value),
    )


def from_dense(params: SDPAParams) -> SDPAParams:
    """Return a dense call with `seqused_k` as one of packed sequences that are all of full length."""
    batch, _, queries, _ = params.query.shape
    keys, device = params.key.shape[2], params.query.device

    def tokens(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).reshape(-1, tensor.shape[1], tensor.shape[3])

    return SDPAParams(
        tokens(params.query),
        tokens(params.key),
        tokens(params.value),
        is_causal=params.is_causal,
        enable_gqa=params.enable_gqa,
        scale=params.scale,
        causal_variant=params.causal_variant,
        window_size=params.window_size,
        seqused_k=params.seqused_k,
        return_lse=params.return_lse,
        cu_seq_q=torch.arange(batch + 1, dtype=torch.int32, device=device) * queries,
        cu_seq_k=torch.arange(batch + 1, dtype=torch.int32, device=device) * keys,
        max_q=queries,
        max_k=keys,
    )


def to_dense(tokens: Tensor, batch: int) -> Tensor:
    """Return `(B * S, H, E)` as `(B, H, S, E)`."""
    return tokens.reshape(batch, -1, *tokens.shape[1:]).transpose(1, 2)


def _used(params: SDPAParams) -> Tensor:
    """Return how many keys of each sequence there are."""
    return params.cu_seq_k.diff() if params.seqused_k is None else params.seqused_k


def _kernel_tensors(params: SDPAParams, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value as `(1, T, Hq, E)`; a single key head is shared, several are repeated."""
    heads = params.query.shape[1]

    def keys(tensor: Tensor) -> Tensor:
        tensor = layout.aligned(tensor)
        if tensor.shape[1] == 1:
            tensor = tensor.expand(-1, heads, -1)
        elif tensor.shape[1] != heads:
            tensor = tensor.repeat_interleave(heads // tensor.shape[1], 1)
        return layout.reachable(tensor.unsqueeze(0), longest)

    return layout.aligned(params.query).unsqueeze(0), keys(params.key), keys(params.value)


def _sum_groups(grad: Tensor, tensor: Tensor) -> Tensor:
    grad = layout.first(grad, tensor.shape[-1])
    if grad.shape[1] == tensor.shape[1]:
        return grad
    return grad.reshape(grad.shape[0], tensor.shape[1], -1, grad.shape[2]).sum(2)


def _joined(cumulative: Tensor, middle: Tensor, last: Tensor) -> Tensor:
    """Return cumulative lengths with three sequences for each: up to `middle`, up to `last`, up to the next."""
    end = cumulative.narrow(0, cumulative.shape[0] - 1, 1)
    return torch.cat([torch.stack([sequences.starts(cumulative), middle, last], 1).flatten(), end])
