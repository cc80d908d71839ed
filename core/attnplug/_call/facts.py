"""The one description of a call that decisions are made from, kept under, and traced with.

Whatever decides between implementations sees `CallFacts` and no more: they are the key under which an eager
decision is kept, the constants of a trace, and what requirements are read off. `example` is their inverse.
"""

from __future__ import annotations

from math import inf, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from attnplug._call.validate import FLOATING, check_extras, is_sharded_beside
from attnplug._params import wants_grad
from attnplug._types import OPEN_WINDOW, WIDEST, CausalVariant, SDPAParams

UPPER_LEFT = CausalVariant.UPPER_LEFT
_is_recording = torch.is_grad_enabled
_STRIDED = torch.strided
_new = tuple.__new__  # half the cost of a named tuple's own
NUMBERS = (float, int)  # exactly: True is not 1 here
Sizes = tuple[int, int, int, int, bool]


class TensorFacts(NamedTuple):
    """What counts of a tensor that not every call has: its dtype, and whether its gradient is wanted."""

    dtype: torch.dtype
    wants_grad: bool


class Extensions(NamedTuple):
    """What a call asks for beyond PyTorch's own arguments."""

    causal_variant: int
    window_size: tuple[int, int]
    softcap: bool
    sinks: TensorFacts | None
    slopes: int  # the number of dimensions of alibi_slopes; 0 if there are none
    seqused: bool
    return_lse: bool
    varlen: bool
    paged: bool
    nested: bool


class Layout(NamedTuple):
    """What counts only where a kernel's `supports` looks at it (`Kernel.shape_dependent`)."""

    shapes: tuple[tuple[int, ...] | None, ...]  # of query, key, value and mask
    strides: tuple[tuple[int, ...] | None, ...]
    longest: tuple[int | None, int | None]  # max_q and max_k

    @classmethod
    def of(cls, params: SDPAParams) -> Layout:
        """Return the layout of a call in the form that kernels know."""
        tensors = (params.query, params.key, params.value, params.attn_mask)
        return cls(
            tuple(None if tensor is None else tuple(tensor.shape) for tensor in tensors),
            tuple(None if tensor is None else tuple(tensor.stride()) for tensor in tensors),
            (params.max_q, params.max_k),
        )


class CallFacts(NamedTuple):
    """All that a decision about one call depends on, besides who decides.

    Lengths are not part of it, so that a decode loop, whose keys grow by one each step, decides once; `layout` is
    there only if a kernel that was asked looks at lengths, batch or strides.
    """

    device: torch.device
    dtype: torch.dtype
    head_size: int
    value_head_size: int
    heads: int
    kv_heads: int
    square: bool  # surely as many queries as keys, or positions do not count: no causal mask, window or ALiBi
    recorded: bool  # by autograd, for query, key or value
    is_causal: bool
    dropout: bool
    mask: TensorFacts | None
    extensions: Extensions | None
    layout: Layout | None = None

    @classmethod
    def of(cls, params: SDPAParams) -> CallFacts | None:
        """Return the facts of a call; None if it is not in the form that kernels know, or has a visible mistake.

        Whatever can be wrong with an argument is compared here, or is part of the facts and so was checked when
        their decision was made. What gets None is prepared first, which has words for mistakes.

        Raises:
            TypeError, ValueError: sinks, alibi_slopes or seqused_k are wrong.
        """
        query, key, value, mask = params.query, params.key, params.value, params.attn_mask
        is_causal, enable_gqa, scale, dropout = params.is_causal, params.enable_gqa, params.scale, params.dropout
        dtype, device = query.dtype, query.device
        if (
            key.dtype is not dtype
            or value.dtype is not dtype
            or is_sharded_beside(query, key)
            or is_sharded_beside(query, value)
            or key.device != device
            or value.device != device
            or not (is_causal is False or is_causal is True)
            or not (enable_gqa is False or enable_gqa is True)
            or not (scale is None or (type(scale) is float and -inf < scale < inf) or _is_of_64_bits(scale))
            or not (type(dropout) in NUMBERS and 0.0 <= dropout <= 1.0)
        ):
            return None
        packed = params.is_varlen
        if packed:
            sizes = packed_sizes(query, key, value, enable_gqa, params.block_table is not None)
        else:
            sizes = dense_sizes(query, key, value, enable_gqa)
        if sizes is None or not (
            query.layout is key.layout is value.layout is _STRIDED
        ):  # sparse and jagged ones have sizes
            return None
        grad = _is_recording()
        facts_of_mask = None
        if mask is not None:
            if not _is_regular_mask(mask, query, key):
                return None
            facts_of_mask = TensorFacts(mask.dtype, grad and wants_grad(mask))
        if is_plain(params):
            extensions = LSE_ALONE if params.return_lse else None
            square = not is_causal or sizes[4]
        else:
            if not _are_regular_extensions(params):
                return None
            extensions = _extensions(params, sizes[2], grad)
            positions = is_causal or params.alibi_slopes is not None or params.window_size != OPEN_WINDOW
            square = not positions or (params.seqused_k is None and sizes[4])
        recorded = grad and wants_grad(query, key, value)
        drops = True if dropout > 0.0 else False  # noqa: SIM210, a trace makes a constant of a branch
        return _new(
            CallFacts,
            (device, dtype, *sizes[:4], square, recorded, is_causal, drops, facts_of_mask, extensions, None),
        )

    @property
    def are_of_known_dtypes(self) -> bool:
        """Whether there are kernels for such dtypes: all else that can be wrong was compared by `of`."""
        mask = self.mask
        return self.dtype in FLOATING and (mask is None or mask.dtype in (torch.bool, self.dtype, torch.float32))


def _is_of_64_bits(number: object) -> bool:
    """Whether this is an int, and no larger than kernels can take."""
    return type(number) is int and -(2**63) <= number < 2**63


def is_plain(params: SDPAParams) -> bool:
    """Whether a call asks for nothing beyond PyTorch's own arguments and an lse."""
    return (
        (params.return_lse is False or params.return_lse is True)
        and (type(params.softcap) in NUMBERS and params.softcap == 0.0)
        and params.sinks is None
        and params.cu_seq_q is None
        and params.seqused_k is None
        and params.alibi_slopes is None
        and is_open(params.window_size)
        and params.causal_variant is UPPER_LEFT
    )


def is_open(window: object) -> bool:
    """Whether this is `OPEN_WINDOW`, with integers: -1.0 is not -1. A trace cannot always say which tuple it is."""
    return type(window) is tuple and window == OPEN_WINDOW and type(window[0]) is int is type(window[1])


def dense_sizes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> Sizes | None:
    """Return `(E, Ev, Hq, Hkv, Sq == Sk)` if the tensors have four fitting dimensions and none is empty. 0.5 us."""
    try:
        batch, heads, queries, size = query.shape
        key_batch, kv_heads, keys, key_size = key.shape
        value_batch, value_heads, values, value_size = value.shape
    except (AttributeError, RuntimeError, ValueError):  # no tensor, a nested one, or another rank
        return None
    if (
        batch == key_batch == value_batch
        and keys == values
        and size == key_size
        and kv_heads == value_heads
        and (heads == kv_heads or (enable_gqa and kv_heads > 0 and heads % kv_heads == 0))
        and batch > 0 < heads
        and queries > 0 < keys
        and size > 0
    ):
        return size, value_size, heads, kv_heads, queries == keys
    return None


def fit_alike(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether tensors of any rank from two on fit each other, with no dimension to broadcast, and none is empty."""
    try:
        *rows, queries, size = query.shape
        *key_rows, keys, key_size = key.shape
        *value_rows, values, _ = value.shape
    except (AttributeError, RuntimeError, ValueError):  # no tensor, a nested one, or one of fewer dimensions
        return False
    fitting = rows == key_rows == value_rows and keys == values and size == key_size
    fitting = fitting and query.layout is key.layout is value.layout is _STRIDED
    return fitting and 0 not in rows and queries > 0 and keys > 0 < size


def packed_sizes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, paged: bool) -> Sizes | None:
    """Return the same of packed sequences, whose keys and values may lie in pages; they are not known to be square."""
    try:
        tokens, heads, size = query.shape
        *rows, kv_heads, key_size = key.shape
        *value_rows, value_heads, value_size = value.shape
    except (AttributeError, RuntimeError, ValueError):
        return None
    if (
        rows == value_rows
        and len(rows) == (2 if paged else 1)
        and 0 not in rows
        and size == key_size
        and kv_heads == value_heads
        and (heads == kv_heads or (enable_gqa and kv_heads > 0 and heads % kv_heads == 0))
        and tokens > 0 < heads
        and size > 0
    ):
        return size, value_size, heads, kv_heads, False
    return None


def _is_regular_mask(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether each of the four dimensions of a mask is 1 or what it is in `(B, Hq, Sq, Sk)`."""
    if not isinstance(mask, Tensor) or mask.device != query.device or mask.dim() != 4:
        return False
    if is_sharded_beside(query, mask):
        return False
    batch, heads, queries, keys = mask.shape
    full = query.shape
    return keys in (1, key.shape[2]) and queries in (1, full[2]) and heads in (1, full[1]) and batch in (1, full[0])


def _are_regular_extensions(params: SDPAParams) -> bool:
    window, softcap, slopes = params.window_size, params.softcap, params.alibi_slopes
    return (
        (params.return_lse is True or params.return_lse is False)
        and ((type(softcap) is float and 0.0 <= softcap < inf) or (_is_of_64_bits(softcap) and softcap >= 0))
        and type(params.causal_variant) is CausalVariant
        and type(window) is tuple
        and len(window) == 2
        and (type(window[0]) is int is type(window[1]) and -1 <= window[0] <= WIDEST and -1 <= window[1] <= WIDEST)
        and (slopes is None or (isinstance(slopes, Tensor) and slopes.dtype is params.lse_dtype))
        and not any(is_sharded_beside(params.query, tensor) for tensor in (params.sinks, slopes, params.seqused_k))
    )


def _extensions(params: SDPAParams, heads: int, grad: bool) -> Extensions | None:
    """Return what a call asks for beyond PyTorch's own arguments; None if that is nothing."""
    sinks, slopes, used, varlen = params.sinks, params.alibi_slopes, params.seqused_k, params.is_varlen
    if not (sinks is None and slopes is None and used is None):
        batch = params.cu_seq_q.shape[0] - 1 if varlen else params.query.shape[0]
        check_extras(params, heads, batch, None if varlen else (batch,))
    extensions = Extensions(
        int(params.causal_variant),
        params.window_size,
        True if params.softcap > 0 else False,  # noqa: SIM210, a trace makes a constant of a branch
        None if sinks is None else TensorFacts(sinks.dtype, grad and wants_grad(sinks)),
        0 if slopes is None else slopes.dim(),
        used is not None,
        params.return_lse,
        varlen,
        params.block_table is not None,
        False,
    )
    return None if extensions == NO_EXTENSIONS else extensions


NO_EXTENSIONS = Extensions(int(UPPER_LEFT), OPEN_WINDOW, False, None, 0, False, False, False, False, False)
LSE_ALONE = NO_EXTENSIONS._replace(return_lse=True)


def nested_facts(params: SDPAParams) -> CallFacts:
    """Return the facts of a call of nested tensors, of which only their device, dtype and gradient count."""
    query = params.query
    return CallFacts(
        query.device,
        query.dtype,
        0,
        0,
        0,
        0,
        square=False,
        recorded=params.needs_grad,
        is_causal=params.is_causal,
        dropout=params.dropout > 0,
        mask=None,
        extensions=NO_EXTENSIONS._replace(nested=True),
    )


def example(call: CallFacts) -> SDPAParams:
    """Return a call with these facts: the inverse of `CallFacts.of`, under the caller's modes.

    Lengths, batch and strides are those of the layout; without one they are arbitrary, but for `square`. Tensors
    that want a gradient require one, so the facts come back where gradients are enabled.
    """
    more = call.extensions or NO_EXTENSIONS
    batch, queries, keys = 2, 16, 16 if call.square else 24
    layout = call.layout or _some_layout(call, more, batch, queries, keys)
    if not more.varlen:
        assert layout.shapes[0] is not None
        batch = layout.shapes[0][0]

    def make(position: int, dtype: torch.dtype, wants_grad: bool) -> Tensor:
        shape, stride = layout.shapes[position], layout.strides[position]
        assert shape is not None
        assert stride is not None
        return torch.empty_strided(shape, stride, dtype=dtype, device=call.device, requires_grad=wants_grad)

    numbers = torch.float64 if call.dtype is torch.float64 else torch.float32

    def other(*shape: int, dtype: torch.dtype = torch.int32, wants_grad: bool = False) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=call.device, requires_grad=wants_grad)

    with torch.enable_grad():
        query, key, value = (make(position, call.dtype, call.recorded) for position in range(3))
        return SDPAParams(
            query,
            key,
            value,
            None if call.mask is None else make(3, *call.mask),
            0.5 if call.dropout else 0.0,
            call.is_causal,
            call.heads != call.kv_heads,
            scale=1.0 / sqrt(call.head_size),
            causal_variant=CausalVariant(more.causal_variant),
            window_size=more.window_size,
            softcap=30.0 if more.softcap else 0.0,
            sinks=None if more.sinks is None else other(call.heads, dtype=more.sinks[0], wants_grad=more.sinks[1]),
            alibi_slopes=other(*(batch, call.heads)[-more.slopes :], dtype=numbers) if more.slopes else None,
            seqused_k=other(batch) if more.seqused else None,
            return_lse=more.return_lse,
            cu_seq_q=other(batch + 1) if more.varlen else None,
            cu_seq_k=other(batch + 1) if more.varlen else None,
            max_q=layout.longest[0],
            max_k=layout.longest[1],
            block_table=other(batch, 4) if more.paged else None,
        )


def _some_layout(call: CallFacts, more: Extensions, batch: int, queries: int, keys: int) -> Layout:
    """Return a contiguous layout with these lengths, whose mask is the same for each sequence and head."""
    if more.varlen:
        rows = (keys, 16) if more.paged else (batch * keys,)
        shapes: list[tuple[int, ...] | None] = [
            (batch * queries, call.heads, call.head_size),
            *((*rows, call.kv_heads, size) for size in (call.head_size, call.value_head_size)),
            None,
        ]
    else:
        shapes = [
            (batch, call.heads, queries, call.head_size),
            *((batch, call.kv_heads, keys, size) for size in (call.head_size, call.value_head_size)),
            None if call.mask is None else (1, 1, queries, keys),
        ]
    strides = (None if shape is None else torch._prims_common.make_contiguous_strides_for(shape) for shape in shapes)
    return Layout(tuple(shapes), tuple(strides), (queries, keys) if more.varlen else (None, None))
