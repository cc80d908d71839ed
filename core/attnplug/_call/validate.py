"""Arguments checked: every error names the argument, what came, and what is accepted.

This is the cold path. A call whose dtypes, devices and features were seen before is only compared by
shape; whatever that comparison does not recognise comes here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from itertools import combinations
from numbers import Integral, Real
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from attnplug._params import wants_grad
from attnplug._types import CausalVariant, SDPAParams

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FIELDS = tuple(field.name for field in fields(SDPAParams))
_INTEGERS = (Integral, torch.SymInt)
_NUMBERS = (Real, torch.SymInt, torch.SymFloat)  # of numpy too
_BOOLS = (bool, torch.SymBool)


def check_dense(params: SDPAParams) -> None:
    """Raise TypeError or ValueError unless `params` is a call that the contract gives a meaning."""
    check_tensors(params)
    check_scalars(params)
    query, key, value = params.query, params.key, params.value
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2:
            raise ValueError(f"{name}: expected at least 2 dimensions (..., length, head size), got {shape(tensor)}")
    check_head_sizes(query, key)
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"value: its length {index(value.shape[-2])} must be the key's, {index(key.shape[-2])}; "
            f"got key {shape(key)}, value {shape(value)}"
        )
    check_heads(heads_of(query), heads_of(key), heads_of(value), params.enable_gqa)
    leading = broadcast_leading(query, key, value)
    heads = max(heads_of(query), heads_of(key), heads_of(value))
    full = (*leading, heads, query.shape[-2], key.shape[-2])
    if params.attn_mask is not None:
        check_mask(params.attn_mask, query, full)
    batch = math.prod(leading)
    check_extras(params, full[-3], batch, leading)


def check_tensors(params: SDPAParams) -> None:
    """Check that query, key and value are floating tensors of one dtype on one device, and that all are of one kind."""
    query = params.query
    for name in ("query", "key", "value"):
        tensor = getattr(params, name)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            raise ValueError(f"{name}: dtype {tensor.dtype} is not supported; accepted: {_dtypes(FLOATING)}")
        _assert_dense(name, tensor)
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name}: dtype {tensor.dtype} differs from the query's, {query.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: is on {tensor.device}, the query on {query.device}")
    for name in _FIELDS:  # not vars(params), which PyTorch 2.11 cannot trace
        if is_sharded_beside(query, getattr(params, name)):
            raise ValueError(f"{name}: is a DTensor, and the query is not; distribute both, or neither")


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor; to import its module here would cost every program."""
    return type(tensor).__name__ == "DTensor" and type(tensor).__module__.startswith("torch.distributed.tensor")


def is_sharded_beside(query: Tensor, tensor: Any) -> bool:
    """Whether `tensor` is a DTensor and `query` is not."""
    return type(tensor) is not type(query) and is_sharded(tensor) and not is_sharded(query)


def check_scalars(params: SDPAParams) -> None:
    """Check what is neither tensor nor shape."""
    for name in ("is_causal", "enable_gqa", "return_lse"):
        value = getattr(params, name)
        if not isinstance(value, _BOOLS):
            raise TypeError(f"{name}: expected a bool, got {value!r}")
    _number("dropout_p", params.dropout)
    if not 0.0 <= params.dropout <= 1.0:
        raise ValueError(f"dropout_p: expected a probability between 0 and 1, got {params.dropout!r}")
    if params.scale is not None:
        _number("scale", params.scale)
    _number("softcap", params.softcap)
    if params.softcap < 0:
        raise ValueError(f"softcap: expected 0 (off) or more, got {params.softcap!r}")
    if not isinstance(params.causal_variant, CausalVariant):
        raise TypeError(
            f"causal_variant: expected CausalVariant.UPPER_LEFT or LOWER_RIGHT, got {params.causal_variant!r}"
        )
    window = params.window_size
    if not isinstance(window, (tuple, list)) or len(window) != 2 or not all(_is_integer(side) for side in window):
        raise TypeError(f"window_size: expected two integers (left, right), got {window!r}")
    if min(window) < -1:
        raise ValueError(f"window_size: expected sides of -1 (open) or more, got {window!r}")


def check_head_sizes(query: Tensor, key: Tensor) -> None:
    """Check the size that query and key share."""
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"key: its head size {key.shape[-1]} must be the query's, {query.shape[-1]}; "
            f"got query {shape(query)}, key {shape(key)}"
        )
    if query.shape[-1] == 0:
        raise ValueError(f"query: the head size is 0; got {shape(query)}")


def check_heads(heads: int, key_heads: int, value_heads: int, enable_gqa: bool, broadcast: bool = True) -> None:
    """Check that query heads and key/value heads pair up."""
    if key_heads != value_heads and not (broadcast and 1 in (key_heads, value_heads)):
        raise ValueError(f"value: has {value_heads} heads, the key {key_heads}; they must be equal")
    kv_heads = max(key_heads, value_heads) if key_heads and value_heads else 0
    if heads == kv_heads or (broadcast and 1 in (heads, kv_heads)):
        return
    if not enable_gqa:
        raise ValueError(
            f"key: has {kv_heads} heads, the query {heads}; unequal numbers need enable_gqa=True "
            f"(query head h then reads key/value head h // (query heads / key heads))"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query: its {heads} heads are not a multiple of the key/value heads, {kv_heads}")


def broadcast_leading(*tensors: Tensor) -> tuple[int, ...]:
    """Return the broadcast shape of all dimensions before (heads, length, head size)."""
    shapes = [tuple(tensor.shape[:-3]) for tensor in tensors]
    if shapes[0] == shapes[1] == shapes[2]:
        return shapes[0]
    # Asked first, because of the error of `broadcast_shapes` a trace makes one of its own, which nothing catches.
    if not all(_broadcast_together(one, other) for one, other in combinations(shapes, 2)):
        given = ", ".join(
            f"{name} {shape(tensor)}" for name, tensor in zip(("query", "key", "value"), tensors, strict=True)
        )
        raise ValueError(f"query, key, value: the batch dimensions do not broadcast; got {given}")
    return tuple(torch.broadcast_shapes(*shapes))


def _broadcast_together(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(_fits(a, b) or _fits(b, a) for a, b in zip(reversed(one), reversed(other), strict=False))


def check_mask(mask: Any, query: Tensor, full: tuple[int, ...]) -> None:
    """Check a mask against the shape of the logits, `full`."""
    _assert_tensor("attn_mask", mask, "a torch.Tensor or None")
    accepted = dict.fromkeys((torch.bool, query.dtype, torch.float32))
    if mask.dtype not in accepted:
        raise ValueError(f"attn_mask: dtype {mask.dtype} is not supported here; accepted: {_dtypes(accepted)}")
    if mask.device != query.device:
        raise ValueError(f"attn_mask: is on {mask.device}, the query on {query.device}")
    if not broadcasts(mask.shape, full):
        raise ValueError(
            f"attn_mask: shape {shape(mask)} does not broadcast to (..., heads, query length, key length) = "
            f"{sizes(full)}{_unsqueezed(mask, full)}"
        )


def _unsqueezed(mask: Tensor, full: tuple[int, ...]) -> str:
    """Return what makes a mask of the call out of one without heads, or without heads and queries."""
    if len(full) == 4 and tuple(mask.shape) == (full[0], full[3]):
        return "; a mask of the keys of each sequence is mask[:, None, None, :]"
    if len(full) == 4 and tuple(mask.shape) == (full[0], full[2], full[3]):
        return "; a mask for all heads of each sequence is mask[:, None]"
    return ""


def broadcasts(source: Any, target: tuple[int, ...]) -> bool:
    """Whether a tensor of shape `source` can be expanded to `target`."""
    if len(source) > len(target):
        return False
    return all(_fits(have, want) for have, want in zip(reversed(source), reversed(target), strict=False))


def _fits(have: Any, want: Any) -> bool:
    """Whether a size is 1 or `want`; one that depends on data is taken for `want`, and checked later, as in PyTorch."""
    if is_compiling():  # in which Dynamo finds no symbolic size with `in`
        from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

        return guard_or_false(have == 1) or guard_or_true(have == want)
    return have in (1, want)


def check_extras(params: SDPAParams, heads: int, batch: int, leading: tuple[int, ...] | None) -> None:
    """Check sinks, alibi_slopes and seqused_k; `leading` is None for variable-length calls."""
    device = params.query.device
    if params.sinks is not None:
        _floating("sinks", params.sinks, device)
        if tuple(params.sinks.shape) != (heads,):
            raise ValueError(
                f"sinks: expected shape {sizes((heads,))}, one logit per query head, got {shape(params.sinks)}"
            )
    if params.alibi_slopes is not None:
        _floating("alibi_slopes", params.alibi_slopes, device)
        found = tuple(params.alibi_slopes.shape)
        if not (found == (heads,) or found == (batch, heads)):  # Dynamo takes no symbolic size for `in`
            raise ValueError(
                f"alibi_slopes: expected shape {sizes((heads,))} or {sizes((batch, heads))}, "
                f"got {shape(params.alibi_slopes)}"
            )
        if torch.is_grad_enabled() and wants_grad(params.alibi_slopes):
            raise ValueError(
                "alibi_slopes: requires a gradient, which no implementation gives; pass alibi_slopes.detach(), or the "
                "bias that they stand for as attn_mask"
            )
    if params.seqused_k is not None:
        check_int32("seqused_k", params.seqused_k, (batch,), device)
        if leading is not None:
            check_range("seqused_k", params.seqused_k, params.key.shape[-2])


def check_int32(name: str, tensor: Any, wanted: tuple[int | None, ...], device: torch.device) -> None:
    """Check an int32 tensor of shape `wanted`, where None is any size."""
    _assert_tensor(name, tensor)
    if tensor.dtype is not torch.int32:
        raise ValueError(f"{name}: expected dtype torch.int32, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: is on {tensor.device}, the query on {device}")
    if not _has_sizes(tensor, wanted):
        shown = ", ".join("any" if size is None else str(index(size)) for size in wanted)
        raise ValueError(f"{name}: expected shape ({shown}{',' * (len(wanted) == 1)}), got {shape(tensor)}")


def _has_sizes(tensor: Tensor, wanted: tuple[int | None, ...]) -> bool:
    sizes = tensor.shape
    if len(sizes) != len(wanted):
        return False
    for want, have in zip(wanted, sizes, strict=True):  # noqa: SIM110, a generator costs more than all else here
        if want is not None and want != have:
            return False
    return True


def check_range(name: str, tensor: Tensor, most: int) -> None:
    """Check that an integer tensor has values from 0 to `most`, where looking at them costs no synchronisation."""
    if not can_look(tensor) or tensor.numel() == 0:
        return
    low, high = (int(bound) for bound in tensor.aminmax())
    if low < 0 or high > most:
        raise ValueError(f"{name}: expected values from 0 to {most}, got {low} to {high}")


def can_look(tensor: Tensor) -> bool:
    """Whether the values of `tensor` are at hand: on the CPU, and not fake or being traced."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cpu and not is_compiling()


def shape(tensor: Tensor) -> str:
    """Return the shape of `tensor` for a message."""
    return sizes(tensor.shape)


def sizes(given: Iterable[Any]) -> str:
    """Return sizes for a message, as numbers: of symbolic ones Dynamo makes a text that it cannot read itself."""
    return str(tuple([index(size) for size in given]))


def heads_of(tensor: Tensor) -> int:
    """Return the number of heads: one where there is no such dimension."""
    return tensor.shape[-3] if tensor.dim() > 2 else 1


def _floating(name: str, tensor: Any, device: torch.device) -> None:
    _assert_tensor(name, tensor)
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{name}: dtype {tensor.dtype} is not supported; accepted: {_dtypes(FLOATING)}")
    if tensor.device != device:
        raise ValueError(f"{name}: is on {tensor.device}, the query on {device}")


def _assert_tensor(name: str, value: Any, wanted: str = "a torch.Tensor") -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__}")
    _assert_dense(name, value)


def _assert_dense(name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        raise ValueError(f"{name}: expected a dense tensor, got a nested one")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got one of layout {tensor.layout}; call to_dense()")


def _number(name: str, value: Any) -> None:
    is_scalar = isinstance(value, Tensor) and value.dim() == 0 and not (value.is_complex() or value.dtype is torch.bool)
    if isinstance(value, bool) or not (is_scalar or isinstance(value, _NUMBERS)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not -math.inf < value < math.inf:  # a symbolic float of a trace can be compared, and no more
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an integer of 64 bits, or a float, got {value!r}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, _INTEGERS) and not isinstance(value, bool)


def _dtypes(dtypes: Any) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
