"""`flex`: PyTorch's `flex_attention`, which compiles a kernel from a function of the logits and one of the mask.

Written for PyTorch 2.11 to 2.15 (`torch/nn/attention/flex_attention.py`). Numbers that differ from call to call
(offsets, windows, lengths, slopes, caps) reach these functions as tensors, so that one kernel is compiled for
each kind of call and not for each call. Inside `torch.compile`, flex is part of the caller's graph; on a CPU, where
PyTorch does not compile it in many graphs, its operators are.

On CPU it has neither a backward nor, compiled, an lse, which sinks are made from.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from attnplug import AttnplugError, GradientError, SDPAParams
from attnplug_adapters import convert, flex_kinds, flex_mods

composite = True

BLOCK = 128
"""PyTorch's own block size."""

NARROW = 24
"""The least head size from which PyTorch's kernel for the CPU is right for any number of keys, in vectors of 8."""


def supports(params: SDPAParams) -> str | None:
    """Decline gradients on CPU, for which PyTorch has no kernel."""
    if params.query.device.type == "cpu" and params.needs_grad:
        return "PyTorch's flex_attention has no backward on CPU"
    if params.query.device.type == "cuda" and params.value.shape[-1] < 16:
        return f"value head size {params.value.shape[-1]} is below 16"
    return None


def forward(params: SDPAParams) -> tuple[Tensor, Tensor | None]:
    """Return `out` and, if it is asked for, `lse`.

    Raises:
        GradientError: an argument has a tangent, which a compiled function would drop in silence.
        AttnplugError: a transform of `torch.func`, or `torch.jit.trace`, is around the call; PyTorch compiles no kernel
            there.
    """
    # A mode, such as that of `torch.func.linearize`, takes tangents as they are; a trace cannot ask for them.
    if not torch.compiler.is_compiling() and any(
        map(_has_tangent, (params.query, params.key, params.value, params.attn_mask, params.sinks))
    ):
        raise GradientError(
            "implementation 'flex' has no forward-mode derivatives; use one of the MATH family, for example inside "
            "sdpa_kernel(SDPBackend.MATH)"
        )
    if not flex_mods.is_watched() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise AttnplugError(
            "implementation 'flex' is compiled, and cannot be seen through by torch.func transforms; use another, for "
            "example inside sdpa_kernel(SDPBackend.MATH)"
        )
    if not flex_mods.is_watched() and torch._C._get_tracing_state() is not None:
        raise AttnplugError(
            "implementation 'flex' is compiled, and cannot be seen through by torch.jit.trace; use another, for "
            "example inside sdpa_kernel(SDPBackend.MATH)"
        )
    positions = flex_mods.Positions.of(params)
    query, key, value = flex_mods.dense(params, positions)
    wants_lse = params.return_lse or params.sinks is not None
    if query.device.type == "cpu" and not torch.is_grad_enabled():  # flex looks at tensors alone, and refuses backward
        query, key, value = query.detach(), key.detach(), value.detach()
    # A trace gets flex_attention itself, for its own graph; a kernel would read fake tensors, which have no memory.
    traced = flex_mods.is_watched() or isinstance(query, FakeTensor)
    # Of an int PyTorch 2.13 makes a symbol, which its kernel for the CPU then does not know.
    scale = params.scale if traced else float(params.scale)
    constants = (scale, query.shape[1] != key.shape[1], wants_lse)
    attend = flex_kinds.attention(*constants) if traced else partial(flex_kinds.attend, constants)
    score_mod = flex_mods.score_mod(params, positions)
    if traced and query.device.type == "cpu" and not wants_lse:
        mask_mod = flex_mods.mask_mod(params, positions)
        out = _in_operators(params.scale, query, key, value, score_mod, mask_mod)
        return out[0].transpose(0, 1) if params.is_varlen else out, None
    blocks = _block_mask(params, positions, query.shape[2], key.shape[2])
    if query.device.type == "cpu":
        query, key = _of_a_right_size(query), _of_a_right_size(key)
    returned = attend(query, key, value, score_mod, blocks)
    out, lse = (returned[0], returned[1].lse) if wants_lse else (returned, None)
    if params.sinks is not None:
        out, lse = _with_sinks(out, lse, params.sinks)
    if params.is_varlen:
        out, lse = out[0].transpose(0, 1), None if lse is None else lse[0]
    return out, lse if params.return_lse else None


def _has_tangent(tensor: Tensor | None) -> bool:
    return tensor is not None and unpack_dual(tensor).tangent is not None


def _of_a_right_size(tensor: Tensor) -> Tensor:
    """Return queries or keys with zeros appended to heads of 8 and 16, which change no product.

    PyTorch 2.11 to 2.13 multiplies heads below 24 that fill vectors of 8 numbers (AVX2) with a kernel for 16 keys, and
    gives it the last 8 too (`CppMicroGemmFP32Vec`, `24 * BLOCK_M > K`). That reads 8 keys past the end of the tensor,
    and writes their logits over the maxima of the first 8 queries. Vectors of 16 (AVX-512) have no such rest.
    Any number of keys is padded for, since another head size is another kernel, which takes seconds to compile.
    """
    return convert.padded(tensor, NARROW) if tensor.shape[-1] in (8, 16) else tensor


def _in_operators(scale: Any, query: Tensor, key: Tensor, value: Tensor, score_mod: Any, mask_mod: Any) -> Tensor:
    """Return what flex_attention does, as operators, with the scores of all queries and keys in memory.

    For a CPU, PyTorch 2.13 does not compile a flex_attention whose functions look up what the graph computes, which
    `lower_cpu` takes before it is written (`NoValidChoicesError`), or has sizes that vary: `CppFlexAttentionTemplate`
    renames its own sizes in the text of a kernel, `ku1` in `ku12` too. Nor does any release up to 2.15 compile one
    whose result an elementwise operation takes, such as `* 2`: the scheduler fuses that into the kernel, and
    `CppFlexAttentionTemplate` has no place for it (`epilogue_nodes`).
    """
    heads = query.shape[1]
    key, value = (convert.spread_heads(tensor, heads, 1).float() for tensor in (key, value))
    scores = query.float() @ key.transpose(-1, -2) * scale
    places = [torch.arange(size, device=query.device) for size in scores.shape]
    indices = [place.view(-1, *(1,) * (3 - dim)) for dim, place in enumerate(places)]
    if score_mod is not None:
        scores = score_mod(scores, *indices)
    if mask_mod is not None:
        scores = scores.masked_fill(~mask_mod(*indices), convert.MINUS_INFINITY)
    blind = (scores == convert.MINUS_INFINITY).all(-1, keepdim=True)
    return (scores.softmax(-1).masked_fill(blind, 0.0) @ value).to(query.dtype)


def _with_sinks(out: Tensor, lse: Any, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Return out and lse with one more logit in each row's denominator."""
    whole = torch.logaddexp(lse, sinks.to(lse.dtype).view(1, -1, 1))
    return out * torch.exp(lse - whole).unsqueeze(-1).to(out.dtype), whole


def _block_mask(params: SDPAParams, positions: flex_mods.Positions, queries: int, keys: int) -> BlockMask | None:
    """Return which blocks are seen, whole or in part; None if all are."""
    mask_mod = flex_mods.mask_mod(params, positions)
    if mask_mod is None:
        return None
    if positions.is_plain and params.attn_mask is None and not flex_mods.is_watched():
        make = _band_blocks.__wrapped__ if flex_mods.is_captured() else _band_blocks
        return make(positions.offset, convert.band(params), queries, keys, params.query.device)
    mask = params.attn_mask
    by_mask = mask is not None and mask.dtype == torch.bool
    batch = params.query.shape[0] if positions.by_batch or (by_mask and mask.shape[0] > 1) else None
    heads = params.query.shape[1] if by_mask and mask.shape[1] > 1 else None
    return create_block_mask(mask_mod, batch, heads, queries, keys, device=params.query.device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _band_blocks(offset: int, band: tuple[int, int], queries: int, keys: int, device: torch.device) -> BlockMask:
    """Return the blocks of a causal mask or window, which follow from these numbers without a look at each pair."""
    limits = flex_mods.ends(offset, band, device)
    row = torch.arange(0, queries, BLOCK, device=device).unsqueeze(1)
    column = torch.arange(0, keys, BLOCK, device=device)
    last_row, last_column = (row + BLOCK - 1).clamp(max=queries - 1), (column + BLOCK - 1).clamp(max=keys - 1)
    nearest, farthest = column - last_row, last_column - row
    touched = (farthest >= limits[0]) & (nearest <= limits[1])
    whole = (row + BLOCK <= queries) & (column + BLOCK <= keys)
    inside = (nearest >= limits[0]) & (farthest <= limits[1]) & whole
    (count, order), (whole_count, whole_order) = (_listed(blocks[None, None]) for blocks in (touched & ~inside, inside))
    seen = flex_mods.band_mod(limits)
    return BlockMask.from_kv_blocks(count, order, whole_count, whole_order, BLOCK, seen, (queries, keys))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks of each row are marked, and all blocks, those first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()
