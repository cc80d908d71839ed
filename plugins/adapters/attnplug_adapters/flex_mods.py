"""A call of attnplug as the two functions that `flex_attention` compiles: one of logits, one of the mask.

Packed sequences become one long sequence in which each token sees its own alone, pages are gathered before,
and keys that are not used are zero, so that nothing of what lies outside reaches a product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from attnplug import SDPAParams
from attnplug_adapters import convert

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_FAR = 2**30


@dataclass(frozen=True)
class Positions:
    """Where queries and keys stand, for masks and distances.

    Attributes:
        offset: of a dense call, the key position of query 0; with `seqused_k` it may differ by batch.
        row: of packed tokens, the key position at which each query stands.
        row_sequence: of packed tokens, the sequence of each query; -1 in none.
        column: of packed tokens, the position of each key in its sequence.
        column_sequence: of packed tokens, the sequence of each key; -2 if it is not used.
        used: of a dense call, `seqused_k`.
    """

    offset: Any = 0
    used: Tensor | None = None
    row: Tensor | None = None
    row_sequence: Any = None
    column: Any = None
    column_sequence: Any = None

    @classmethod
    def of(cls, params: SDPAParams) -> Positions:
        if params.is_varlen:
            return _packed(params)
        queries, keys, used = params.query.shape[2], params.key.shape[2], params.seqused_k
        if not convert.is_lower_right(params):
            return cls(offset=0, used=used)
        return cls(offset=keys - queries if used is None else used - queries, used=used)

    @property
    def by_batch(self) -> bool:
        return self.used is not None

    @property
    def is_plain(self) -> bool:
        """Whether all follows from lengths and offset."""
        return self.used is None and self.row is None

    def distance(self, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Return how far to the right of query `i`'s own position key `j` stands."""
        if self.row is not None:
            return self.column[j] - self.row[i]
        return j - i - (self.offset[b] if isinstance(self.offset, Tensor) else self.offset)


def dense(params: SDPAParams, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value as `(B, H, S, E)`, unused keys and values zero."""
    query, key, value = params.query, params.key, params.value
    if positions.row is None:
        if positions.used is None:
            return query, key, value
        unused = torch.arange(key.shape[2], device=key.device)[:, None] >= positions.used.view(-1, 1, 1, 1)
        return query, key.masked_fill(unused, 0.0), value.masked_fill(unused, 0.0)
    if params.block_table is not None:
        table = params.block_table.long().clamp(0, key.shape[0] - 1)
        key, value = (tensor[table].flatten(0, 2) for tensor in (key, value))
    unused = (positions.column_sequence < 0).view(-1, 1, 1)
    key, value = key.masked_fill(unused, 0.0), value.masked_fill(unused, 0.0)
    return tuple(tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))  # type: ignore[return-value]


def _packed(params: SDPAParams) -> Positions:
    sequence, position, outside = convert.tokens_of(params.cu_seq_q, params.query.shape[0])
    used = convert.used_keys(params)
    row = position + (used - params.cu_seq_q.diff())[sequence]
    if params.block_table is None:
        key_sequence, column, nowhere = convert.tokens_of(params.cu_seq_k, params.key.shape[0])
    else:
        batch, length = params.block_table.shape[0], params.block_table.shape[1] * params.key.shape[1]
        token = torch.arange(batch * length, device=row.device, dtype=torch.int32)
        key_sequence, column = token // length, token % length
        nowhere = torch.zeros_like(token, dtype=torch.bool)
    unused = nowhere | (column >= used[key_sequence])
    return Positions(
        row=row,
        row_sequence=sequence.masked_fill(outside, -1),
        column=column,
        column_sequence=key_sequence.masked_fill(unused, -2),
    )


def mask_mod(params: SDPAParams, positions: Positions) -> Mask | None:
    """Return which keys are seen; None if all are."""
    parts: list[Mask] = []
    if positions.row is not None:
        parts.append(_same_sequence(positions))
    if positions.used is not None:
        parts.append(_used(positions.used))
    left, right = convert.band(params)
    if (left, right) != convert.OPEN:
        if positions.is_plain:
            parts.append(band_mod(ends(positions.offset, (left, right), params.query.device)))
        else:
            parts.append(_within(positions, ends(0, (left, right), params.query.device)))
    if params.attn_mask is not None and params.attn_mask.dtype == torch.bool:
        parts.append(_allowed(_full(params)))
    return reduce(_both, parts) if parts else None


def score_mod(params: SDPAParams, positions: Positions) -> Any:
    """Return what becomes of a logit; None if nothing."""
    softcap, slopes, bias = None, None, None
    if params.softcap > 0:
        softcap = numbers((params.softcap,), params.query.device)
    if params.alibi_slopes is not None:
        slopes = params.alibi_slopes
    if params.attn_mask is not None and params.attn_mask.dtype != torch.bool:
        bias = _full(params)
    if softcap is None and slopes is None and bias is None:
        return None

    def score(logit: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            logit = softcap[0] * torch.tanh(logit / softcap[0])
        if slopes is not None:
            if slopes.dim() == 1:
                slope = slopes[h]
            else:
                slope = slopes[b if positions.row is None else positions.row_sequence[i].clamp(min=0), h]
            logit = logit - slope * positions.distance(b, i, j).abs()
        return logit if bias is None else logit + bias[b, h, i, j]

    return score


def band_mod(limits: Tensor) -> Mask:
    """Return the mask of a band, `limits[0] <= j - i <= limits[1]`."""

    def band(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j - i >= limits[0]) & (j - i <= limits[1])

    return band


def ends(offset: int, band: tuple[int, int], device: torch.device) -> Tensor:
    """Return the least and the largest `j - i` that a band sees."""
    left, right = band
    return numbers((offset - left if left >= 0 else -_FAR, offset + right if right >= 0 else _FAR), device)


def numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers as a tensor, which a compiled kernel takes as an argument."""
    return torch.tensor(values, device=device) if is_watched() else _kept(values, device)


@lru_cache(maxsize=256)
def _kept(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def is_watched() -> bool:
    """Whether a trace or a mode looks on: tensors may be fake, must not be kept, and have no memory to be read."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def _same_sequence(positions: Positions) -> Mask:
    rows, columns = positions.row_sequence, positions.column_sequence

    def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return rows[i] == columns[j]

    return same


def _used(used: Tensor) -> Mask:
    def exists(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < used[b]

    return exists


def _within(positions: Positions, limits: Tensor) -> Mask:
    def within(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = positions.distance(b, i, j)
        return (distance >= limits[0]) & (distance <= limits[1])

    return within


def _allowed(mask: Tensor) -> Mask:
    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return mask[b, h, i, j]

    return allowed


def _both(one: Mask, other: Mask) -> Mask:
    def both(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return one(b, h, i, j) & other(b, h, i, j)

    return both


def _full(params: SDPAParams) -> Tensor:
    """Return the mask expanded to `(B, Hq, Sq, Sk)`, without a copy."""
    assert params.attn_mask is not None
    batch, heads, queries, _ = params.query.shape
    expanded: Tensor = params.attn_mask.expand(batch, heads, queries, params.key.shape[2])
    return expanded
