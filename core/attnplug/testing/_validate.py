"""The fields of a `Call` checked where its tensors are made. What the call itself refuses is left to the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnplug._arguments import as_int, expect, one_of
from attnplug._call.device import as_device
from attnplug._run.contract import DIFFERENTIABLE
from attnplug._types import DTYPES, CausalVariant
from attnplug.testing._fields import Fields

_SIZES = {"batch": 0, "heads": 0, "queries": 0, "keys": 0, "head_size": 0}
_MAYBE_SIZES = {"kv_heads": 0, "value_head_size": 0, "page_size": 1}
_MASKS = ("", "boolean", "additive", "boolean blind", "additive blind", "additive -inf", "additive blind -inf")
_WORDS = {
    "dtype": DTYPES,
    "mask": _MASKS,
    "mask_dtype": ("", *DTYPES),
    "causal_variant": tuple(CausalVariant.__members__),
    "alibi": ("", "h", "bh"),
}
_BOOLS = ("sinks", "lse", "lse_gradient", "poison")


def check(call: Fields, values: Sequence[str], layouts: Sequence[str]) -> None:
    """Raise TypeError or ValueError, naming the field, unless tensors can be made of a call.

    Args:
        call: what is checked.
        values: the kinds of numbers that there are.
        layouts: the layouts in memory that there are.
    """
    for name, least in {**_SIZES, **_MAYBE_SIZES}.items():
        size = getattr(call, name)
        if size is not None or name in _SIZES:
            _check_size(name, size, least)
    words = {**_WORDS, "values": values, **dict.fromkeys(("layout", "mask_layout", "numbers_layout"), layouts)}
    for name, known in words.items():
        one_of(name, getattr(call, name), known)
    for name in _BOOLS:
        expect(name, getattr(call, name), bool, "a bool")
    as_int("seed", call.seed, "an integer")
    as_device("device", call.device)
    if not isinstance(call.mask_dims, str) or not set(call.mask_dims) <= set("bhqk1"):
        raise ValueError(f"mask_dims: expected letters of bhqk, or 1, got {call.mask_dims!r}")
    for name in ("used", "lengths_q", "lengths_k"):
        sizes = getattr(call, name)
        if sizes is not None:
            for size in expect(name, sizes, (tuple, list), "a tuple of lengths or None"):
                _check_size(name, size, 0)
    if (call.lengths_q is None) != (call.lengths_k is None):
        raise ValueError("lengths_q, lengths_k: expected both or neither")
    for name in expect("gradients", call.gradients, (tuple, list), f"a tuple of {', '.join(DIFFERENTIABLE)}"):
        one_of("gradients", name, DIFFERENTIABLE)


def _check_size(name: str, size: Any, least: int) -> None:
    if as_int(name, size, "an integer") < least:
        raise ValueError(f"{name}: expected {least} or more, got {size}")
    if size >= 2**31:
        raise ValueError(f"{name}: expected less than 2**31, got {size}")
