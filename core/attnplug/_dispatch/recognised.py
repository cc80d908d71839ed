"""The short way of the kept route: a call is recognised, by one comparison in C, as one whose plan is known.

The facts of a call are read off its tensors one by one, which takes longer than anything else about a call of a kept
plan. `compared` looks at all of them at once, and at more than facts hold, but for sizes and strides that it is not
given. Those, batch and lengths, are compared in Python, so that a decode loop is recognised at each step. Where each of
them counts, because a kernel looks at shapes (`Kernel.shape_dependent`) or has prepared for them (`Kernel.prepare`),
plans are kept by all sizes and strides. A comparison with those of one call comes before it, which needs nothing in
Python: with those of the first, until lengths turn out to vary, and then with those that a kernel last prepared for at
once, which the other layers of a decode loop have.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnplug._call.autocast import any_autocast
from attnplug._call.comparing import compared
from attnplug._call.facts import is_plain
from attnplug._dispatch.plans import Plan
from attnplug._dispatch.ranges import is_profiled
from attnplug._run.batched import is_wrapped
from attnplug._run.contract import Order, Result, tensors_of
from attnplug._run.operator import is_jit_tracing, is_watched
from attnplug._run.transforms import is_transformed
from attnplug._selection.state import thread, when_started
from attnplug._types import OPEN_WINDOW, SDPAParams

PLAIN = (Tensor, torch.nn.Parameter)
SEVERAL = 8
"""How many kinds of tensors are recognised for each way to call; others are decided by their facts.

With more sizes than this of one kind, lengths vary; and when so many have come a second time, others will.
"""
SIZES = 256
"""How many sizes of one kind are kept."""
WAYS = 4096


@dataclass(slots=True)
class Known:
    """Calls whose plan is known.

    Attributes:
        same: compares tensors with one call's in all sizes and strides, the first's or one's that was prepared for at
            once, and how to carry out such a call; None where they vary, or, of packed sequences, nothing was prepared.
        alike: compares all but batch and lengths.
        square: whether there must be as many queries as keys; None where it does not count.
        cast: a type of device, and the dtype that autocast must cast to there; None without autocast.
        plan: how to carry out such a call; None where its sizes decide about it.
        by_sizes: the same by all sizes and strides, where these decide, or the kernel prepares for them; else None. The
            longest sequences are among the sizes, and are all where the tensors are the `same` as the first call's.
        came_again: how many sizes came a second time, up to `SEVERAL`; one less for each that was prepared for in vain.
        unused: the plan that was last prepared at once, until its sizes come again.
    """

    same: tuple[Callable[..., bool], Plan] | None
    alike: Callable[..., bool]
    square: bool | None
    cast: tuple[str, torch.dtype] | None
    plan: Plan | None
    by_sizes: dict[Hashable, Plan] | None
    came_again: int = 0
    unused: Plan | None = None

    def keep(self, sizes: Hashable, plan: Plan) -> None:
        """Keep a plan under all sizes and strides of a call."""
        assert self.by_sizes is not None
        if len(self.by_sizes) >= SIZES:
            self.by_sizes.clear()
        self.by_sizes[sizes] = plan

    def find(self, sizes: Hashable, given: tuple[Tensor, ...] | None = None) -> Plan | None:
        """Return the plan that is kept for these sizes, or prepares for them as they come a second time.

        Those that were prepared for at once are the ones to compare with from then on, given the tensors.
        """
        assert self.by_sizes is not None
        found = self.by_sizes.get(sizes)
        if found is None:
            return None
        if found is not self.plan:
            if found is self.unused:
                self.unused = None
                exactly = None if given is None else compared(given)
                self.same = self.same if exactly is None else (exactly, found)
            return found
        self.came_again = min(self.came_again + 1, SEVERAL)
        return _Preparing(found, self, sizes)

    def found_first(self, sizes: Hashable) -> Plan:
        """Return the plan of a call whose sizes come for the first time."""
        assert self.plan is not None
        if self.unused is not None:
            self.came_again, self.unused = self.came_again - 1, None
        if self.came_again == SEVERAL:
            return _Preparing(self.plan, self, sizes, at_once=True)
        self.keep(sizes, self.plan)
        return self.plan


class _Preparing(Plan):
    """The plan of a call for whose sizes the kernel prepares first, because there will be more of them.

    That is so when they come a second time, as in each layer of a decode loop; and once several did, at once, for as
    long as those come again.
    """

    def __init__(self, plan: Plan, known: Known, sizes: Hashable, at_once: bool = False) -> None:
        self._plan, self._known, self._sizes, self._at_once = plan, known, sizes, at_once
        self.plain = None

    def run_as_given(self, params: SDPAParams) -> Result:
        plan, mask, scale = self._plan, params.attn_mask, params.scale
        if is_watched(params.query):  # what a kernel makes now is not what it makes otherwise
            return plan.run_as_given(params)
        plan.complete(params)
        repeated = plan.repeated(params)
        repeated = copy(plan) if repeated is plan else repeated  # no longer seen once
        self._known.keep(self._sizes, repeated)
        if self._at_once:
            self._known.unused = repeated
        if params.is_varlen:
            return repeated.run_as_given(params)
        if repeated.plain is None or thread.state.watched or is_profiled():
            return plan.run_as_given(params)
        given = params.query, params.key, params.value, mask, params.dropout, params.is_causal
        return repeated.plain(*given, scale, params.enable_gqa)


known: dict[Hashable, tuple[Known, ...]] = {}
"""By who decides and how the function is called. Emptied when the registry changes; what another thread adds just then
has the old generation in its key, and is never found."""

_strided = torch.strided
_autocast_dtype = torch.get_autocast_dtype


def recognise(
    candidates: tuple[Known, ...], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Plan | None:
    """Return the plan of a call, if one of `candidates` fits its tensors. 0.6 us for the same sizes, else 1.2 to 2."""
    if type(query) not in PLAIN:  # what is fake or symbolic would note that its shape was looked at
        return None
    try:  # the comparison in C ends the process at a tensor that has no sizes or strides: nested and sparse ones
        if not query.layout is key.layout is value.layout is _strided or (
            mask is not None and (mask.layout is not _strided or mask.is_nested)
        ):
            return None
        if query.is_nested or key.is_nested or value.is_nested:
            return None
        given = (query, key, value) if mask is None else (query, key, value, mask)
        for one in candidates:
            same = one.same
            if same is not None and same[0](*given) and (one.cast is None or _is_cast(one.cast)):
                return same[1]
        if is_jit_tracing():  # as in `remember`
            return None
        for one in candidates:
            if not one.alike(*given) or not (one.cast is None or _is_cast(one.cast)):
                continue
            sizes = None
            if one.by_sizes is not None:
                found = one.find(sizes := _sizes(given), given)
                if found is not None:
                    return found
                if len(one.by_sizes) > SEVERAL:
                    one.same = None
            if one.plan is not None and _agree(query, key, value, mask, one.square):
                if sizes is not None:
                    return one.found_first(sizes)
                one.same = None
                return one.plan
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # or no tensor of four dimensions
        return None
    return None


def _sizes(given: tuple[Tensor, ...]) -> tuple[Hashable, ...]:
    """Return all sizes and strides of tensors."""
    return (*[tensor.shape for tensor in given], *[tensor.stride() for tensor in given])


def _agree(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, square: bool | None) -> bool:
    """Whether batch and lengths of tensors that are alike go together, and are not 0."""
    batch, _, queries, _ = query.shape
    key_shape, value_shape = key.shape, value.shape
    key_batch, _, keys, _ = key_shape
    return (
        batch == key_batch > 0
        and keys > 0 < queries
        and (value_shape == key_shape or (len(value_shape) == 4 and value_shape[::2] == key_shape[::2]))
        and (mask is None or _broadcasts(mask.shape, batch, queries, keys))
        and (square is None or square is (queries == keys))
    )


def _is_cast(cast: tuple[str, torch.dtype]) -> bool:
    """Whether autocast casts to this dtype on this type of device."""
    return _autocast_dtype(cast[0]) is cast[1]


def _broadcasts(shape: torch.Size, batch: int, queries: int, keys: int) -> bool:
    """Whether a mask's sizes are 1 or full; that of heads is compared with the other fixed sizes."""
    return (
        (shape[-1] == keys or shape[-1] == 1)
        and (shape[-2] == queries or shape[-2] == 1)
        and (len(shape) < 4 or shape[0] == batch or shape[0] == 1)
    )


def distinct(
    query: Any,
    key: Any,
    value: Any,
    sinks: Any,
    alibi_slopes: Any,
    seqused_k: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    block_table: Any,
) -> tuple[Any, ...]:
    """Return the tensors of packed sequences that there are, in their `Order`."""
    given: tuple[Any, ...] = query, key, value
    if sinks is not None:
        given = (*given, sinks)
    if alibi_slopes is not None:
        given = (*given, alibi_slopes)
    if seqused_k is not None:
        given = (*given, seqused_k)
    given = (*given, cu_seq_q)
    if cu_seq_k is not None and cu_seq_k is not cu_seq_q:
        given = (*given, cu_seq_k)
    return given if block_table is None else (*given, block_table)


def recognise_packed(candidates: tuple[Known, ...], given: tuple[Any, ...], max_q: int, max_k: int) -> Plan | None:
    """Return the plan of a call of packed sequences, if one of `candidates` fits its `distinct` tensors.

    One that was prepared was so for a call of the same sizes, of whose lengths all was checked but their values.
    """
    query, key, value = given[:3]
    if type(query) not in PLAIN:
        return None
    try:
        for tensor in given:  # as in `recognise`
            if tensor.layout is not _strided or tensor.is_nested:
                return None
        longest: Any = max_q, max_k
        for one in candidates:
            same = one.same is not None and one.same[0](*given)
            if not (same or one.alike(*given)) or not (one.cast is None or _is_cast(one.cast)):
                continue
            sizes = None
            if one.by_sizes is not None:
                found = one.find(sizes := longest if same else (longest, *_sizes(given)))
                if found is not None:
                    return found
            keys = key.shape[:-2]
            if query.shape[0] > 0 and keys == value.shape[:-2] and 0 not in keys:
                return one.plan if sizes is None else one.found_first(sizes)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        return None
    return None


def remember(way: Hashable, plan: Plan, params: SDPAParams, mask: Tensor | None = None) -> None:
    """Recognise from now on calls like this one, of four dimensions or packed, whose plan its facts gave.

    `way` is who decides, and how the function was called; `mask` is the user's, of two to four dimensions.
    """
    query, key, value, packed = params.query, params.key, params.value, params.is_varlen
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    if packed:
        tensors = Order.of(params).own(tensors_of(params))
    others, autocasts, all_count = known.get(way, ()), any_autocast(), plan.decision.shape_dependent
    if (
        (all_count and packed)  # whose longest sequences count too
        or is_transformed()
        or is_watched(query)  # what a kernel prepared is no operator, and both runs of a torch.jit.trace want one graph
        or any(tensor.is_neg() for tensor in tensors)  # a kernel gets these resolved
        or any(map(is_wrapped, tensors))  # which what runs for recognised calls does not look for
        or (mask is not None and (mask.dim() < 2 or params.return_lse))  # see `Kernel.plain`
        or (params.alibi_slopes is not None and params.alibi_slopes.dim() > 1)  # some for each sequence
        or (autocasts and _autocast_dtype(query.device.type) is not query.dtype)
    ):
        return
    cast = (query.device.type, query.dtype) if autocasts else None
    like = next((one for one in others if one.by_sizes is not None and one.cast == cast and one.alike(*tensors)), None)
    if like is None and len(others) >= SEVERAL:
        return
    of_heads = params.sinks, params.alibi_slopes
    alike = comparison(tensors, packed=packed, whole=of_heads) if like is None else like.alike
    if alike is None:
        return
    repeated = plan.repeated(params) if packed or is_plain(params) else plan
    longest = params.max_q, params.max_k
    if like is not None:
        sizes = _sizes(tensors)
        like.keep((longest, *sizes) if packed else sizes, repeated)
        return
    exactly = None if packed and repeated is plan else compared(tensors)
    square = query.shape[2] == key.shape[2] if not packed and _has_positions(params) else None
    by_sizes: dict[Hashable, Plan] | None = None
    if all_count or repeated is not plan:
        by_sizes = {longest if packed else _sizes(tensors): repeated}
    if len(known) >= WAYS:
        known.clear()
    same = None if exactly is None else (exactly, repeated)
    known[way] = (*others, Known(same, alike, square, cast, None if all_count else plan, by_sizes))


def _has_positions(params: SDPAParams) -> bool:
    """Whether it counts where queries stand among the keys."""
    return params.is_causal or params.window_size != OPEN_WINDOW


def comparison(
    tensors: tuple[Tensor, ...], packed: bool = False, whole: tuple[Tensor | None, ...] = ()
) -> Callable[..., bool] | None:
    """Return what compares a call's tensors with these; None for tensors that are not recognised.

    All is compared but for batch, lengths, and the strides that depend on them; of those that are `whole`, these too.
    Those of queries, keys and values must be strided, of at least two dimensions, and dense in the
    last, as these are.
    """
    dense = all(tensor.stride(-1) == 1 for tensor in tensors[:3])
    if not dense or not {*map(type, tensors)}.issubset(PLAIN):
        return None
    heads = -2 if packed else -3
    sizes: list[list[int | None]] = []
    strides: list[list[int | None]] = []
    for tensor in tensors:
        if any(tensor is one for one in whole):
            size: list[int | None] = [*tensor.shape]
            stride: list[int | None] = [*tensor.stride()]
        else:
            rank = tensor.dim()
            size, stride = [None] * rank, [None] * rank
            if rank >= -heads and not (packed and len(sizes) >= 3):
                size[heads] = tensor.shape[heads]
            if len(sizes) < 3:  # of a mask, what is left is compared in Python; of lengths, by who checks them
                size[-1], stride[-1] = tensor.shape[-1], 1
        sizes.append(size)
        strides.append(stride)
    return compared(tensors, sizes, strides)


when_started(lambda registry: registry.listeners.append(lambda _: known.clear()))
