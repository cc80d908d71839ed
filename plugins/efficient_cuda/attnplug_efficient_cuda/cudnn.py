"""`cudnn`: cuDNN's attention through PyTorch's operator, with its limits as reasons.

Of dense calls the operator keeps cuDNN's layout: `(B, H, S, E)`, grouped heads as they are, a causal mask that
starts at the upper left; packed sequences have a module of their own. What cuDNN makes of a row whose keys are all
masked has changed from release to release, so none is ever given to it: masks hide by a large negative number, and
such rows are cleared afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from attnplug import CausalVariant, Feature, SDPAParams, compute_capability
from attnplug_efficient_cuda import cudnn_packed, geometry, hardware, layout, operators
from attnplug_efficient_cuda.cudnn_packed import shown
from attnplug_efficient_cuda.kept import Kept

shape_dependent = True
MINUS_INFINITY = float("-inf")
LARGEST_DIMENSION = 65535
Capability = tuple[int, int]


class Direct(NamedTuple):
    """What becomes of a call that the operator takes as it is: the strides that out must have."""

    out: tuple[int, ...]


def _look(params: SDPAParams) -> Direct | None:
    query, key, value = params.query, params.key, params.value
    fits = all(layout.is_aligned(tensor) and not layout.is_expanded(tensor) for tensor in (query, key, value))
    if not fits or _band_in_mask(params):
        return None
    shape, order = (*query.shape[:-1], value.shape[-1]), _order(query)
    steps = dict(zip(order, layout.contiguous_strides([shape[dim] for dim in order]), strict=True))
    return Direct(tuple(steps[dim] for dim in range(4)))


direct = Kept(_look)


def forward(params: SDPAParams) -> tuple[Tensor, ...]:
    """Return `out`, `lse` and, where there is a mask, the operator's own lse."""
    params, _ = params.with_positive_scale()
    if params.is_varlen:
        return cudnn_packed.forward(params)
    if (told := direct.of(params)) is not None:
        out, lse = _run(params, params.query, params.key, params.value, None)
        out = out if out.stride() == told.out else laid_out_like(params.query, out)
        return out, lse.reshape(params.query.shape[:-1])
    params = _with_band_in_mask(params)
    query, key, value, mask = _kernel_tensors(params)
    out, kernel_lse = _run(params, query, key, value, mask)
    lse = layout.compact(kernel_lse.reshape(query.shape[:-1]))
    own: tuple[Tensor, ...] = ()
    if params.attn_mask is not None:
        blind, own = _blind(params.attn_mask), (kernel_lse,)
        out, lse = out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, MINUS_INFINITY)
    return laid_out_like(query, out), lse, *own


def prepare(params: SDPAParams) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor | None, ...] | None] | None:
    """Return what runs a call whose tensors are like these, if the operator takes them as they are.

    It does what `forward` does of such a call, written out. An lse that nobody asked for is saved for backward alone.
    """
    told = direct.of(params)
    if told is None or params.scale is None or params.scale <= 0:
        return None
    rows, told_out, returns_lse = params.query.shape[:-1], told.out, params.return_lse
    wants_lse = returns_lse or params.needs_grad
    attend = operators.repeated("_scaled_dot_product_cudnn_attention", params, wants_lse)
    if attend is None:
        return None

    fits: bool | None = None  # whether the operator lays its output out as told: it does so by the strides alone

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor | None, ...] | None:
        nonlocal fits
        if (query.data_ptr() | key.data_ptr() | value.data_ptr()) % layout.READ_BYTES:
            return None
        found = attend(query, key, value)
        out = found[0]
        if fits is None:
            fits = out.stride() == told_out
        if not fits:
            out = laid_out_like(query, out)
        return (out, found[1].reshape(rows)) if returns_lse else (out, None, found[1])

    return run


def prepare_backward(
    params: SDPAParams, grad_out: Tensor, out: Tensor, lse: Tensor | None, *saved: Tensor
) -> Callable[..., tuple[Tensor, ...] | None] | None:
    """Return what runs backward of a call whose tensors are like these, if the operator takes them as they are."""
    order, attend = _order(params.query), operators.overload("_cudnn_attention_backward")
    if direct.of(params) is None or attend is None or lse is not None or not out.permute(order).is_contiguous():
        return None
    laid_out, scale = layout.laid_out(grad_out, order), params.scale
    rest = None, None, None, params.query.shape[2], params.key.shape[2], 0.0, params.is_causal

    def run(
        query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, out: Tensor, lse: None, kept: Tensor
    ) -> tuple[Tensor, ...] | None:
        grad_out = laid_out(grad_out)
        addresses = query.data_ptr() | key.data_ptr() | value.data_ptr() | grad_out.data_ptr() | out.data_ptr()
        if addresses % layout.READ_BYTES or torch.are_deterministic_algorithms_enabled():
            return None
        seed = _no_seed(query)
        grads: tuple[Tensor, ...] = attend(grad_out, query, key, value, out, kept, seed, seed, *rest, scale=scale)
        return grads

    return run


def _run(params: SDPAParams, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse, *_ = operators.cudnn_forward(
        *(query, key, value, mask),
        *(None, None, query.shape[2], key.shape[2]),
        True,
        0.0,
        params.is_causal,
        False,
        scale=params.scale,
    )
    return out, lse


def backward(
    params: SDPAParams,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    *saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value.

    Raises:
        RuntimeError: `torch.use_deterministic_algorithms(True)` is in force, which this backward cannot honour.
    """
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError("cudnn: the backward has no deterministic form; use 'efficient_cuda' or another one")
    if lse is None:  # as it was prepared
        lse = saved[0].reshape(params.query.shape[:-1])
    params, sign = params.with_positive_scale()
    if params.is_varlen:
        grad_query, *others = cudnn_packed.backward(params, grad_out, out, lse)
    else:
        grad_query, *others = _dense_backward(params, grad_out, out, lse, *saved)
    return grad_query if sign == 1 else grad_query * sign, *others


def _dense_backward(
    params: SDPAParams, grad_out: Tensor, out: Tensor, lse: Tensor, *saved: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if direct.of(params) is not None:
        query, key, value, mask = params.query, params.key, params.value, None
    else:
        params = _with_band_in_mask(params)
        query, key, value, mask = _kernel_tensors(params)
    if mask is None:
        kernel_lse = lse.reshape(lse.shape + (1,) * (operators.cudnn_lse_rank() - 3))
    else:
        grad_out = grad_out.masked_fill((lse == MINUS_INFINITY).unsqueeze(-1), 0.0)
        (kernel_lse,) = saved
    seed = _no_seed(query)
    return operators.cudnn_backward(
        laid_out_like(query, grad_out),
        *(query, key, value),
        laid_out_like(query, out),
        kernel_lse,
        *(seed, seed, mask),
        *(None, None, query.shape[2], key.shape[2]),
        0.0,
        params.is_causal,
        scale=params.scale,
    )


def _no_seed(query: Tensor) -> Tensor:
    """Return what cuDNN is given for a seed, which it does not read without dropout.

    None is kept for the next call: a CUDA graph may have run this one, whose memory is the graph's.
    """
    return query.new_empty((), dtype=torch.long)


def unavailable() -> tuple[str, ...]:
    """Return how PyTorch's operators differ from those that this plugin was written for."""
    return operators.changed("_cudnn_attention_forward", "_cudnn_attention_backward")


def lacks(device: torch.device, dtype: torch.dtype) -> dict[Feature, str]:
    """Return the features for which the PyTorch or the cuDNN of this machine is too old."""
    reason = cudnn_packed.lacking(hardware.cudnn_version())
    return {Feature.VARLEN: reason} if reason else {}


def supports(params: SDPAParams) -> list[str]:
    """Return each reason against this call: PyTorch's, cuDNN's, and this GPU's."""
    reasons: list[str] = []
    version, gpu = hardware.cudnn_version(), compute_capability(params.query.device)
    if too_new := hardware.too_new(params.query.device):
        reasons.append(too_new)
    packed = params.is_varlen
    if version is None:
        reasons.append(f"needs cuDNN 9, which PyTorch {torch.__version__} is built without; ask where a CUDA build is")
    elif version < 90000:
        reasons.append(f"needs cuDNN 9.0 or later in PyTorch {torch.__version__}, found {shown(version)}")
    elif not packed:
        reasons += _version_reasons(params, version, gpu)
        if not hardware.can_ask_pytorch(params.query.device):
            reasons += _size_reasons(params, version, gpu)
    reasons += _common_reasons(params)
    if packed:
        return reasons + cudnn_packed.reasons(params, gpu, params.needs_grad)
    reasons += _dense_reasons(params)
    if not reasons and (refused := hardware.cudnn_refuses(params)):
        reasons.append(refused)
    return reasons


def fake(params: SDPAParams) -> tuple[Tensor, ...]:
    """Return tensors of the shapes and strides of forward's."""
    if params.is_varlen:
        query, value = params.query, params.value
        lse = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
        return query.new_empty((*query.shape[:-1], value.shape[-1])), lse
    query, value = layout.unshared(params.with_positive_scale()[0].query), params.value
    out = laid_out_like(query, query.new_empty((*query.shape[:-1], value.shape[-1])))
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    own = []
    if params.attn_mask is not None or _band_in_mask(params):
        own.append(query.new_empty(query.shape[:-1] + (1,) * (operators.cudnn_lse_rank() - 3), dtype=torch.float32))
    return out, lse, *own


def _kernel_tensors(params: SDPAParams) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    query, key, value = (layout.unshared(tensor) for tensor in (params.query, params.key, params.value))
    return query, key, value, _mask(params.attn_mask, query.dtype, key.shape[2])


def _band_in_mask(params: SDPAParams) -> bool:
    """Whether the operator has no causal mask for a dense call: it has one from the upper left, with no other mask."""
    lengths = params.query.shape[2], params.key.shape[2]
    shifted = params.causal_variant == CausalVariant.LOWER_RIGHT and lengths[0] != lengths[1]
    return params.window_size != geometry.OPEN or (params.is_causal and (shifted or params.attn_mask is not None))


def _with_band_in_mask(params: SDPAParams) -> SDPAParams:
    """Return a dense call with the same result that the operator has a mask for, which may take `(Sq, Sk)` numbers."""
    if not _band_in_mask(params):
        return params
    return geometry.window_as_mask(replace(params, is_causal=False, window_size=geometry.band(params)))


def _mask(mask: Tensor | None, dtype: torch.dtype, keys: int) -> Tensor | None:
    """Return the mask in `dtype`, to be added, with no infinities; the operator expands all but the heads and keys."""
    if mask is None:
        return None
    floor = max(torch.finfo(dtype).min, -1e30)
    additive = layout.additive(mask.detach(), dtype).clamp(min=floor)
    return layout.compact(additive.expand(*mask.shape[:-1], keys))


def _blind(mask: Tensor) -> Tensor:
    """Return `(b, h, Sq or 1)`, True for rows that the mask leaves without a key."""
    allowed = mask if mask.dtype == torch.bool else mask != MINUS_INFINITY
    return allowed.any(-1).logical_not()


def laid_out_like(query: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor` with its dimensions in memory in the order of the query's.

    PyTorch keeps cuDNN's plans by the layout of query, key and value; some releases run a plan made for one
    layout of the gradient on another. So the layout here follows from the query's alone.
    """
    order = _order(query)
    return layout.packed(tensor.permute(order)).permute([order.index(dim) for dim in range(4)])


def _order(query: Tensor) -> list[int]:
    """Return the query's dimensions from the one of the largest stride on."""
    return sorted(range(4), key=lambda dim: (-query.stride()[dim], dim))


def _version_reasons(params: SDPAParams, version: int, gpu: Capability | None) -> list[str]:
    """Return what this cuDNN is known to get wrong, whether or not this PyTorch knows."""
    queries, found, reasons = params.query.shape[2], shown(version), []
    if version < 91501 and queries % 128:
        reasons.append(f"needs cuDNN 9.15.1 for {queries} queries, not a multiple of 128; found {found}")
    if gpu is not None and queries == 1 and gpu[0] in (10, 11) and 91900 <= version <= 92500 and version != 92401:
        reasons.append(f"does not decode with cuDNN {found} on compute capability {gpu[0]}.{gpu[1]}")
    return reasons


def _size_reasons(params: SDPAParams, version: int, gpu: Capability | None) -> list[str]:
    """Return what speaks against head sizes on a GPU that is not here, where PyTorch itself cannot be asked.

    The limits are those of PyTorch's `sdp_utils.cpp`; on Hopper 2.11 has 256 from cuDNN 9.10 on.
    """
    size, value_size = params.query.shape[3], params.value.shape[3]
    limit = 128
    if (gpu == (9, 0) and version >= 91000) or (
        gpu is not None and gpu[0] == 10 and version > 92200 and not (gpu == (10, 7) and version <= 92500)
    ):
        limit = 256
    elif gpu is not None and gpu[0] == 10 and version >= 91100 and (size, value_size) == (192, 128):
        limit = 192
    if max(size, value_size) > limit:
        where = "an unknown GPU" if gpu is None else f"compute capability {gpu[0]}.{gpu[1]}"
        return [f"head sizes {size} and {value_size} are above {limit}, the limit of cuDNN {shown(version)} on {where}"]
    if max(size, value_size) > 128 and params.needs_grad and (size, value_size) not in ((192, 128), (256, 256)):
        return [f"has no backward for head sizes {size} and {value_size}"]
    return []


def _common_reasons(params: SDPAParams) -> list[str]:
    """Return what no cuDNN does through PyTorch's operator, neither dense nor with sequences."""
    reasons = []
    if params.value.shape[-1] % 8:
        reasons.append(f"value head size {params.value.shape[-1]} is not a multiple of 8")
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if strict and params.needs_grad:
        reasons.append("has no deterministic backward, which torch.use_deterministic_algorithms asks for")
    return reasons


def _dense_reasons(params: SDPAParams) -> list[str]:
    """Return what no cuDNN does of dense calls through PyTorch's operator."""
    query, key = params.query, params.key
    reasons = []
    if key.shape[2] == 1:
        reasons.append("does not take a single key")
    if query.shape[2] == 1 and params.needs_grad:
        reasons.append("does not take a single query with gradients")
    if max(query.shape[:2]) > LARGEST_DIMENSION:
        reasons.append(f"takes at most {LARGEST_DIMENSION} batches and heads, got {tuple(query.shape[:2])}")
    masked = params.attn_mask is not None or _band_in_mask(params)
    if masked and key.shape[2] % 128 == 64 and params.needs_grad:
        reasons.append(
            f"may have NaN in its backward with an attn_mask and {key.shape[2]} keys, 64 more than a multiple of 128 "
            f"(pytorch#196678)"
        )
    return reasons
