"""PyTorch's formula in operators, `aten::_scaled_dot_product_attention_math`, called directly.

Calling the leaf itself leaves PyTorch's process-wide backend flags, which other threads see, alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnplug import SDPAParams
from attnplug.builtin.masks import as_additive
from attnplug.builtin.operators import operator

composite = True
_autocasts = torch._C._is_any_autocast_enabled
_math = operator(
    "aten::_scaled_dot_product_attention_math(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
    "float dropout_p=0., bool is_causal=False, Tensor? dropout_mask=None, *, float? scale=None, "
    "bool enable_gqa=False) -> (Tensor, Tensor)"
)


def supports(params: SDPAParams) -> str | None:
    """Decline the combination that the operator refuses."""
    if params.is_causal and params.attn_mask is not None:
        return "aten::_scaled_dot_product_attention_math refuses attn_mask together with is_causal"
    return None


def forward(params: SDPAParams) -> tuple[Tensor, None]:
    """Call the operator; its second result is the probabilities, not an lse."""
    mask = as_additive(params.attn_mask, params.query.dtype)
    given = params.query, params.key, params.value, mask, params.dropout, params.is_causal
    if params.enable_gqa:  # each keyword argument is a share of a tiny call's time
        return _math(*given, scale=params.scale, enable_gqa=True)[0], None
    return _math(*given, scale=params.scale)[0], None


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor, None]:
    """Do what `forward` does: the operator takes any mask that broadcasts, and autocast would cast what is in it."""
    if _autocasts():
        with torch.autocast(query.device.type, enabled=False):
            return plain(query, key, value, attn_mask, dropout, is_causal, scale, enable_gqa)
    mask = attn_mask
    if mask is not None and mask.dtype is not query.dtype:
        mask = as_additive(mask, query.dtype)
    if scale is None and not enable_gqa:  # each keyword argument is a share of a tiny call's time
        return _math(query, key, value, mask, dropout, is_causal)[0], None
    return _math(query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa)[0], None
