"""Dense calls of the CUTLASS kernel: what is given to it, and what becomes of what it gives.

Layouts: the core hands over `(B, H, S, E)`; the kernel takes and returns `(B, S, H, E)`, `lse` as
`(B, H, S rounded up to 32)` in natural units, 0 in rows whose logits are all minus infinity and plus
infinity in the padding, and a full `(B, H, Sq, Sk)` gradient of the bias whose skipped blocks are not
written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnplug import SDPAParams
from attnplug_efficient_cuda import geometry, layout, operators
from attnplug_efficient_cuda.geometry import Span
from attnplug_efficient_cuda.kept import Kept

GRID = 65535
LSE_ROWS = 32
MINUS_INFINITY = float("-inf")
Region = tuple[slice, slice]


class Direct(NamedTuple):
    """What the kernel is told of a call that it takes as it is.

    Attributes:
        mask_type, window: its mask.
        padded: its lse has more rows than there are queries.
    """

    mask_type: int
    window: int | None
    padded: bool


def _look(params: SDPAParams) -> Direct | None:
    query, key, value = params.query, params.key, params.value
    if not _has_kernels_lse(params) or not all(layout.is_aligned(tensor) for tensor in (query, key, value)):
        return None
    if any(key.shape[2] * tensor.stride(2) >= layout.INT32 for tensor in (key, value)):
        return None
    part = geometry.span(params, query.shape[2], key.shape[2])
    return Direct(part.mask_type, part.window, query.shape[2] % LSE_ROWS != 0)


def _has_kernels_lse(params: SDPAParams) -> bool:
    """Whether lse is part of what the kernel wrote, rather than a tensor made of it."""
    query, key = params.query, params.key
    if params.attn_mask is not None or query.shape[1] != key.shape[1] or not geometry.causal_or_open(params):
        return False
    if params.dropout > 0 and geometry.shifted_window(params):
        return False
    part = geometry.span(params, query.shape[2], key.shape[2])
    whole = (part.queries, part.keys) == ((0, query.shape[2]), (0, key.shape[2]))
    return whole and len(list(regions(params))) == 1


direct = Kept(_look)


def forward(params: SDPAParams) -> tuple[Tensor, ...]:
    """Return `out (B, Hq, Sq, Ev)`, `lse (B, Hq, Sq)` and, with dropout, a seed and an offset for each launch."""
    if (told := direct.of(params)) is not None:
        return _forward_directly(params.query, params.key, params.value, told, params.dropout, params.scale)
    parts = list(regions(params))
    if len(parts) == 1:
        return _forward(params)
    out, lse, *_ = empty_result(params)
    saved: list[Tensor] = []
    for part in parts:
        rows = _query_region(params, part)
        out[rows], lse[rows], *seeds = _forward(_cut_region(params, part))
        saved += seeds
    return out, lse, *saved


def backward(params: SDPAParams, grad_out: Tensor, out: Tensor, lse: Tensor, *saved: Tensor) -> tuple[Any, ...]:
    """Return the gradients of query, key, value and, if it wants one, of the mask, `(B, Hq, Sq, Sk)`."""
    if (told := direct.of(params)) is not None:
        return _backward_directly(params, told, grad_out, out, lse, *saved)
    parts = list(regions(params))
    if len(parts) == 1:
        return _backward(params, grad_out, out, lse, *saved)
    grads = [torch.empty_like(tensor) for tensor in (params.query, params.key, params.value)]
    wants_mask = params.attn_mask is not None and params.attn_mask.requires_grad
    full = (*params.query.shape[:3], params.key.shape[2])
    grad_mask = params.query.new_empty(full) if wants_mask else None
    for number, part in enumerate(parts):
        rows = _query_region(params, part)
        seeds = saved[2 * number : 2 * number + 2]
        found = _backward(_cut_region(params, part), grad_out[rows], out[rows], lse[rows], *seeds)
        for whole, piece, region in zip(grads, found, (rows, part, part), strict=False):
            whole[region] = piece
        if grad_mask is not None:
            grad_mask[rows] = found[3]
    return *grads, grad_mask


def _forward_directly(
    query: Tensor, key: Tensor, value: Tensor, told: Direct, dropout: float, scale: float | None
) -> tuple[Tensor, ...]:
    found = operators.efficient_forward(
        *(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)),
        *(None, None, None, None, None),
        dropout,
        told.mask_type,
        True,
        scale=scale,
        window_size=told.window,
    )
    out, lse = found[0].transpose(1, 2), found[1]
    lse = lse.narrow(2, 0, query.shape[2]) if told.padded else lse
    return (out, lse, *found[2:4]) if dropout > 0 else (out, lse)


def prepare(params: SDPAParams) -> Callable[[Tensor, Tensor, Tensor], tuple[Any, ...] | None] | None:
    """Return what runs a call whose tensors are like these, if the kernel takes them as they are."""
    told = direct.of(params)
    if told is None or params.dropout > 0 or params.scale is None or params.scale <= 0:
        return None
    scale, queries, returns_lse = params.scale, params.query.shape[2], params.return_lse
    # Without an lse, a query that is alone in its block of 32 or 64, and whose heads share their keys, takes a path
    # that is wrong (pytorch#192138).
    wants_lse, attend = returns_lse or params.needs_grad or queries % 32 == 1, None
    if _is_simple(told):
        attend = operators.repeated("_scaled_dot_product_efficient_attention", params, wants_lse)

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, ...] | None:
        if (query.data_ptr() | key.data_ptr() | value.data_ptr()) % layout.READ_BYTES:
            return None
        if attend is None:
            return _forward_directly(query, key, value, told, 0.0, scale)
        found = attend(query, key, value)
        out, lse = found[0], found[1]
        if not returns_lse:
            return out, None, lse  # with the kernel's padding, for backward
        return out, lse.narrow(2, 0, queries) if told.padded else lse

    return run


def _is_simple(told: Direct) -> bool:
    """Whether the operators around the kernel's, which know no window and no lower right mask, take a call."""
    return told.window is None and told.mask_type != geometry.LOWER_RIGHT


def prepare_backward(
    params: SDPAParams, grad_out: Tensor, out: Tensor, lse: Tensor | None, *saved: Tensor
) -> Callable[..., tuple[Any, ...] | None] | None:
    """Return what runs backward of a call whose tensors are like these, if its lse was saved as the kernel reads it."""
    told, attend = direct.of(params), operators.overload("_scaled_dot_product_efficient_attention_backward")
    if told is None or attend is None or lse is not None or not out.transpose(1, 2).is_contiguous():
        return None
    laid_out, seeds, scale = layout.laid_out(grad_out, (0, 2, 1, 3)), _no_seeds(), params.scale
    options = 0.0, (True, True, True, False), told.mask_type != geometry.NO_MASK

    def run(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, out: Tensor, lse: None, kept: Tensor) -> Any:
        grad_out = laid_out(grad_out)
        addresses = query.data_ptr() | key.data_ptr() | value.data_ptr() | grad_out.data_ptr() | out.data_ptr()
        if addresses % layout.READ_BYTES or torch.are_deterministic_algorithms_enabled():
            return None
        return attend(grad_out, query, key, value, None, out, kept, *seeds, *options, scale=scale)[:3]

    return run


def _backward_directly(
    params: SDPAParams, told: Direct, grad_out: Tensor, out: Tensor, lse: Tensor, *seeds: Tensor
) -> tuple[Any, ...]:
    tensors = (params.query, params.key, params.value)
    grads = operators.efficient_backward(
        layout.packed(grad_out.transpose(1, 2)),
        *(tensor.transpose(1, 2) for tensor in tensors),
        None,
        layout.packed(out.transpose(1, 2)),
        *(None, None),
        *(params.query.shape[2], params.key.shape[2]),
        kernel_lse(lse, False),
        params.dropout,
        *_readable(seeds),
        told.mask_type,
        False,
        scale=params.scale,
        num_splits_key=1 if torch.are_deterministic_algorithms_enabled() else None,
        window_size=told.window,
    )
    return *(grad.transpose(1, 2) for grad in grads[:3]), None


def _readable(seeds: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the seeds of dropout where backward reads them: on the GPU while a CUDA graph is captured, else not.

    Forward wrote them in the same way, but need not have run in the same: `reduce-overhead` may replay a forward
    whose backward it has not captured yet.

    Raises:
        RuntimeError: a graph is being captured, and forward ran outside of one, so that its seeds are no addresses.
    """
    if not seeds:
        return _no_seeds()
    on_gpu = seeds[0].is_cuda
    if on_gpu == (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return seeds
    if on_gpu:
        return tuple(seed.cpu() for seed in seeds)
    raise RuntimeError(
        "efficient_cuda: this CUDA graph captures the backward of a call with dropout whose forward ran before the "
        "capture; capture both, or neither"
    )


def _no_seeds() -> tuple[Tensor, Tensor]:
    """Return seeds for a backward without dropout; not kept, because those of a fake call are fake."""
    return (torch.zeros((), dtype=torch.long, device="cpu"),) * 2


def regions(params: SDPAParams) -> Iterator[Region]:
    """Yield slices of batch and key/value heads, each of which one launch can take.

    A grid holds 65535 batches and as many heads. With dropout, forward numbers its draws modulo 2^32
    and backward does not, so their masks differ in a launch of more probabilities than 2^31.
    """
    query, key = params.query, params.key
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    group = heads // kv_heads
    heads_at_once, batch_at_once = max(1, min(kv_heads, GRID // group)), GRID
    if params.dropout > 0:
        room = (layout.INT32 - 1) // (queries * keys * group)
        if room == 0:
            raise ValueError(
                f"efficient_cuda: dropout over {queries} x {keys} probabilities and {group} query heads to a key head "
                f"is beyond the 2^31 draws that the kernel can number; use another implementation for this call"
            )
        heads_at_once = min(heads_at_once, room)
        batch_at_once = max(1, room // heads_at_once) if heads_at_once == kv_heads else 1
    if group > 1:
        batch_at_once = min(batch_at_once, max(1, GRID // heads_at_once))
    batch_at_once = min(batch_at_once, GRID)
    for first in range(0, batch, batch_at_once):
        for head in range(0, kv_heads, heads_at_once):
            yield slice(first, first + batch_at_once), slice(head, head + heads_at_once)


def _query_region(params: SDPAParams, part: Region) -> Region:
    group = params.query.shape[1] // params.key.shape[1]
    return part[0], slice(part[1].start * group, part[1].stop * group)


def _cut_region(params: SDPAParams, part: Region) -> SDPAParams:
    rows, mask = _query_region(params, part), params.attn_mask
    if mask is not None:
        cut = mask[tuple(taken if size > 1 else slice(None) for taken, size in zip(rows, mask.shape, strict=False))]
        mask = cut.detach().requires_grad_(mask.requires_grad) if mask.requires_grad else cut
    return replace(params, query=params.query[rows], key=params.key[part], value=params.value[part], attn_mask=mask)


@dataclass(frozen=True)
class _Call:
    """One launch: the kernel's view of the part of a call that can be seen."""

    heads: layout.Heads
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, params: SDPAParams, part: Span) -> _Call:
        query, key, value, mask = _cut(params, part)
        heads = layout.Heads.of(query, key, mask)
        shape = (*heads.kernel_shape, query.shape[2], key.shape[2])
        q = heads.rows(layout.aligned(query)).transpose(1, 2)
        k, v = (heads.keys(layout.aligned(tensor)).transpose(1, 2) for tensor in (key, value))
        k, v = (layout.reachable(tensor, key.shape[2]) for tensor in (k, v))
        return cls(heads, q, k, v, layout.bias(heads.mask(mask), query.dtype, shape))


def _cut(params: SDPAParams, part: Span) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    mask = params.attn_mask
    if mask is not None:
        for dim, bounds in ((2, part.queries), (3, part.keys)):
            mask = layout.part(mask, dim, bounds) if mask.shape[dim] > 1 else mask
    query = layout.part(params.query, 2, part.queries)
    key, value = (layout.part(tensor, 2, part.keys) for tensor in (params.key, params.value))
    return query, key, value, mask


def _forward(params: SDPAParams) -> tuple[Tensor, ...]:
    query, value = params.query, params.value
    part = geometry.span(params, query.shape[2], params.key.shape[2])
    if part.empty:
        return _nothing(params)
    call = _Call.of(params, part)
    out, lse, *seeds = operators.efficient_forward(
        *(call.query, call.key, call.value, call.bias),
        *(None, None, None, None),
        params.dropout,
        part.mask_type,
        True,  # without an lse, a query that is alone in its block may go wrong (pytorch#192138): see `prepare`
        scale=params.scale,
        window_size=part.window,
    )[:4]
    length = part.queries[1] - part.queries[0]
    out = call.heads.out_back(layout.first(out, value.shape[-1]))
    lse = call.heads.rows_back(layout.first(lse, length))
    if params.attn_mask is not None:
        lse = lse.masked_fill(_blind(params, part), MINUS_INFINITY)
    if length != query.shape[2]:
        around = (part.queries[0], query.shape[2] - part.queries[1])
        out = layout.compact(pad(out.transpose(1, 2), (0, 0, 0, 0, *around))).transpose(1, 2)
        lse = pad(lse, around, value=MINUS_INFINITY)
    lse = lse if _has_kernels_lse(params) else layout.compact(lse)
    return (out, lse, *seeds) if params.dropout > 0 else (out, lse)


def empty_result(params: SDPAParams) -> tuple[Tensor, ...]:
    """Return tensors of the shapes and strides of forward's.

    The operator's seeds lie on the GPU while a CUDA graph is captured, else on the CPU. A trace has to say one of the
    two; as PyTorch's own does it says the first, because the outputs of a graph must be on the GPU.
    """
    query, value = params.query, params.value
    batch, heads, queries, _ = query.shape
    out = query.new_empty((batch, queries, heads, value.shape[-1])).transpose(1, 2)
    seeds = 2 * sum(1 for _ in regions(params)) if 0 < params.dropout < 1 else 0
    rows = -(-queries // LSE_ROWS) * LSE_ROWS if params.seqused_k is None and _has_kernels_lse(params) else queries
    lse = layout.first(query.new_empty((batch, heads, rows), dtype=torch.float32), queries)
    return out, lse, *(query.new_empty((), dtype=torch.long) for _ in range(seeds))


def _nothing(params: SDPAParams) -> tuple[Tensor, ...]:
    out, lse, *seeds = empty_result(params)
    return out.zero_(), lse.fill_(MINUS_INFINITY), *seeds


def _blind(params: SDPAParams, part: Span) -> Tensor:
    """Return `(b, h, Sq or 1)`, True for rows of the part that the mask leaves without a key."""
    mask = _cut(params, part)[3]
    assert mask is not None
    allowed = mask if mask.dtype == torch.bool else mask != MINUS_INFINITY
    return geometry.blind_rows(allowed.expand(*allowed.shape[:-1], part.keys[1] - part.keys[0]), part)


def _backward(params: SDPAParams, grad_out: Tensor, out: Tensor, lse: Tensor, *seeds: Tensor) -> tuple[Any, ...]:
    query, key, value, mask = params.query, params.key, params.value, params.attn_mask
    wants_mask = mask is not None and mask.requires_grad
    part = geometry.span(params, query.shape[2], key.shape[2])
    if part.empty:
        full = query.new_zeros((*query.shape[:3], key.shape[2])) if wants_mask else None
        return *(torch.zeros_like(tensor) for tensor in (query, key, value)), full
    call = _Call.of(params, part)
    grad_out, out, lse = (call.heads.rows(layout.part(tensor, 2, part.queries)) for tensor in (grad_out, out, lse))
    grads = operators.efficient_backward(
        layout.packed(grad_out.transpose(1, 2)),
        *(call.query, call.key, call.value, call.bias),
        layout.packed(out.transpose(1, 2)),
        *(None, None),
        *(call.query.shape[1], call.key.shape[1]),
        kernel_lse(lse, mask is not None),
        params.dropout,
        *_readable(seeds),
        part.mask_type,
        wants_mask,
        scale=params.scale,
        num_splits_key=1 if torch.are_deterministic_algorithms_enabled() else None,
        window_size=part.window,
    )
    grad_query = layout.first(call.heads.rows_back(grads[0].transpose(1, 2)), query.shape[-1])
    grad_key, grad_value = (
        layout.first(call.heads.keys_back(grad.transpose(1, 2)), tensor.shape[-1])
        for grad, tensor in zip(grads[1:3], (key, value), strict=True)
    )
    grad_mask = call.heads.rows_back(_written(grads[3], part)) if wants_mask else None
    return _uncut(params, part, grad_query, grad_key, grad_value, grad_mask)


def kernel_lse(lse: Tensor, maybe_blind: bool) -> Tensor:
    """Return `(b, h, S)` in the form in which the kernel's forward wrote it and its backward reads it."""
    if maybe_blind:
        lse = lse.masked_fill(lse == MINUS_INFINITY, 0.0)
    missing = -lse.shape[-1] % LSE_ROWS
    return layout.compact(pad(lse, (0, missing), value=float("inf")) if missing else lse)


def _written(grad_mask: Tensor, part: Span) -> Tensor:
    """Clear what the kernel left as it found it: the blocks that the causal mask or the window hides."""
    outside = geometry.hidden(part, grad_mask.device)
    return grad_mask if outside is None else grad_mask.masked_fill(outside, 0.0)


def _uncut(params: SDPAParams, part: Span, *grads: Tensor | None) -> tuple[Any, ...]:
    """Put zeros where the call was cut off."""
    queries, keys = params.query.shape[2], params.key.shape[2]
    above = (part.queries[0], queries - part.queries[1])
    beside = (part.keys[0], keys - part.keys[1])
    if not any(above + beside):
        return grads
    around = ((0, 0, *above), (0, 0, *beside), (0, 0, *beside), (*beside, *above))
    return tuple(grad if grad is None else pad(grad, sides) for grad, sides in zip(grads, around, strict=True))
