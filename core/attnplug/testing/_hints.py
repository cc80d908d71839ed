"""What a known mistake would have given: if a wrong result is exactly that, the report says so."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnplug._accuracy import Expected
from attnplug._types import CausalVariant
from attnplug.testing._fields import Fields
from attnplug.testing._inputs import Inputs, make

Arguments = dict[str, Any]


def hint(call: Fields, inputs: Inputs, right: Expected, name: str, actual: Tensor) -> str:
    """Return what the author probably did, or an empty string.

    Args:
        call: what was called.
        inputs: with which tensors.
        right: what should have come out.
        name: `out`, `lse`, or the argument whose gradient is wrong.
        actual: what did.
    """
    if changed := _changed(inputs):
        return f"the kernel changed {', '.join(changed)} in place, and what it changed is compared here"
    if actual.isnan().any():
        return _nan(call)
    if name == "lse" and (found := _lse(right, actual)):
        return found
    if name in ("query", "key") and (found := _unscaled(right, name, actual)):
        return found
    if name in ("key", "value") and (found := _other_groups(call, right, name, actual)):
        return found
    for text, arguments in _mistakes(call, inputs.arguments):
        mistaken = replace(right, arguments=arguments)
        try:
            exact, allowed = mistaken.ref[name], mistaken.allowed(name)
        except (RuntimeError, IndexError, TypeError, ValueError):  # the mistake makes no sense for these shapes
            continue
        if exact.shape == actual.shape and _near(actual.double(), exact, allowed * (10 if name == "lse" else 1)):
            return f"this is what comes out with {text}"
    return ""


def _near(actual: Tensor, ref: Tensor, allowed: float | Tensor) -> bool:
    """Whether these are the same, infinities too; nothing is like NaN, which is what mistakes make of poison."""
    return bool(((actual == ref) | ((actual - ref).abs() <= allowed)).all())


def _changed(inputs: Inputs) -> list[str]:
    """Return the arguments that are not any more what was made for the call."""
    if inputs.call is None:  # a part of a benchmark's case, for example
        return []
    made = make(inputs.call).arguments
    given = {name: value for name, value in inputs.arguments.items() if isinstance(value, Tensor)}
    return [name for name, value in given.items() if not _is_same(value, made[name])]


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    """Whether tensors of one shape hold the same numbers; NaN is the same as NaN."""
    return bool((tensor.eq(other) | tensor.ne(tensor) & other.ne(other)).all())


def _nan(call: Fields) -> str:
    if call.poison or not {call.layout, call.mask_layout, call.numbers_layout}.isdisjoint(_SURROUNDED):
        return "memory outside the tensors, or a key that does not exist, was read; 0 * NaN is NaN"
    return "not a number: a row that sees no key (-inf - -inf), an overflow, or memory that was never written"


def _lse(right: Expected, actual: Tensor) -> str:
    """Recognise the other things that kernels call lse."""
    finite = right.ref["lse"].isfinite()
    values, exact = actual.double()[finite], right.ref["lse"][finite]
    close = 1e-3 * max(1.0, exact.abs().max().item() if exact.numel() else 1.0)
    if _near(values, exact, right.allowed("lse") * exact.abs().clamp(min=1)):
        return "rows that see no key must have lse = -inf"
    if _near(values * math.log(2), exact, close):
        return "lse is in base 2; multiply it by ln 2"
    if _near(values, exact.exp(), close):
        return "this is the denominator itself, not its logarithm"
    if _near(values, -exact, close):
        return "the sign of lse is wrong"
    return ""


def _unscaled(right: Expected, name: str, actual: Tensor) -> str:
    """Recognise a gradient that lacks the scale, or has it twice: it is off by exactly that factor."""
    scale, exact = right.arguments["scale"], right.ref[name]
    scale = right.arguments["query"].shape[-1] ** -0.5 if scale is None else scale
    allowed = right.allowed(name)
    if scale and _near(actual.double() * scale, exact, allowed * max(1.0, abs(scale))):
        return f"the scale is missing: multiply this gradient by params.scale, {scale:.6g} here"
    if scale and _near(actual.double() / scale, exact, allowed * max(1.0, 1 / abs(scale))):
        return f"this gradient is scaled twice; params.scale is {scale:.6g} here"
    return ""


def _other_groups(call: Fields, right: Expected, name: str, actual: Tensor) -> str:
    """Recognise a gradient that is right for each query head, but added over others than those of a group."""
    repeats = call.heads // (call.kv_heads or call.heads)
    if call.is_varlen or repeats in (1, call.heads):  # in which case there are no others
        return ""
    each = {part: right.arguments[part].repeat_interleave(repeats, 1) for part in ("key", "value")}
    alone = replace(right, arguments={**right.arguments, **each}).ref[name]
    if _near(actual.double(), alone.unflatten(1, (repeats, -1)).sum(1), right.allowed(name)):
        return "this adds the query heads h of one h % Hkv; those that share a head have one h // (Hq / Hkv)"
    return ""


def _mistakes(call: Fields, arguments: Arguments) -> Iterator[tuple[str, Arguments]]:
    """Yield calls whose right answer is what a known mistake gives."""
    if arguments["scale"] is not None:
        yield "the default scale: the argument scale is ignored", {**arguments, "scale": None}
    yield "no scale: multiply the products by params.scale", {**arguments, "scale": 1.0}
    for name, neutral in _NEUTRAL.items():
        given = arguments.get(name)
        if given is not None and name not in call.gradients and (isinstance(given, Tensor) or given != neutral):
            yield f"{name} ignored", {**arguments, name: neutral}
    if not call.is_varlen:
        other = 3 - int(arguments["causal_variant"])
        text = "the diagonal aligned to the other corner: see params.causal_variant"
        yield text, {**arguments, "causal_variant": other}
        if arguments["is_causal"] and arguments.get("attn_mask") is None:
            yield "a causal mask that hides the last key of each query", _without_diagonal(arguments)
    yield from _other_windows(arguments)
    if arguments["enable_gqa"]:
        yield "query head h reading key/value head h % Hkv, not h // (Hq / Hkv)", _modulo_heads(call, arguments)
    yield from _other_masks(arguments)
    if "attn_mask" in arguments and arguments["attn_mask"].dtype == torch.bool:
        yield (
            "the boolean mask's meaning inverted: True takes part",
            {**arguments, "attn_mask": ~arguments["attn_mask"]},
        )


_SURROUNDED = ("guarded", "framed", "offset", "misaligned")

_NEUTRAL: Arguments = {
    "softcap": 0.0,
    "sinks": None,
    "alibi_slopes": None,
    "attn_mask": None,
    "is_causal": False,
    "seqused_k": None,
    "window_size": (-1, -1),
}


def _without_diagonal(arguments: Arguments) -> Arguments:
    """Let each query see one key fewer than it should."""
    queries, keys = arguments["query"].shape[-2], arguments["key"].shape[-2]
    last = keys - queries if arguments["causal_variant"] is CausalVariant.LOWER_RIGHT else 0
    return {**arguments, "attn_mask": torch.ones(queries, keys, dtype=torch.bool).tril(last - 1)}


def _other_windows(arguments: Arguments) -> Iterator[tuple[str, Arguments]]:
    left, right = arguments["window_size"]
    if arguments["is_causal"]:
        yield "a causal mask that shows one key too many", {**arguments, "is_causal": False, "window_size": (left, 1)}
    for side in (1, -1):
        if left >= 0:
            yield f"a window {abs(side)} {_word(side)} on the left", {**arguments, "window_size": (left + side, right)}
        if right >= 0:
            yield f"a window {abs(side)} {_word(side)} on the right", {**arguments, "window_size": (left, right + side)}


def _other_masks(arguments: Arguments) -> Iterator[tuple[str, Arguments]]:
    """Yield the call with the mask of the first sequence, head or query for all."""
    mask = arguments.get("attn_mask")
    for dim, what in ((-4, "sequence"), (-3, "head"), (-2, "query")):
        if mask is not None and mask.dim() >= -dim and mask.shape[dim] > 1:
            first = mask.narrow(dim, 0, 1).expand_as(mask)
            yield (
                f"the mask of the first {what} for all: see the strides of params.attn_mask",
                {
                    **arguments,
                    "attn_mask": first,
                },
            )


def _word(side: int) -> str:
    return "too wide" if side > 0 else "too narrow"


def _modulo_heads(call: Fields, arguments: Arguments) -> Arguments:
    """Repeat the key/value heads one after the other rather than each for its group."""
    axis = 1 if not call.is_varlen else -2
    repeats = call.heads // (call.kv_heads or call.heads)
    repeated = {name: torch.cat([arguments[name]] * repeats, axis) for name in ("key", "value")}
    return {**arguments, **repeated}
