"""`flex`: PyTorch's `flex_attention`, which compiles a kernel from a function of the logits and one of the mask.

Written for PyTorch 2.11 to 2.13 (`torch/nn/attention/flex_attention.py`). Numbers that differ from call to call
(offsets, windows, lengths, slopes, caps) reach these functions as tensors, so that one kernel is compiled for
each kind of call and not for each call. Inside `torch.compile`, flex is part of the caller's graph.

On CPU it has neither a backward nor, compiled, an lse, which sinks are made from; and a kernel is compiled for each
size, up to Dynamo's limit, beyond which PyTorch runs the formula uncompiled and says so.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from attnplug import SDPAParams
from attnplug_adapters import convert, flex_mods

composite = True


def supports(params: SDPAParams) -> str | None:
    """Decline gradients on CPU, for which PyTorch has no kernel."""
    if params.query.device.type == "cpu" and params.needs_grad:
        return "PyTorch's flex_attention has no backward on CPU"
    if params.query.device.type == "cuda" and params.value.shape[-1] < 16:
        return f"value head size {params.value.shape[-1]} is below 16"
    return None


def forward(params: SDPAParams) -> tuple[Tensor, Tensor | None]:
    """Return `out` and, if it is asked for, `lse`."""
    positions = flex_mods.Positions.of(params)
    query, key, value = flex_mods.dense(params, positions)
    wants_lse = params.return_lse or params.sinks is not None
    returned = _attend(query)(
        query,
        key,
        value,
        score_mod=flex_mods.score_mod(params, positions),
        block_mask=_block_mask(params, positions, query.shape[2], key.shape[2]),
        scale=params.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True) if wants_lse else None,
    )
    out, lse = (returned[0], returned[1].lse) if wants_lse else (returned, None)
    if params.sinks is not None:
        out, lse = _with_sinks(out, lse, params.sinks)
    if params.is_varlen:
        out, lse = out[0].transpose(0, 1), None if lse is None else lse[0]
    return out, lse if params.return_lse else None


def _attend(query: Tensor) -> Any:
    """Return what to call: in a trace the function itself, which becomes part of the graph.

    A compiled kernel would read the memory of fake tensors, which have none.
    """
    if flex_mods.is_watched() or isinstance(query, FakeTensor):
        return flex_attention
    return _compiled(on_cpu=query.device.type == "cpu")


@cache
def _compiled(on_cpu: bool) -> Any:
    """Return the compiled function, made when it is first called: `torch.compile` imports Dynamo, which takes seconds.

    On a CPU sizes do not vary: with sizes that do, what PyTorch 2.13 generates for a mask does not compile,
    because `cur_kvSplitSize` is not declared.
    """
    return torch.compile(flex_attention, dynamic=False if on_cpu else None)


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
        return _band_blocks(positions.offset, convert.band(params), queries, keys, params.query.device)
    mask = params.attn_mask
    by_mask = mask is not None and mask.dtype == torch.bool
    batch = params.query.shape[0] if positions.by_batch or (by_mask and mask.shape[0] > 1) else None
    heads = params.query.shape[1] if by_mask and mask.shape[1] > 1 else None
    return create_block_mask(mask_mod, batch, heads, queries, keys, device=params.query.device)


@lru_cache(maxsize=64)
def _band_blocks(offset: int, band: tuple[int, int], queries: int, keys: int, device: torch.device) -> BlockMask:
    """Return the blocks of a causal mask or window, which follow from these numbers alone."""
    seen = flex_mods.band_mod(flex_mods.ends(offset, band, device))
    return create_block_mask(seen, None, None, queries, keys, device=device)
