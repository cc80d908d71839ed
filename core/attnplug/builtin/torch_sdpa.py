"""`torch.nn.functional.scaled_dot_product_attention`, with PyTorch's own choice of kernel: the safe default."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch._C._nn import scaled_dot_product_attention as sdpa  # which patch_torch leaves alone
from torch.backends.cuda import flash_sdp_enabled

from attnplug import Feature, SDPAParams, SDPBackend
from attnplug.builtin.faults import OF_SDPA, lacking
from attnplug.builtin.operators import with_scale
from attnplug.builtin.rewrites import ALIGNMENT, halves

_FAMILIES = {int(member): member for member in SDPBackend}
_JAGGED = torch.jagged
_choice = torch._fused_sdp_choice
_transforms = torch._C._functorch.peek_interpreter_stack
composite = True
any_form = True


def supports(params: SDPAParams) -> tuple[str, ...]:
    """Decline the combinations that PyTorch's function refuses, or gets wrong with no way round."""
    query = params.query
    if params.is_causal and params.attn_mask is not None:
        return ("PyTorch's function refuses attn_mask together with is_causal",)
    if params.is_causal and query.is_nested and query.layout is torch.strided and query.device.type == "cpu":
        return ("PyTorch has no kernel for strided nested tensors with is_causal on CPU",)
    return OF_SDPA.reasons(params)


def lacks(device: torch.device, dtype: torch.dtype) -> dict[Feature, str]:
    """Return the features of which PyTorch's function gets every call wrong on such a device."""
    return lacking(device, dtype)


def forward(params: SDPAParams) -> tuple[Tensor, None]:
    """Call PyTorch's function; it gives no lse."""
    call = OF_SDPA.rewritten(params)
    if (dim := OF_SDPA.cut(call)) is not None:
        out = torch.cat([forward(half)[0] for half in halves(call, dim)], dim)
    else:
        arguments = call.query, call.key, call.value, call.attn_mask, call.dropout, call.is_causal
        out = sdpa(*arguments, scale=call.scale, enable_gqa=call.enable_gqa)
    if call.query is not params.query and not params.query.is_nested:  # a query or a dimension may have been added
        out = out.view(out.shape[-params.query.dim() :]).narrow(-2, 0, params.query.shape[-2])
    return out, None


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
    """Do what `forward` does, at once where PyTorch has no known fault: see `attnplug.builtin.faults`."""
    if (
        query.is_cpu
        and (scale is None or scale > 0.0 or not is_causal)
        and (attn_mask is None or attn_mask.dtype is query.dtype or attn_mask.dtype is torch.bool)
    ):
        if scale is None and not enable_gqa:  # keyword arguments cost 0.8 us
            return sdpa(query, key, value, attn_mask, dropout, is_causal), None
        return sdpa(query, key, value, attn_mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa), None
    return forward(SDPAParams(query, key, value, attn_mask, dropout, is_causal, enable_gqa, scale=scale))


def prepare(params: SDPAParams) -> Callable[..., tuple[Tensor, None] | None] | None:
    """Return what runs a call on CUDA whose tensors are like these, if PyTorch has no known fault for it."""
    if params.query.is_cpu or OF_SDPA.rewritten(params) is not params or OF_SDPA.cut(params) is not None:
        return None
    attend, dropout, is_causal = with_scale(sdpa, params), params.dropout, params.is_causal
    if params.enable_gqa:
        attend = partial(attend, enable_gqa=True)
    has_flash = flash_sdp_enabled()  # on which it depends whether the kernel that errs gets the call

    def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None] | None:
        starts = query.data_ptr() | key.data_ptr() | value.data_ptr()
        if (starts if mask is None else starts | mask.data_ptr()) % ALIGNMENT or flash_sdp_enabled() is not has_flash:
            return None
        return attend(query, key, value, mask, dropout, is_causal), None

    return run


def family(params: SDPAParams) -> SDPBackend | None:
    """Return the family of the kernel that PyTorch chooses for this call; None where it cannot say."""
    query = params.query
    if query.layout is _JAGGED or _transforms() is not None:
        return None
    given = query, params.key, params.value, params.attn_mask, params.dropout, params.is_causal
    return _FAMILIES[_choice(*given, enable_gqa=True) if params.enable_gqa else _choice(*given)]
