"""Causal masks and windows as the CUTLASS kernel knows them, and the part of a call that can be seen at all.

The kernel has three kinds of mask: none (0), causal from the upper left (1) and causal to the lower right
(2); and with the last two a window of `window_size` keys that ends at the diagonal, the diagonal counted
(`kernel_forward.h`: key `j` is hidden from query `i` if `j <= i + off - window_size`).

Rows that see no key, and keys that no row sees, are where the kernel goes wrong: with fewer keys than
queries the lower right diagonal starts below zero, which wraps around in its unsigned arithmetic, and
gradients of blocks that it skips are never written. Both sides of a causal band are straight, so what can
be seen is always one rectangle: it is cut out before the kernel runs, and the rest is known without it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnplug import CausalVariant, SDPAParams

NO_MASK, UPPER_LEFT, LOWER_RIGHT = 0, 1, 2
OPEN = (-1, -1)


@dataclass(frozen=True)
class Span:
    """The queries and keys that take part, and the kernel's mask among them."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    mask_type: int = NO_MASK
    window: int | None = None

    @property
    def empty(self) -> bool:
        return self.queries[0] >= self.queries[1] or self.keys[0] >= self.keys[1]


def band(params: SDPAParams) -> tuple[int, int]:
    """Return how many keys to the left and right of the diagonal are seen; -1 is an open side."""
    left, right = params.window_size
    return left, 0 if params.is_causal else right


def causal_or_open(params: SDPAParams) -> bool:
    """Whether the kernel has a mask for this band: none, or one that ends at the diagonal."""
    return band(params) == OPEN or band(params)[1] == 0


def shifted_window(params: SDPAParams) -> bool:
    """Whether a window's diagonal may start elsewhere than at the first key: the backward forgets that offset."""
    if params.window_size[0] < 0 or params.causal_variant != CausalVariant.LOWER_RIGHT:
        return False
    if params.is_varlen or params.seqused_k is not None:
        return True
    return bool(params.query.shape[2] != params.key.shape[2])


def window_as_mask(params: SDPAParams) -> SDPAParams:
    """Return a dense call with the same result, whose window is part of `attn_mask`; a causal mask stays as it is.

    The mask then has a row for each query, and takes the memory of that.
    """
    left, right = params.window_size
    queries, keys = params.query.shape[2], params.key.shape[2]
    offset = keys - queries if params.causal_variant == CausalVariant.LOWER_RIGHT else 0
    diagonal = torch.arange(queries, device=params.query.device).view(-1, 1) + offset
    column = torch.arange(keys, device=params.query.device)
    outside = torch.zeros(queries, keys, dtype=torch.bool, device=params.query.device)
    if left >= 0:
        outside |= column < diagonal - left
    if right >= 0:
        outside |= column > diagonal + right
    mask = params.attn_mask
    if mask is None:
        mask = outside.logical_not().view(1, 1, queries, keys)
    elif mask.dtype == torch.bool:
        mask = mask & outside.logical_not()
    else:
        mask = mask.detach().masked_fill(outside, float("-inf")).requires_grad_(mask.requires_grad)
    return replace(params, attn_mask=mask, window_size=OPEN)


def span(params: SDPAParams, queries: int, keys: int) -> Span:
    """Return the part of a dense call of these lengths that can be seen; its band must be causal or open."""
    left, right = band(params)
    if right != 0:
        return Span((0, queries), (0, keys))
    if params.causal_variant == CausalVariant.UPPER_LEFT or queries == keys:
        seen_keys = min(keys, queries)
        seen_queries = queries if left < 0 else min(queries, seen_keys + left)
        return Span((0, seen_queries), (0, seen_keys), UPPER_LEFT, window(left, max(seen_queries, seen_keys)))
    offset = keys - queries
    first_query = max(0, -offset)
    first_key = 0 if left < 0 else max(0, offset - left)
    return Span((first_query, queries), (first_key, keys), LOWER_RIGHT, window(left, keys - first_key))


def window(left: int, longest: int) -> int | None:
    """Return the kernel's window size, or None for one that hides nothing among `longest` keys."""
    return None if left < 0 or left >= longest - 1 else left + 1


def hidden(part: Span, device: torch.device) -> Tensor | None:
    """Return `(queries, keys)`, True where the mask within `part` hides a key, or None if there is no mask."""
    if part.mask_type == NO_MASK:
        return None
    queries, keys = part.queries[1] - part.queries[0], part.keys[1] - part.keys[0]
    row = torch.arange(queries, device=device).view(-1, 1) + (keys - queries if part.mask_type == LOWER_RIGHT else 0)
    column = torch.arange(keys, device=device)
    outside = column > row
    return outside if part.window is None else outside | (column <= row - part.window)


def blind_rows(allowed: Tensor, part: Span) -> Tensor:
    """Return `(b, h, Sq or 1)`, True for rows that see no key through mask and band together.

    Args:
        allowed: `(b, h, Sq or 1, Sk)` boolean, the keys that the mask leaves.
        part: the part of the call that `allowed` was cut to.

    The band of a row is an interval of keys; counting the allowed keys before each end of it needs no
    `(Sq, Sk)` mask where the given one has a single row for all queries.
    """
    if part.mask_type == NO_MASK:
        return allowed.any(-1).logical_not()
    queries, keys = part.queries[1] - part.queries[0], part.keys[1] - part.keys[0]
    before = torch.nn.functional.pad(allowed.cumsum(-1, dtype=torch.int32), (1, 0))
    row = torch.arange(queries, device=allowed.device) + (keys - queries if part.mask_type == LOWER_RIGHT else 0)
    stop = (row + 1).clamp(0, keys)
    start = torch.zeros_like(stop) if part.window is None else (row + 1 - part.window).clamp(0, keys)
    if allowed.shape[-2] == 1:
        counted = before.squeeze(-2)
        return counted.index_select(-1, stop) <= counted.index_select(-1, start)
    index = (*allowed.shape[:-1], 1)
    stop, start = (end.view(-1, 1).expand(index) for end in (stop, start))
    return (before.gather(-1, stop) <= before.gather(-1, start)).squeeze(-1)
