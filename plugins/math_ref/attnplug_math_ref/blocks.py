"""A call split into parts that are calls themselves, small enough for all of a part's logits.

The parts are sequences, then key/value heads with their groups of query heads, then queries. A part sees
all its keys, so parts are independent, and only the gradients of keys and values are sums over parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from attnplug_math_ref.dropout import Span, row_streams
from attnplug_math_ref.formulas import Problem

# The logits of a part take 2 MiB in float32; about ten tensors of that size live at once, with dropout
# about twenty.
_LOGITS = 2**19


@dataclass(frozen=True)
class Part:
    """Where a part lies in its call. Each method returns a view; dimensions of size 1 broadcast, and stay.

    A part that is the whole call looks at no size: a trace may not know whether one that depends on data is 1.
    """

    batch: Span
    heads: Span
    kv_heads: Span
    queries: Span
    is_whole: bool = False

    def of_rows(self, tensor: Tensor) -> Tensor:
        """Return the part of `(B, Hq, Sq, ...)`."""
        return self._narrowed(tensor, self.batch, self.heads, self.queries)

    def of_keys(self, tensor: Tensor) -> Tensor:
        """Return the part of `(B, Hkv, ...)`."""
        return self._narrowed(tensor, self.batch, self.kv_heads)

    def of_batch(self, tensor: Tensor) -> Tensor:
        """Return the part of `(B, ...)`."""
        return self._narrowed(tensor, self.batch)

    def _narrowed(self, tensor: Tensor, *spans: Span) -> Tensor:
        for dim, span in enumerate(() if self.is_whole else spans):
            if tensor.shape[dim] > 1:
                tensor = tensor.narrow(dim, span.start, span.stop - span.start)
        return tensor


def parts(query: Tensor, key: Tensor) -> Iterator[Part]:
    """Split a call with `query (B, Hq, Sq, E)` and `key (B, Hkv, Sk, E)`; one that is small is one part.

    So is one that is being compiled: a trace unrolls the loop, and long sequences would take minutes.
    """
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    group = heads // kv_heads
    if torch.compiler.is_compiling() or batch * heads * queries * keys <= _LOGITS:
        yield Part(Span(0, batch), Span(0, heads), Span(0, kv_heads), Span(0, queries), is_whole=True)
        return
    for b, h, i in product(
        _spans(batch, _LOGITS // (heads * queries * keys)),
        _spans(kv_heads, _LOGITS // (group * queries * keys)),
        _spans(queries, _LOGITS // (group * keys)),
    ):
        yield Part(b, Span(h.start * group, h.stop * group), h, i)


def take(problem: Problem, part: Part, seed: Tensor | None) -> Problem:
    """Return one part of a problem, in the dtype that sums are made in."""
    dtype = accumulation_dtype(problem.query)
    offset, used = problem.offset, problem.used
    return replace(
        problem,
        query=part.of_rows(problem.query).to(dtype),
        key=part.of_keys(problem.key).to(dtype).contiguous(),
        value=part.of_keys(problem.value).to(dtype).contiguous(),
        mask=None if problem.mask is None else part.of_rows(problem.mask),
        slopes=None if problem.slopes is None else part.of_rows(problem.slopes).to(dtype),
        sinks=None if problem.sinks is None else part.of_rows(problem.sinks).to(dtype),
        used=None if used is None else part.of_batch(used),
        offset=(part.of_batch(offset) if isinstance(offset, Tensor) else offset) + part.queries.start,
        streams=None if seed is None else row_streams(seed, part.batch, part.heads, part.queries),
    )


def accumulation_dtype(query: Tensor) -> torch.dtype:
    """(13) Products and sums of float16 and bfloat16 are made in float32; lse has this dtype too."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _spans(size: int, step: int) -> list[Span]:
    step = max(1, step)
    return [Span(start, min(start + step, size)) for start in range(0, size, step)]
