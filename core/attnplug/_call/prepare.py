"""Any call that PyTorch accepts, brought into the one form that kernels are written for.

Ranks other than four, broadcast dimensions, PyTorch's own enums and `CausalBias` masks, and autocast all
end here, so that no kernel has to know of them. Everything is a view where strides allow.
"""

from __future__ import annotations

import math
from dataclasses import replace
from operator import index  # under a trace it makes a symbolic size a constant, with a guard
from typing import Any

import torch
from torch import Tensor

from attnplug._call.autocast import autocasted
from attnplug._call.validate import broadcast_leading, check_dense, check_scalars, heads_of, sizes
from attnplug._call.validate_varlen import check_varlen
from attnplug._types import OPEN_WINDOW, WIDEST, CausalVariant, SDPAParams

Shape = tuple[int, ...]


def own_terms(params: SDPAParams) -> SDPAParams:
    """Return `params` with PyTorch's enum and `CausalBias` replaced by attnplug's terms, and without idle ones."""
    return _without_idle_groups(_without_idle_dimensions(_causal_bias(_own_enums(params))))


def prepare_dense(params: SDPAParams) -> tuple[SDPAParams, Shape]:
    """Check a dense call; return it in four dimensions, and the shape of its `lse` as the caller sees it.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    params = own_terms(params)
    nested = [getattr(tensor, "is_nested", False) for tensor in (params.query, params.key, params.value)]
    if any(nested):
        if not all(nested):
            raise ValueError("query, key, value: expected all three nested or none; dense ones can be made nested")
        check_scalars(params)
        return params, ()
    params = autocasted(params)
    check_dense(params)
    rank = max(tensor.dim() for tensor in (params.query, params.key, params.value))
    query, key, value = (_with_heads(tensor) for tensor in (params.query, params.key, params.value))
    leading = broadcast_leading(query, key, value)
    heads, kv_heads = _paired_heads(query.shape[-3], key.shape[-3], value.shape[-3], params.enable_gqa)
    query = _flatten(query, leading, heads)
    params = replace(
        params,
        query=query,
        key=_flatten(key, leading, kv_heads),
        value=_flatten(value, leading, kv_heads),
        attn_mask=_four_dimensions(params.attn_mask, leading),
        **plain_scalars(params),
    )
    full = (*leading, heads, query.shape[-2])
    return params, full[len(full) - rank + 1 :]


def prepare_varlen(params: SDPAParams) -> SDPAParams:
    """Check a variable-length call and return it with every default made explicit.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    params = autocasted(_own_enums(params))
    check_varlen(params)
    return replace(params, **plain_scalars(params))


def is_empty(params: SDPAParams) -> bool:
    """Whether any of the numbers of sequences, heads, queries or keys is zero."""
    if params.is_varlen:
        keys = 0 in params.key.shape[:-1]
        return params.cu_seq_q.shape[0] == 1 or 0 in params.query.shape[:2] or keys
    return 0 in params.query.shape[:-1] or params.key.shape[-2] == 0


def empty(params: SDPAParams) -> tuple[Tensor, Tensor | None]:
    """Return what the formulas give where there are no keys, or no queries.

    A product over no keys is zero and its gradient too; it keeps the inputs in the graph, and needs no
    kernel of attention.
    """
    query, key, value = params.query, params.key, params.value
    if params.is_varlen:
        query, heads = query.transpose(0, 1), query.shape[1]
        no_keys = key.reshape(-1, *key.shape[-2:])[:0], value.reshape(-1, *value.shape[-2:])[:0]
        key, value = (tensor.transpose(0, 1) for tensor in no_keys)
    else:
        heads = query.shape[1]
        key, value = key[..., :0, :], value[..., :0, :]
    kv_heads = key.shape[-3]
    if kv_heads != heads:
        key, value = (tensor.repeat_interleave(heads // kv_heads, -3) for tensor in (key, value))
    out = query @ key.transpose(-1, -2) @ value
    for tensor in (params.attn_mask, params.sinks):
        if tensor is not None and tensor.requires_grad:
            out = out + tensor[..., :0].sum()
    if params.is_varlen:
        out = out.transpose(0, 1)
    if not params.return_lse:
        return out, None
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_full(query.shape[:-1], -math.inf if params.sinks is None else 0.0, dtype=dtype)
    if params.sinks is not None:
        lse = lse + params.sinks.to(dtype)[:, None]
        if params.is_varlen:  # tokens behind the last sequence have no sink
            tokens = torch.arange(lse.shape[-1], device=lse.device)
            lse = lse.where(tokens < params.cu_seq_q[-1], -math.inf)
    return out, lse


def is_causal_bias(mask: Any) -> bool:
    """Whether `mask` is PyTorch's way to write a causal mask of some alignment."""
    return _is_from_torch(mask, "CausalBias")


def _is_from_torch(value: Any, name: str) -> bool:
    """Whether `value` is of this class of `torch.nn.attention.bias`; to import it would import Dynamo."""
    return type(value).__name__ == name and type(value).__module__ == "torch.nn.attention.bias"


def _own_enums(params: SDPAParams) -> SDPAParams:
    variant = params.causal_variant
    if _is_from_torch(variant, "CausalVariant"):
        return replace(params, causal_variant=CausalVariant(int(variant)))
    return params


def _causal_bias(params: SDPAParams) -> SDPAParams:
    mask: Any = params.attn_mask
    if not is_causal_bias(mask):
        return params
    if params.is_causal:
        raise ValueError(
            "attn_mask: CausalBias should not be used with causal=True, which says the same; pass one of them"
        )
    lengths = (params.query.shape[-2], params.key.shape[-2])
    if (mask.seq_len_q, mask.seq_len_kv) != lengths:
        raise ValueError(
            f"attn_mask: CausalBias for lengths {sizes((mask.seq_len_q, mask.seq_len_kv))}, "
            f"the call has {sizes(lengths)}"
        )
    variant = CausalVariant(int(mask.variant))
    return replace(params, attn_mask=None, is_causal=True, causal_variant=variant)


def _without_idle_groups(params: SDPAParams) -> SDPAParams:
    """Return `params` without `enable_gqa` where no heads are grouped: PyTorch refuses it for fewer dimensions."""
    tensors = (params.query, params.key, params.value)
    if params.enable_gqa is not True or any(not isinstance(tensor, Tensor) or tensor.is_nested for tensor in tensors):
        return params
    heads, *kv_heads = map(heads_of, tensors)
    return params if heads > max(kv_heads) else replace(params, enable_gqa=False)


def _without_idle_dimensions(params: SDPAParams) -> SDPAParams:
    """Return `params` with no more dimensions of the mask than there are: PyTorch takes more of size 1 from 2.14 on."""
    mask, tensors = params.attn_mask, (params.query, params.key, params.value)
    if any(not isinstance(tensor, Tensor) or tensor.is_nested for tensor in (mask, *tensors)):
        return params
    more = mask.dim() - max(tensor.dim() for tensor in tensors)
    if more <= 0 or any(size != 1 for size in mask.shape[:more]):
        return params
    return replace(params, attn_mask=mask.reshape(mask.shape[more:]))


def _with_heads(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() > 2 else tensor.unsqueeze(0)


def _paired_heads(heads: int, key_heads: int, value_heads: int, enable_gqa: bool) -> tuple[int, int]:
    """Return the numbers of query and of key/value heads, once sizes of 1 are broadcast as PyTorch does."""
    kv_heads = 0 if 0 in (key_heads, value_heads) else max(key_heads, value_heads)
    if enable_gqa and kv_heads:  # and so fewer than `heads`: `_without_idle_groups`
        return heads, kv_heads
    both = 0 if 0 in (heads, kv_heads) else max(heads, kv_heads)
    return both, both


def _flatten(tensor: Tensor, leading: Shape, heads: int) -> Tensor:
    """Expand the leading dimensions and make them one."""
    if tensor.shape[:-2] == (*leading, heads) and len(leading) == 1:
        return tensor
    tensor = tensor.expand(*leading, heads, *tensor.shape[-2:])
    return tensor.reshape(math.prod(leading), *tensor.shape[-3:])


def _four_dimensions(mask: Tensor | None, leading: Shape) -> Tensor | None:
    """Return the mask as a view of four dimensions, each 1 or full; the batch is copied only if it must be."""
    if mask is None or (mask.dim() == 4 and len(leading) == 1):
        return mask
    missing = max(len(leading), 1) + 3 - mask.dim()
    mask = mask.reshape((1,) * missing + tuple(mask.shape))
    if len(leading) > 1:
        batch = (1,) * len(leading) if set(mask.shape[:-3]) == {1} else leading
        mask = mask.expand(*batch, *mask.shape[-3:]).reshape(math.prod(batch), *mask.shape[-3:])
    return mask


def plain_scalars(params: SDPAParams) -> dict[str, Any]:
    """Return the arguments that are not tensors as plain numbers, with every default made explicit."""
    window, slopes = params.window_size, params.alibi_slopes
    return {
        "dropout": _plain_number(params.dropout),
        "scale": default_scale(params.query) if params.scale is None else _plain_number(params.scale),
        "softcap": _plain_number(params.softcap),
        "window_size": OPEN_WINDOW if max(window) < 0 else (_side(window[0]), _side(window[1])),
        "alibi_slopes": slopes if slopes is None else slopes.to(params.lse_dtype),
    }


def _side(side: Any) -> int:
    """Return a side of a window, no wider than kernels can count: no sequence is so long."""
    return min(index(side), WIDEST)


def without_numpy(scale: Any, tracing: bool) -> Any:
    """Return a float of numpy's, as of `1 / np.sqrt(size)`, as Python's; to Dynamo it is an array of no dimensions."""
    in_trace = tracing and not isinstance(scale, Tensor) and getattr(scale, "ndim", None) == 0
    return float(scale) if in_trace or isinstance(scale, float) else scale


def _plain_number(value: Any) -> Any:
    return value if isinstance(value, (int, torch.SymInt, torch.SymFloat)) or type(value) is float else float(value)


def default_scale(query: Tensor) -> float:
    """Return `1 / sqrt(E)`, rounded as PyTorch rounds it."""
    return 1.0 / math.sqrt(index(query.shape[-1]))
