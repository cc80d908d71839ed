"""The quick answer for a call of the usual form while measured choices are in use.

Without it a call would pay for its facts where, without choices, PyTorch's function runs at once. Of the usual form is
a call without mask, dropout and lse, outside any scope, whose keys and values have one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnplug._call.autocast import any_autocast
from attnplug._call.facts import CallFacts
from attnplug._dispatch.measured import choice_of, tell
from attnplug._dispatch.plans import KEPT, Plan, find, is_deterministic
from attnplug._dispatch.recognised import PLAIN, comparison
from attnplug._registry.registry import DEFAULT
from attnplug._selection.state import when_started
from attnplug._types import SDPAParams

PASS, PASS_IF_ALIGNED, ASK = "PyTorch's function", "the same if tensors are aligned", "the other routes"
_answers: dict[tuple[Any, ...], Any] = {}
_grad_enabled = torch.is_grad_enabled
_strided = torch.strided


class _Kept(NamedTuple):
    """Kept where a kernel runs: its plan, which has a `plain`, and what compares the tensors of a call with its likes.

    There is a comparison for each way in which tensors may be the same: of query and key, and of key and value.
    """

    plan: Plan
    fits: dict[tuple[bool, bool], Callable[..., bool]]


def answer(query: Any, key: Any, value: Any, is_causal: bool, enable_gqa: bool) -> Any:
    """Return `PASS`, `PASS_IF_ALIGNED`, the plan of a kernel, which has a `plain`, or `ASK`. 0.8 us, of a plan 1.4.

    What is in the key was found to fit when its answer was kept. The number of keys is rounded, as in kinds of calls,
    so that a decode loop finds what is kept.
    """
    if any_autocast() or type(key) not in PLAIN:  # a fake one's sizes may be symbols, which would be noted as looked at
        return ASK
    try:
        shape = key.shape
        batch, heads, keys, size = shape
        if keys < 1 or value.shape != shape:
            return ASK
        known = (
            query.shape,
            batch,
            heads,
            (keys - 1).bit_length(),
            size,
            query.dtype,
            query.get_device(),
            enable_gqa,
            is_causal,
            is_causal and query.shape[2] == keys,
            _grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
        )
        found = _answers.get(known)
        if type(found) is str:
            return found
        if found is not None and (fits := found.fits.get((query is key, key is value))) is not None:
            # what could not be in the key for want of time; layouts before the comparison: see `recognised`
            strided = query.layout is key.layout is value.layout is _strided
            return found.plan if strided and not is_deterministic() and fits(query, key, value) else ASK
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):  # no tensors, or symbolic sizes
        return ASK
    return _found(known, query, key, value, is_causal, enable_gqa)


def _found(known: tuple[Any, ...], query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool) -> Any:
    """Find the answer and keep it, unless there is a mistake in the call, or nothing is decided yet.

    Of a kernel it is kept for later calls; this one takes the other routes.
    """
    params = SDPAParams(query, key, value, is_causal=is_causal, enable_gqa=enable_gqa)
    facts = CallFacts.of(params)
    if facts is None:
        return ASK
    choice = choice_of(facts, params)
    if choice is None:
        tell(facts, params)
    if choice in (None, DEFAULT):
        found: Any = PASS if query.get_device() < 0 else PASS_IF_ALIGNED
    else:
        plan = find(None, facts, params)
        if plan is None:
            return ASK
        if plan.plain is None or plan.decision.shape_dependent or is_deterministic():
            found = ASK
        else:
            fits, before = comparison((query, key, value)), _answers.get(known)
            if fits is None:  # it may be another with other strides
                return ASK
            others = before.fits if type(before) is _Kept and before.plan is plan else {}
            found = _Kept(plan, others | {(query is key, key is value): fits})
    if len(_answers) >= KEPT:
        _answers.clear()
    _answers[known] = found
    return ASK if type(found) is _Kept else found


when_started(lambda registry: registry.listeners.append(lambda changed: _answers.clear()))
