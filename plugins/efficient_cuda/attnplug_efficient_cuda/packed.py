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
        blind: `(Tq,)`, True for queries that see no key.
        unused: `(Tk,)`, True for keys that no query may see, and that get no gradient from the kernel.
    """

    starts_q: Tensor
    starts_k: Tensor
    max_q: int
    max_k: int
    mask_type: int
    window: int | None
    blind: Tensor
    unused: Tensor

    @classmethod
    def of(cls, params: SDPAParams) -> _Sequences:
        left, right = geometry.band(params)
        lower_right = params.causal_variant == CausalVariant.LOWER_RIGHT
        cu_q, cu_k = params.cu_seq_q, params.cu_seq_k
        lengths_q, lengths_k = cu_q.diff(), cu_k.diff()
        used = lengths_k if params.seqused_k is None else params.seqused_k
        starts_q, starts_k = cu_q, cu_k
        if (right == 0 and lower_right) or params.seqused_k is not None:
            leading = (lengths_q - used).clamp(min=0) if right == 0 and lower_right else torch.zeros_like(used)
            starts_q = _joined(cu_q, sequences.starts(cu_q) + leading, sequences.ends(cu_q))
            starts_k = _joined(cu_k, sequences.starts(cu_k), sequences.starts(cu_k) + used)
        if starts_q.shape[0] - 1 > GRID:
            raise ValueError(
                f"efficient_cuda: {lengths_q.shape[0]} sequences make {starts_q.shape[0] - 1} in the kernel's grid, "
                f"which holds {GRID}; use another implementation for this call"
            )
        shift = used - lengths_q if lower_right else torch.zeros_like(used)
        causal_type = geometry.LOWER_RIGHT if lower_right else geometry.UPPER_LEFT
        tokens_q, tokens_k = params.query.shape[0], params.key.shape[0]
        return cls(
            layout.compact(starts_q),
            layout.compact(starts_k),
            max(1, min(params.max_q, tokens_q)),
            max(1, min(params.max_k, tokens_k)),
            causal_type if right == 0 else geometry.NO_MASK,
            None if left < 0 else left + 1,
            sequences.blind(Tokens.of(cu_q, tokens_q), used, shift, (left, right)),
            sequences.unused(Tokens.of(cu_k, tokens_k), used, lengths_q),
        )

    def rows(self, longest: int) -> Tensor:
        """Return the row of each query among the `(sequences, longest)` of an lse; some row for a query of none."""
        tokens = Tokens.of(self.starts_q, self.blind.shape[0])
        return tokens.sequence * longest + tokens.position.clamp(max=longest - 1)


def forward(params: SDPAParams) -> tuple[Tensor, Tensor]:
    """Return `out (Tq, Hq, Ev)` and `lse (Hq, Tq)`."""
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
    lse = lse.transpose(1, 2).flatten(0, 1).index_select(0, told.rows(lse.shape[2])).transpose(0, 1)
    out = layout.first(out.squeeze(0), params.value.shape[-1])
    return layout.compact(sequences.clear(out, told.blind)), layout.compact(lse.masked_fill(told.blind, MINUS_INFINITY))


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
    outside = (told.blind, told.unused, told.unused)
    cleared = [sequences.clear(grad.squeeze(0), nothing) for grad, nothing in zip(grads, outside, strict=True)]
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
