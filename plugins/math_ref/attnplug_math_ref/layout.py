"""Every layout of a call, brought to the one that the formulas are written for, and back.

(12) Variable length is dense with a number of queries and of keys per sequence: tokens and pages are
gathered into zero-padded `(B, H, longest, E)` tensors, and results are gathered back. Nothing is read
on the host, so CUDA does not wait and `torch.compile` traces it; the price is memory and work for
`B * max_q` and `B * max_k` tokens.

Memory outside the sequences may hold anything. It never reaches a product: what a position outside
gathers is replaced by zero (a probability of 0 is not enough, since 0 times NaN is NaN).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnplug import CausalVariant, SDPAParams
from attnplug_math_ref.formulas import Problem


def as_problem(params: SDPAParams) -> Problem:
    """Return the call as a dense problem, without dropout's random numbers."""
    used: Tensor | None
    offset: Tensor | int
    if params.is_varlen:
        used_q, used = params.cu_seq_q.diff().long(), _used_k(params)
        query = _pad(params.query, params.cu_seq_q, used_q, _longest(params.max_q))
        key, value = (_pad_keys(params, tokens, used) for tokens in (params.key, params.value))
        used = used.view(-1, 1, 1, 1)
        offset = used - used_q.view(-1, 1, 1, 1)
    else:
        query, key, value = params.query, params.key, params.value
        used = None
        if params.seqused_k is not None:
            used = params.seqused_k.long().view(-1, 1, 1, 1)
            unused = torch.arange(key.shape[2], device=key.device)[:, None] >= used
            key, value = key.masked_fill(unused, 0), value.masked_fill(unused, 0)
        offset = 0
        if params.causal_variant == CausalVariant.LOWER_RIGHT:  # (5)
            offset = (key.shape[2] if used is None else used) - query.shape[2]
    heads = query.shape[1]
    return Problem(
        query=query,
        key=key,
        value=value,
        mask=params.attn_mask,
        slopes=None if params.alibi_slopes is None else params.alibi_slopes.reshape(-1, heads, 1, 1),
        sinks=None if params.sinks is None else params.sinks.view(1, heads, 1, 1),
        used=used,
        offset=offset,
        scale=params.scale,
        softcap=params.softcap,
        is_causal=params.is_causal,
        window_size=params.window_size,
        dropout=params.dropout,
        streams=None,
    )


def pack_rows(params: SDPAParams, padded: Tensor, outside: float) -> Tensor:
    """Gather `(B, Hq, Sq, n)` back to the query's tokens, `(Tq, Hq, n)`.

    Tokens that belong to no sequence get `outside`.
    """
    return _unpad(padded, params.cu_seq_q, params.query.shape[0], outside)


def pad_rows(params: SDPAParams, tokens: Tensor) -> Tensor:
    """Gather a gradient that is laid out like the query, `(Tq, Hq, n)`, to `(B, Hq, Sq, n)`."""
    return _pad(tokens, params.cu_seq_q, params.cu_seq_q.diff(), _longest(params.max_q))


def pack_key_gradient(params: SDPAParams, padded: Tensor) -> Tensor:
    """Bring the gradient of padded keys or values, `(B, Hkv, Sk, n)`, to the layout of the call's keys."""
    if params.block_table is None:
        return _unpad(padded, params.cu_seq_k, params.key.shape[0], 0.0)
    pages, page_size = params.key.shape[:2]
    table = _block_table(params, _used_k(params))
    gradient = padded.new_zeros(pages, page_size, padded.shape[1], padded.shape[3])
    by_page = padded.transpose(1, 2).reshape(*table.shape, *gradient.shape[1:])
    # Sequences may share pages: added one by one, the sums have one order and so equal bits every time.
    for entries, added in zip(table.unbind(), by_page.unbind(), strict=True):
        gradient.index_add_(0, entries, added)
    return gradient


def _used_k(params: SDPAParams) -> Tensor:
    used: Tensor = params.cu_seq_k.diff() if params.seqused_k is None else params.seqused_k
    return used.long()


def _longest(size: int | None) -> int:
    """Return `max_q` or `max_k`, and 1 for 0: a tensor of one zero needs no exceptions where it is used."""
    assert size is not None, "a call of variable length has max_q and max_k"
    return max(1, size)


def _pad_keys(params: SDPAParams, tokens: Tensor, used: Tensor) -> Tensor:
    """Gather keys or values, packed or paged, to `(B, Hkv, Sk, n)`, zero past the used ones."""
    if params.block_table is None:
        return _pad(tokens, params.cu_seq_k, used, _longest(params.max_k))
    pages = tokens[_block_table(params, used)].flatten(1, 2)
    unused = torch.arange(pages.shape[1], device=pages.device) >= used[:, None]
    return pages.masked_fill(unused[..., None, None], 0).transpose(1, 2)


def _block_table(params: SDPAParams, used: Tensor) -> Tensor:
    """Return the table as far as `max_k` needs it; entries past the used keys may be anything, and give 0."""
    page_size = params.key.shape[1]
    table: Tensor = params.block_table[:, : -(-_longest(params.max_k) // page_size)].long()
    if table.shape[1] == 0:
        table = table.new_zeros(table.shape[0], 1)
    starts = torch.arange(table.shape[1], device=table.device) * page_size
    return table.masked_fill(starts >= used[:, None], 0)


def _pad(tokens: Tensor, cu_seq: Tensor, used: Tensor, longest: int) -> Tensor:
    """Gather `(T, H, n)` to `(B, H, longest, n)`, zero past the `used` tokens of each sequence."""
    position = torch.arange(longest, device=tokens.device)
    outside = position >= used[:, None]
    gathered = tokens[(cu_seq[:-1, None] + position).masked_fill(outside, 0)]
    return gathered.masked_fill(outside[..., None, None], 0).transpose(1, 2)


def _unpad(padded: Tensor, cu_seq: Tensor, tokens: int, outside: float) -> Tensor:
    """Gather `(B, H, longest, n)` back to `(tokens, H, n)`; tokens of no sequence get `outside`."""
    token = torch.arange(tokens, dtype=cu_seq.dtype, device=cu_seq.device)
    sequence = torch.searchsorted(cu_seq[1:].contiguous(), token, right=True)
    is_outside = (token < cu_seq[0]) | (token >= cu_seq[-1])
    sequence = sequence.clamp(max=padded.shape[0] - 1)
    position = token - cu_seq[sequence]
    is_outside = is_outside | (position >= padded.shape[2])
    gathered = padded[sequence, :, position.masked_fill(is_outside, 0)]
    return gathered.masked_fill(is_outside[:, None, None], outside)
