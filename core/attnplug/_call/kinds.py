"""Which kind of call this is, as measured choices tell calls apart."""

from __future__ import annotations

from typing import Any

from attnplug._call.device import name_of_dtype
from attnplug._call.facts import CallFacts
from attnplug._call.requirements import features, needs_grad
from attnplug._selection.choice_tables import Kind, rounded_up
from attnplug._types import SDPAParams

Problem = tuple[Any, ...]


def problem_of(facts: CallFacts) -> Problem:
    """Return the kind of a call without its sizes, as `Kind.problem` has it."""
    return (
        name_of_dtype(facts.dtype),
        facts.head_size,
        facts.value_head_size,
        facts.heads // max(facts.kv_heads, 1),
        tuple(sorted(feature.name for feature in features(facts))),
        needs_grad(facts),
    )


def sizes_of(params: SDPAParams) -> tuple[int, int, int]:
    """Return sequences times query heads, and the lengths of queries and of keys, of a call as kernels know it."""
    query, starts = params.query, params.cu_seq_q
    if starts is not None:
        return (starts.shape[0] - 1) * query.shape[1], params.max_q, params.max_k
    return query.shape[0] * query.shape[1], query.shape[2], params.key.shape[2]


def kind_of(facts: CallFacts, params: SDPAParams) -> Kind:
    """Return the kind of a call, whose sizes are rounded up to powers of two."""
    return Kind(*problem_of(facts), *map(rounded_up, sizes_of(params)))
