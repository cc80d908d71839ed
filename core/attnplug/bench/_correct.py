"""Whether a result is right, by the rule that every implementation is held to.

The reference in float64 needs a score for each pair of query and key. Where these are too many, the call runs in
full size all the same, and is held against the reference in samples: the first and the last group of heads, and
of these as many rows as fit; of packed sequences two of them, as dense calls. The gradient of out is zero elsewhere, so
the gradients of the sampled keys and values depend on the sampled rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnplug import CausalVariant
from attnplug._accuracy import Expected, Outcome
from attnplug.bench._cases import Case
from attnplug.bench._inputs import Problem
from attnplug.testing import Call, CheckFailure, Inputs
from attnplug.testing._compare import assert_outcome, expected, is_quantized

SCORES = {"cpu": 2**21, "cuda": 2**24}
"""How many scores the reference may hold at once, for each device type."""
LEAVES = ("query", "key", "value")
_SHOWN = 20  # queries of a call that shows what was dropped
_FLAT = 0.02  # a scale with which no probability is near 0


Part = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Sample:
    """A part of the case, and what it should give.

    Attributes:
        part: returns, of out, of lse, or of an argument or its gradient, by name, what belongs to the sample.
        call: that the part is.
        inputs: of that call.
        expected: its result.
    """

    part: Part
    call: Call
    inputs: Inputs
    expected: Expected

    def outcome(self, out: Tensor, lse: Tensor | None, gradients: dict[str, Tensor]) -> Outcome:
        """Return what a full result says of this part."""
        return Outcome(
            self.part("out", out.detach()),
            None if lse is None else self.part("lse", lse.detach()),
            {name: self.part(name, gradient) for name, gradient in gradients.items()},
        )


class Reference:
    """What a case should give: computed once, held against each implementation."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.samples = list(_samples(problem))
        self._grad_out = torch.zeros_like(problem.grad_out)
        for sample in self.samples:
            sample.part("out", self._grad_out).copy_(sample.part("out", problem.grad_out))

    def mistake(self, impl: str) -> str:
        """Run an implementation; return what is wrong with its result, an empty string if it is right.

        What a kernel drops nobody knows, so the result is compared without dropout, and dropout in a small call.
        """
        case = self._problem.case
        out, lse = self._problem.forward_with_lse(impl, dropout_p=0.0)
        found = self._problem.backward(out, self._grad_out) if case.backward else ()
        gradients = dict(zip(case.leaves, found, strict=True))
        for sample in self.samples:
            try:
                outcome = sample.outcome(out, lse, gradients)
                assert_outcome(sample.call, sample.inputs, sample.expected, outcome, is_quantized(impl))
            except CheckFailure as failure:
                return _in_one_line(failure)
        return _mistake_of_dropout(case, impl)


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
        ((case.is_varlen and shown.packed()) or shown).check(impl)
    except CheckFailure as failure:
        return f"with dropout: {_in_one_line(failure)}"
    return ""


def _in_one_line(failure: CheckFailure) -> str:
    return str(failure.args[0]).replace("\n", "; ")


def _samples(problem: Problem) -> Iterator[Sample]:
    """Yield all of the case if that fits, else parts that do."""
    case = problem.case
    limit = SCORES[torch.device(case.device).type]
    if case.batch * case.heads * case.queries * case.keys <= limit:
        yield _sample(problem, lambda name, tensor: tensor, _call(case))
        return
    group = case.heads // case.kv_heads
    corners = sorted({(0, 0), (case.batch - 1, case.kv_heads - 1)})
    if not set(case.leaves) <= set(LEAVES):
        corners = corners[:1]  # the gradient of a mask and of sinks is a sum, of which the others are no part
    for number, head in corners:
        kv_heads, heads = slice(head, head + 1), slice(head * group, (head + 1) * group)
        make = _of_sequence if case.is_varlen else _of_batch
        yield make(problem, number, heads, kv_heads, limit // group)


def _of_batch(problem: Problem, number: int, heads: slice, kv_heads: slice, limit: int) -> Sample:
    """Return some heads and rows of one sequence of a dense case."""
    case, batch = problem.case, slice(number, number + 1)
    rows = _rows(case.queries, limit // case.keys, from_end=_aligned_below(case))
    of_mask = [
        place if letter != "1" else slice(None)
        for place, letter in zip((batch, heads, rows), case.mask_dims[:3], strict=True)
    ]
    places: dict[str, tuple[slice, ...]] = {
        **dict.fromkeys(("out", "lse", "query"), (batch, heads, rows)),
        **dict.fromkeys(("key", "value"), (batch, kv_heads)),
        "attn_mask": tuple(of_mask),
        "seqused_k": (batch,),
    }
    call = _call(
        case,
        batch=1,
        heads=heads.stop - heads.start,
        kv_heads=1,
        queries=rows.stop - rows.start,
        used=None if case.used is None else case.used[batch],
        causal_variant="LOWER_RIGHT" if _aligned_below(case) else "UPPER_LEFT",
    )
    return _sample(problem, lambda name, tensor: tensor[places.get(name, (heads,))], call)


def _of_sequence(problem: Problem, number: int, heads: slice, kv_heads: slice, limit: int) -> Sample:
    """Return some heads and rows of one of several packed sequences, as a dense call."""
    case, given = problem.case, problem.arguments
    assert case.lengths_q is not None
    assert case.lengths_k is not None
    queries = case.lengths_q[number]
    keys = (case.used or case.lengths_k)[number]
    rows = _rows(queries, limit // max(keys, 1), from_end=True)
    first, first_key = int(given["cu_seq_q"][number]), int(given["cu_seq_k"][number])

    def part(name: str, tensor: Tensor) -> Tensor:
        here = slice(first + rows.start, first + rows.stop)
        if name == "lse":
            return tensor[heads, here][None]
        if name in ("out", "query"):
            return tensor[here, heads].transpose(0, 1)[None]
        if name in ("key", "value"):
            if case.page_size is None:
                tensor = tensor[first_key : first_key + keys]
            else:
                tensor = tensor[given["block_table"][number].long()].flatten(0, 1)[:keys]
            return tensor[:, kv_heads].transpose(0, 1)[None]
        return tensor[heads]

    call = _call(
        case,
        batch=1,
        heads=heads.stop - heads.start,
        kv_heads=1,
        queries=rows.stop - rows.start,
        keys=keys,
        lengths_q=None,
        lengths_k=None,
        used=None,
        page_size=None,
    )
    return _sample(problem, part, call)


def _rows(queries: int, most: int, from_end: bool) -> slice:
    """Return as many rows as there may be, at least one if there is any."""
    count = min(queries, max(1, most))
    return slice(queries - count, queries) if from_end else slice(0, count)


def _aligned_below(case: Case) -> bool:
    """Whether the last rows, taken for themselves, see the same keys when aligned to the lower right."""
    return case.causal_variant == "LOWER_RIGHT" or (case.queries == case.keys and case.used is None)


_PACKED = ("cu_seq_q", "cu_seq_k", "max_q", "max_k", "block_table")


def _sample(problem: Problem, part: Part, call: Call) -> Sample:
    given = {
        name: part(name, value.detach()) if isinstance(value, Tensor) and name not in _PACKED else value
        for name, value in problem.arguments.items()
    }
    arguments = {**given, "scale": None, "dropout_p": 0.0}
    if not call.is_varlen:
        arguments = {name: value for name, value in arguments.items() if name not in _PACKED}
        arguments["causal_variant"] = CausalVariant[call.causal_variant]
        if call.used is None:
            arguments.pop("seqused_k", None)
    grad_out = part("out", problem.grad_out)
    inputs = Inputs(arguments, grad_out, grad_out.new_zeros(()))
    return Sample(part, call, inputs, expected(call, inputs))


def _call(case: Case, **changes: Any) -> Call:
    """Return a case as a call of the conformance kit, which a message shows."""
    call = Call(
        batch=case.batch,
        heads=case.heads,
        kv_heads=case.kv_heads,
        queries=case.queries,
        keys=case.keys,
        head_size=case.head_size,
        value_head_size=case.value_head_size,
        dtype=case.dtype,
        device=case.device,
        mask=case.mask,
        mask_dims=case.mask_dims,
        is_causal=case.causal,
        causal_variant=case.causal_variant,
        window_size=case.window,
        softcap=case.softcap,
        sinks=case.sinks,
        alibi="h" if case.alibi else "",
        lengths_q=case.lengths_q,
        lengths_k=case.lengths_k,
        used=case.used,
        page_size=case.page_size,
        lse=case.lse,
        gradients=case.leaves,
    )
    return call.but(**changes)
