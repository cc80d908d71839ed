"""What the fields of a case may hold.

A case is whatever a file or a program gives, so none of its fields can be taken to be what it is declared as.
"""

from __future__ import annotations

import math
import re
from typing import Any

from attnplug._types import DTYPES
from attnplug.bench._errors import BenchError

LENGTHS = ("lengths_q", "lengths_k", "used")
NUMBERS = ("softcap", "dropout")
FLAGS = ("sinks", "alibi", "lse", "mask_gradient", "sinks_gradient")
_SIZES = ("batch", "heads", "kv_heads", "queries", "keys", "head_size", "value_head_size")
_MASKS = ("", "boolean", "additive")
_VARIANTS = ("UPPER_LEFT", "LOWER_RIGHT")


def check(case: Any) -> None:
    """Check each field, and those together that say something of each other.

    Raises:
        BenchError: a field has a wrong type or value.
    """
    for name in _SIZES:
        size = getattr(case, name)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise BenchError(f"{name}: expected a number from 1 on, got {size!r}")
    if case.heads % case.kv_heads:
        raise BenchError(f"kv_heads: expected a divisor of heads ({case.heads}), got {case.kv_heads}")
    for name, known in (("mask", _MASKS), ("causal_variant", _VARIANTS), ("dtype", DTYPES)):
        if not isinstance(getattr(case, name), str) or getattr(case, name) not in known:
            accepted = ", ".join(repr(item) for item in known)
            raise BenchError(f"{name}: expected one of {accepted}, got {getattr(case, name)!r}")
    for name in ("causal", "backward", *FLAGS):
        if not isinstance(getattr(case, name), bool):
            raise BenchError(f"{name}: expected true or false, got {getattr(case, name)!r}")
    for name in NUMBERS:
        value, most = getattr(case, name), 1.0 if name == "dropout" else math.inf
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < most:
            raise BenchError(f"{name}: expected a number from 0 on, below {most:g}, got {value!r}")
    window = case.window
    sides = isinstance(window, tuple) and len(window) == 2 and all(type(side) is int and side >= -1 for side in window)
    if not sides:
        raise BenchError(f"window: expected two numbers from -1 on, such as [256, 0], got {window!r}")
    if not isinstance(case.name, str):
        raise BenchError(f"name: expected text, got {case.name!r}")
    _check_mask(case)
    _check_sequences(case)
    device_type(case.device)


def _check_mask(case: Any) -> None:
    dims = case.mask_dims
    if not (isinstance(dims, str) and re.fullmatch("[b1][h1][q1][k1]", dims)):
        raise BenchError(f"mask_dims: expected each letter of 'bhqk', or 1 where the mask broadcasts, got {dims!r}")
    for name, asked, is_given in (
        ("mask_gradient", case.mask_gradient, case.mask == "additive"),
        ("sinks_gradient", case.sinks_gradient, case.sinks),
    ):
        if asked and not (is_given and case.backward):
            needed = "mask='additive'" if name == "mask_gradient" else "sinks"
            raise BenchError(f"{name}: needs {needed} and backward")


def check_lengths(case: Any) -> None:
    """Check the lengths that sizes are derived from, before they are.

    Raises:
        BenchError: as `check`.
    """
    for name in ("lengths_q", "lengths_k"):
        lengths = getattr(case, name)
        if lengths is None:
            continue
        if not (isinstance(lengths, tuple) and lengths and all(type(each) is int and each >= 0 for each in lengths)):
            raise BenchError(
                f"{name}: expected a number from 0 on for each sequence, such as [5, 3, 8], got {lengths!r}"
            )
        if max(lengths) == 0:
            raise BenchError(f"{name}: all sequences are empty")


def _check_sequences(case: Any) -> None:
    if not case.is_varlen:
        for name in ("lengths_k", "page_size"):
            if getattr(case, name) is not None:
                raise BenchError(f"{name}: is for packed sequences, which lengths_q makes")
    for name in LENGTHS:
        lengths = getattr(case, name)
        if lengths is not None and not (isinstance(lengths, tuple) and len(lengths) == case.batch):
            raise BenchError(f"{name}: expected a number for each of {case.batch} sequences, got {lengths!r}")
    for name, lengths in (("queries", case.lengths_q), ("keys", case.lengths_k)):
        if lengths is not None and max(lengths) > getattr(case, name):
            raise BenchError(
                f"{name}: expected at least the longest sequence's, {max(lengths)}, got {getattr(case, name)}"
            )
    used = case.used or ()
    for number, limit in zip(used, case.lengths_k or (case.keys,) * len(used), strict=False):
        if type(number) is not int or not 0 <= number <= limit:
            raise BenchError(f"used: expected numbers from 0 to {limit}, the keys that a sequence has, got {number!r}")
    if case.page_size is not None and (type(case.page_size) is not int or case.page_size < 1):
        raise BenchError(f"page_size: expected a number from 1 on, got {case.page_size!r}")
    if case.is_varlen and case.mask:
        raise BenchError("mask: packed sequences have none")


def device_type(device: str) -> str:
    """Return `cpu`, `cuda`, ...

    Raises:
        BenchError: PyTorch knows no such device.
    """
    if re.fullmatch(r"cpu|cuda(:\d+)?", device):  # `bench compare` reads a report without PyTorch
        return device.partition(":")[0]
    import torch

    try:
        return torch.device(device).type
    except RuntimeError:
        raise BenchError(f"device: {device!r} is not a device; examples: cpu, cuda, cuda:1") from None
