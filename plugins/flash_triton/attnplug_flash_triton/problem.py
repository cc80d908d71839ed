"""From the record of a call to the arguments that all kernels begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnplug import CausalVariant, SDPAParams
from attnplug_flash_triton import config, toolchain
from attnplug_flash_triton.decode import MOST_PARTS
from attnplug_flash_triton.plans import contiguous_strides
from attnplug_flash_triton.tiles import ADDITIVE, BOOLEAN, LOG2E, NO_MASK

LONGEST = 2**28
"""Positions, and windows around them, are counted in 32 bits."""
FURTHEST = 2**23
CACHED_BYTES = 24 * 2**20
"""Keys and values that programs at work share should fit the L2 cache; about half of it on an H200."""


POINTERS = ("attn_mask", "alibi_slopes", "seqused_k", "cu_seq_q", "cu_seq_k", "block_table")
"""Tensors besides query, key and value that kernels get in the same places."""


class Machine(NamedTuple):
    """What of a machine decides how a call is launched.

    Attributes:
        architecture: one of `config.ARCHITECTURES`, or the interpreter.
        processors: the number of multiprocessors.
    """

    architecture: str
    processors: int


@cache
def machine_of(device: torch.device) -> Machine:
    """Return what computes tensors on `device`, ready to; in the interpreter, with enough processors to split keys."""
    if device.type != "cuda":
        return Machine(config.INTERPRETER, 8)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if torch.version.hip is not None:
        return Machine("gfx942", processors)
    major, _ = torch.cuda.get_device_capability(device)
    if major == 9:
        toolchain.use_good_ptxas()
    return Machine({9: "sm_90", 10: "sm_100"}.get(major, "sm_80"), processors)


@dataclass(frozen=True)
class Problem:
    """One call, in the kernels' words.

    Attributes:
        leading: the arguments before `tiles`, in the order of every kernel's signature, tensors by name.
        strides: those of batch, head and row of each of `others`.
        flags: the compile-time arguments that every kernel has.
        batch, heads, group: numbers of sequences, of query heads, and of query heads for each head of keys.
        longest_q, longest_k: the longest sequences.
        rows: the shape of lse, `(B, Hq, Sq)` or `(Hq, Tq)`.
        factor: the scale; what kernels get may have log2(e) in it.
    """

    params: SDPAParams
    machine: Machine
    leading: tuple[Any, ...]
    strides: tuple[tuple[int, ...], ...]
    flags: dict[str, Any]
    batch: int
    heads: int
    group: int
    longest_q: int
    longest_k: int
    rows: tuple[int, ...]
    factor: float

    @property
    def packed(self) -> bool:
        return self.params.is_varlen

    @property
    def additive(self) -> bool:
        return self.flags["MASK"] == ADDITIVE.value

    def tiles(self, kernel: str) -> config.Tiles:
        """Return the configured tiles of one kernel."""
        flags = self.flags
        extra = flags["MASK"] != NO_MASK.value or flags["SOFTCAP"] or flags["ALIBI"] or flags["DROPOUT"]
        size = max(flags["BLOCK_D"], flags["BLOCK_DV"])
        single = config.TF32 if flags["PRECISION"] == "tf32" else config.SINGLE
        precision = single if self.params.query.dtype == torch.float32 else config.HALF
        return config.table_of(self.machine.architecture).choose(kernel, precision, size, bool(extra))

    @property
    def bytes_of_key(self) -> int:
        """How many bytes a key and its value have, in one head."""
        return (self.flags["SIZE"] + self.flags["SIZE_V"]) * self.params.key.element_size()

    def splits(self, programs: int, block_n: int) -> int:
        """Return into how many parts the keys are split; see the function of this name."""
        return splits(self.machine.processors, programs, self.longest_k, block_n)

    def section(self, columns_of_keys: int) -> int:
        """Return how many columns, which read as many heads of keys, run together."""
        return sections(self.longest_k * self.bytes_of_key, columns_of_keys)


def splits(processors: int, programs: int, longest_k: int, block_n: int) -> int:
    """Return into how many parts keys are split, so that few programs make one for each multiprocessor.

    On an H100 that is faster than two, by up to a tenth: parts cost time to add up.
    """
    return max(1, min(processors // max(programs, 1), longest_k // block_n, MOST_PARTS))


def sections(bytes_of_keys: int, columns_of_keys: int) -> int:
    """Return how many columns, each of which reads a head of keys and values of this size, run together."""
    return max(1, min(columns_of_keys, CACHED_BYTES // max(bytes_of_keys, 1)))


def keeps_statistics(params: SDPAParams) -> bool:
    """Whether backward gets the maximum and the sum of each row, since lse has too few digits for both."""
    mask = params.attn_mask
    return params.query.dtype == torch.float32 or (mask is not None and mask.is_floating_point())


def read(params: SDPAParams, machine: Machine, *others: Form) -> Problem:
    """Return the problem that `params` states; `others` are what kernels read or write rows of besides.

    Of tensors it looks at nothing but shapes, strides and dtypes: what it returns holds for every call that has the
    same. Leading arguments that are tensors are their names, as in `plans`.
    """
    packed, paged = params.is_varlen, params.block_table is not None
    query, key, value = (Form.dense(tensor, row_dim(params)) for tensor in (params.query, params.key, params.value))
    batch = params.cu_seq_q.shape[0] - 1 if packed else query.shape[0]
    heads = query.shape[1]
    kv_heads = key.shape[2] if paged else key.shape[1]
    num_q, num_k = query.shape[0 if packed else 2], params.max_k if packed else key.shape[2]
    longest_q, longest_k = (params.max_q, params.max_k) if packed else (num_q, num_k)
    assert params.scale is not None
    longest_q, longest_k, num_k = int(longest_q or 0), int(longest_k or 0), int(num_k or 0)
    if max(longest_q, longest_k) >= LONGEST:
        raise ValueError(f"query, key: flash_triton counts up to {LONGEST} positions, got {max(longest_q, longest_k)}")
    low, high = params.window_size
    if params.is_causal:
        high = 0
    slopes, factor = params.alibi_slopes, float(params.scale)
    flags = _flags(params)
    strides = (*_strides(query, packed, False), *strides_of_keys(key, value, packed, paged))
    steps_of_others = [_strides(form, packed, False) for form in others]
    aligned = 16 // params.query.element_size()
    align = aligned if all(step % aligned == 0 for step in (*strides, *chain(*steps_of_others))) else 1
    leading = (
        *("query", "key", "value"),
        *(name if getattr(params, name) is not None else None for name in POINTERS),
        "seed" if params.dropout > 0 else None,
        *(step // align for step in strides),
        *_mask_strides(params.attn_mask),
        slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        params.block_table.stride(0) if paged else 0,
        *(heads, heads // kv_heads, num_q, num_k),
        factor * LOG2E.value if flags["FOLDED"] else factor,
        float(params.softcap),
        float(params.dropout),
        *(min(max(side, 0), 2 * LONGEST) for side in (low, high)),
    )
    flags["ALIGN"] = align
    rows = (heads, num_q) if packed else (batch, heads, num_q)
    scaled = tuple(tuple(step // align for step in steps) for steps in steps_of_others)
    group = heads // kv_heads
    return Problem(params, machine, leading, scaled, flags, batch, heads, group, longest_q, longest_k, rows, factor)


def _flags(params: SDPAParams) -> dict[str, Any]:
    """Return the compile-time arguments that every kernel has, but for the alignment of strides."""
    mask, size, size_v = params.attn_mask, params.query.shape[-1], params.value.shape[-1]
    additive = mask is not None and mask.is_floating_point()
    single = params.query.dtype == torch.float32
    plain = not (single or params.softcap or params.alibi_slopes is not None or additive)
    low, high = params.window_size
    return dict(
        LOWER_RIGHT=params.causal_variant == CausalVariant.LOWER_RIGHT,
        HAS_LOW=low >= 0,
        HAS_HIGH=high >= 0 or params.is_causal,
        MASK=(NO_MASK if mask is None else ADDITIVE if additive else BOOLEAN).value,
        MASK_ROWS=mask is not None and mask.shape[2] > 1,
        MASK_UNIT=_mask_strides(mask)[3] == 1,
        SOFTCAP=params.softcap > 0,
        ALIBI=params.alibi_slopes is not None,
        DROPOUT=params.dropout > 0,
        FOLDED=plain and params.scale != 0,  # -inf * 0 is NaN
        SIZE=size,
        SIZE_V=size_v,
        BLOCK_D=block_of(size),
        BLOCK_DV=block_of(size_v),
        PRECISION="tf32" if single and tf32_allowed() else "ieee",
    )


def row_dim(params: SDPAParams) -> int:
    """Return the dimension along which rows follow each other."""
    return -3 if params.is_varlen else -2


def is_dense(shape: Sequence[int], stride: Sequence[int], rows: int) -> bool:
    """Whether kernels read a tensor as it is: its rows are contiguous, and as near as 32 bits count in a tile."""
    return (stride[-1] == 1 or shape[-1] == 1) and stride[rows] < FURTHEST


class Form(NamedTuple):
    """The shape and the strides in which a tensor is given to the kernels."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def dense(cls, tensor: Tensor, rows: int) -> Form:
        """Return the form of `tensor`, copied if it is not dense."""
        shape, stride = tuple(tensor.shape), tensor.stride()
        return cls(shape, stride if is_dense(shape, stride, rows) else contiguous_strides(shape))


def strides_of_keys(key: Form, value: Form, packed: bool, paged: bool) -> tuple[int, ...]:
    """Return the strides of batch, head and row of keys, then those of values, as kernels count them."""
    return (*_strides(key, packed, paged), *_strides(value, packed, paged))


def _strides(form: Form, packed: bool, paged: bool) -> tuple[int, int, int]:
    steps = [step if size > 1 else 0 for step, size in zip(form.stride, form.shape, strict=True)]
    if paged and len(steps) == 4:
        return steps[0], steps[2], steps[1]
    return (0, steps[1], steps[0]) if packed else (steps[0], steps[1], steps[2])


def _mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    """Return strides that are 0 where the mask is broadcast."""
    if mask is None:
        return (0, 0, 0, 0)
    return tuple(step if size > 1 else 0 for step, size in zip(mask.stride(), mask.shape, strict=True))


def cdiv(number: int, by: int) -> int:
    """Return a quotient, rounded up; Triton's own function takes microseconds on the host."""
    return -(-number // by)


def block_of(size: int) -> int:
    """Return the power of two, at least 16, in which columns are counted."""
    return 1 << max(4, (size - 1).bit_length())


def tf32_allowed() -> bool:
    """Whether float32 products may be TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"  # what all ways to say so end in
