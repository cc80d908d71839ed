"""Which probabilities dropout keeps, computed from their position alone.

A stateless generator, because the same mask is needed in forward, in backward and in second
derivatives, for blocks of any size, without ever storing it: whether the probability of query `i` and
key `j` is kept is a hash of (seed, batch, head, i, j).

The hash is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014;
constants and finaliser as in https://prng.di.unimi.it/splitmix64.c): each index picks a number of the
stream that the one before picked. It lives in int64 tensors, whose sums and products wrap around.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """The indices from `start` to before `stop`; unlike a `slice`, it keeps sizes symbolic in a trace."""

    start: int
    stop: int


def _signed(word: int) -> int:
    return word - (1 << 64)


_STEP = _signed(0x9E3779B97F4A7C15)
_MULTIPLY_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = _signed(0x94D049BB133111EB)


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed, an int64 tensor of shape (), from the default generator of `device`, without a sync."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def row_streams(seed: Tensor, batch: Span, heads: Span, queries: Span) -> Tensor:
    """Return the stream of each row, int64 `(B, Hq, R, 1)`, for these parts of a call."""
    streams = _pick(seed, _index(batch, seed.device)[:, None, None, None])
    streams = _pick(streams, _index(heads, seed.device)[:, None, None])
    return _pick(streams, _index(queries, seed.device)[:, None])


def keep_mask(streams: Tensor, keys: int, probability: float) -> Tensor:
    """Return a mask `(B, Hq, R, keys)`, false with `probability`."""
    uniform = _pick(streams, _index(Span(0, keys), streams.device))
    return uniform >= min(int(probability * 2.0**64) - 2**63, 2**63 - 1)


def _index(span: Span, device: torch.device) -> Tensor:
    return torch.arange(span.start, span.stop, dtype=torch.int64, device=device)


def _pick(stream: Tensor, index: Tensor) -> Tensor:
    """Return number `index` of the stream, uniform over int64."""
    word = stream + (index + 1) * _STEP
    word = (word ^ _shift_right(word, 30)) * _MULTIPLY_1
    word = (word ^ _shift_right(word, 27)) * _MULTIPLY_2
    return word ^ _shift_right(word, 31)


def _shift_right(word: Tensor, bits: int) -> Tensor:
    """Shift zeros in from the left; `>>` alone would shift copies of the sign bit in."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)
