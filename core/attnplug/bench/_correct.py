"""Whether a result is right, by the rule that every implementation is held to.

The reference in float64 needs a score for each pair of query and key. Where these are too many, the call runs in
full size all the same, and is held against the reference in samples: the first and the last group of heads, and
of these as many rows as fit. The gradient of out is zero elsewhere, so the gradients of the sampled keys and
values depend on the sampled rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnplug import CausalVariant
from attnplug._accuracy import Expected, Outcome
from attnplug.bench._cases import Case
from attnplug.bench._inputs import LEAVES, Problem
from attnplug.testing import Call, CheckFailure, Inputs
from attnplug.testing._compare import assert_outcome, expected, is_quantized

SCORES = {"cpu": 2**21, "cuda": 2**24}
"""How many scores the reference may hold at once, for each device type."""
_SHOWN = 20  # queries of a call that shows what was dropped
_FLAT = 0.02  # a scale with which no probability is near 0


@dataclass(frozen=True)
class Sample:
    """A part of the case, and what it should give."""

    batch: slice
    heads: slice
    kv_heads: slice
    rows: slice
    call: Call
    inputs: Inputs
    expected: Expected

    def outcome(self, out: Tensor, lse: Tensor | None, gradients: tuple[Tensor, ...]) -> Outcome:
        """Return what a full result says of this part."""
        place = (self.batch, self.heads, self.rows)
        parts = {}
        for name, gradient in zip(LEAVES, gradients, strict=False):
            heads, rows = (self.heads, self.rows) if name == "query" else (self.kv_heads, slice(None))
            parts[name] = gradient[self.batch, heads, rows]
        return Outcome(out.detach()[place], None if lse is None else lse.detach()[place], parts)


class Reference:
    """What a case should give: computed once, held against each implementation."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        case = problem.case
        self.samples = [_sample(problem, *place) for place in _places(case)]
        self._grad_out = torch.zeros_like(problem.grad_out)
        for sample in self.samples:
            place = (sample.batch, sample.heads, sample.rows)
            self._grad_out[place] = problem.grad_out[place]

    def mistake(self, impl: str) -> str:
        """Run an implementation; return what is wrong with its result, an empty string if it is right.

        What a kernel drops nobody knows, so the result is compared without dropout, and dropout in a small call.
        """
        out, lse = self._problem.forward_with_lse(impl, dropout_p=0.0)
        gradients = self._problem.backward(out, self._grad_out) if self._problem.case.backward else ()
        for sample in self.samples:
            try:
                outcome = sample.outcome(out, lse, gradients)
                assert_outcome(sample.call, sample.inputs, sample.expected, outcome, is_quantized(impl))
            except CheckFailure as failure:
                return _in_one_line(failure)
        return _mistake_of_dropout(self._problem.case, impl)


def _mistake_of_dropout(case: Case, impl: str) -> str:
    """Return what is wrong with dropout; values that are the identity show in out what was dropped."""
    if not case.dropout:
        return ""
    size = case.value_head_size
    shown = Call(
        batch=1,
        heads=case.heads // case.kv_heads,
        kv_heads=1,
        queries=min(size, _SHOWN),
        keys=size,
        head_size=case.head_size,
        value_head_size=size,
        dtype=case.dtype,
        device=case.device,
        is_causal=False,
        dropout_p=case.dropout,
        scale=_FLAT,
        values="identity",
        gradients=LEAVES if case.backward else (),
    )
    try:
        shown.check(impl)
    except CheckFailure as failure:
        return f"with dropout: {_in_one_line(failure)}"
    return ""


def _in_one_line(failure: CheckFailure) -> str:
    return str(failure.args[0]).replace("\n", "; ")


def _places(case: Case) -> list[tuple[slice, slice, slice, slice]]:
    """Return batch, query heads, key and value heads, and rows of each sample; all of it if that fits."""
    limit = SCORES[torch.device(case.device).type]
    everything = slice(None)
    if case.batch * case.heads * case.queries * case.keys <= limit:
        return [(everything, everything, everything, slice(0, case.queries))]
    group = case.heads // case.kv_heads
    count = max(1, min(case.queries, limit // (group * case.keys)))
    rows = slice(case.queries - count, case.queries) if _aligned_below(case) else slice(0, count)
    corners = sorted({(0, 0), (case.batch - 1, case.kv_heads - 1)})
    return [
        (slice(b, b + 1), slice(head * group, (head + 1) * group), slice(head, head + 1), rows) for b, head in corners
    ]


def _aligned_below(case: Case) -> bool:
    """Whether the last rows, taken for themselves, see the same keys when aligned to the lower right."""
    return case.causal_variant == "LOWER_RIGHT" or case.queries == case.keys


def _sample(problem: Problem, batch: slice, heads: slice, kv_heads: slice, rows: slice) -> Sample:
    case, given = problem.case, problem.arguments
    part = rows != slice(0, case.queries)
    variant = ("LOWER_RIGHT" if _aligned_below(case) else "UPPER_LEFT") if part else case.causal_variant
    arguments = {
        **given,
        "query": given["query"][batch, heads, rows].detach(),
        "key": given["key"][batch, kv_heads].detach(),
        "value": given["value"][batch, kv_heads].detach(),
        "causal_variant": CausalVariant[variant],
        "scale": None,
        "dropout_p": 0.0,
    }
    for name in ("sinks", "alibi_slopes"):
        if name in given:
            arguments[name] = given[name][heads]
    if case.mask:
        arguments["attn_mask"] = given["attn_mask"][batch, :, rows]
    grad_out = problem.grad_out[batch, heads, rows]
    inputs = Inputs(arguments, grad_out, grad_out.new_zeros(()))
    call = Call(
        batch=grad_out.shape[0],
        heads=grad_out.shape[1],
        kv_heads=arguments["key"].shape[1],
        queries=grad_out.shape[2],
        keys=case.keys,
        head_size=case.head_size,
        value_head_size=case.value_head_size,
        dtype=case.dtype,
        device=case.device,
        mask=case.mask,
        is_causal=case.causal,
        causal_variant=variant,
        window_size=case.window,
        softcap=case.softcap,
        sinks=case.sinks,
        alibi="h" if case.alibi else "",
        lse=case.lse,
        gradients=LEAVES if case.backward else (),
    )
    return Sample(batch, heads, kv_heads, rows, call, inputs, expected(call, inputs))
