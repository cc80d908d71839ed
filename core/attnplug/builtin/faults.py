"""Calls that PyTorch's own kernels get wrong: what each is, where it was seen, and the exact way round it.

PyTorch's function accepts each of these calls and then gives garbage, a memory fault or an error from deep inside.
`torch` and `aten_flash` never pass them on as they are: `mended` rewrites a call where that is exact and costs little
beside attention itself, and `reasons` declines the rest. A plain call is looked at for about a microsecond.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnplug import SDPAParams, compute_capability
from attnplug.builtin.masks import as_wide

KINDS = ("cpu", "cuda")
HALF = (torch.float16, torch.bfloat16)
ALIGNMENT = 16
"""Bytes of the widest load of CUDA kernels: tensors, and their rows, must start at a multiple of it."""


@dataclass(frozen=True)
class Fault:
    """A call that PyTorch gets wrong.

    Attributes:
        says: what PyTorch does with it.
        seen: the release in which that was seen, and on what.
        device: the device type that it happens on; None for any.
        concerns: whether a call is one of these, given that it is on such a device.
        mend: returns the same call, exactly, in a form that PyTorch gets right; None where there is none.
    """

    says: str
    seen: str
    device: str | None
    concerns: Callable[[SDPAParams], bool]
    mend: Callable[[SDPAParams], SDPAParams] | None = None

    @property
    def reason(self) -> str:
        return f"{self.says} (seen in PyTorch {self.seen})"


class Faults:
    """The faults of one function of PyTorch's, in the order in which they are mended."""

    def __init__(self, *faults: Fault) -> None:
        self.all = faults
        # By device type, because every call asks, and on the CPU few are left.
        here = {kind: [each for each in faults if each.device in (None, kind)] for kind in KINDS}
        self._mended = {kind: tuple(each for each in found if each.mend) for kind, found in here.items()}
        self._declined = {kind: tuple(each for each in found if not each.mend) for kind, found in here.items()}

    def mended(self, params: SDPAParams) -> SDPAParams:
        """Return a call of the same result that no fault with a way round concerns."""
        for fault in self._mended.get(params.query.device.type, ()):
            if fault.concerns(params):
                assert fault.mend is not None
                params = fault.mend(params)
        return params

    def reasons(self, params: SDPAParams) -> tuple[str, ...]:
        """Return why a call must not be given to PyTorch: the faults without a way round."""
        found = self._declined.get(params.query.device.type, ())
        return tuple(fault.reason for fault in found if fault.concerns(params))


# Which calls are concerned.


def _hides_before_scaling(params: SDPAParams) -> bool:
    return params.is_causal and params.scale is not None and params.scale <= 0


def _drops_everything(params: SDPAParams) -> bool:
    return params.dropout >= 1


def _has_half_queries_and_a_float32_mask(params: SDPAParams) -> bool:
    mask = params.attn_mask
    return mask is not None and mask.dtype is torch.float32 and params.query.dtype in HALF


def _has_double_queries_and_a_float32_mask(params: SDPAParams) -> bool:
    mask = params.attn_mask
    return mask is not None and mask.dtype is torch.float32 and params.query.dtype is torch.float64


def _has_a_mask_of_one_dimension(params: SDPAParams) -> bool:
    return params.attn_mask is not None and params.attn_mask.dim() < 2


def _has_a_mask_whose_rows_are_not_dense(params: SDPAParams) -> bool:
    mask = params.attn_mask
    return mask is not None and (mask.shape[-1] != params.key.shape[-2] or mask.stride(-1) != 1)


def _has_gradients_that_cudnn_loses(params: SDPAParams) -> bool:
    if params.attn_mask is None or params.query.dtype not in HALF or not params.needs_grad:
        return False
    capability, version = _cudnn_on(params.query.device)
    return capability == (9, 0) and 0 < version < 92600 and params.key.shape[-2] % 128 == 64


def _decodes_where_cudnn_errs(params: SDPAParams) -> bool:
    if params.query.is_nested or params.query.dtype not in HALF or params.query.shape[-2] != 1:
        return False
    capability, version = _cudnn_on(params.query.device)
    blackwell = capability is not None and capability[0] in (10, 11)
    return blackwell and 91900 <= version <= 92500 and version != 92401


def _cudnn_on(device: torch.device) -> tuple[tuple[int, int] | None, int]:
    """Return the compute capability of a device and the version of cuDNN, 0 where there is none."""
    return compute_capability(device), torch.backends.cudnn.version() or 0


# What `torch.compiler.assume_constant_result` does, which would import Dynamo: a trace cannot ask cuDNN.
_cudnn_on._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions declare none


def _is_misaligned(params: SDPAParams) -> bool:
    if params.query.is_nested:
        return False
    mask = params.attn_mask
    inputs = is_aligned(params.query) and is_aligned(params.key) and is_aligned(params.value)
    return not inputs or (mask is not None and not _starts_aligned(mask))


def is_aligned(tensor: Tensor) -> bool:
    """Whether the widest loads can read the rows of a tensor: their numbers are dense, and each starts aligned."""
    if not _starts_aligned(tensor):
        return False
    elements = ALIGNMENT // tensor.element_size()
    *strides, step = tensor.stride()
    for at, stride in enumerate(strides):
        if stride % elements and tensor.shape[at] != 1:
            return False
    return step == 1 or tensor.shape[-1] == 1


def _starts_aligned(tensor: Tensor) -> bool:
    """Whether a tensor starts aligned; the memory that it lies in does, as all of PyTorch's."""
    return tensor.storage_offset() * tensor.element_size() % ALIGNMENT == 0


# The ways round.


def _with_positive_scale(params: SDPAParams) -> SDPAParams:
    """Return a call of the same logits: the sign, or the zero, goes into the queries."""
    assert params.scale is not None
    sign = -1 if params.scale < 0 else 0
    return replace(params, query=params.query * sign, scale=-params.scale or 1.0)


def _with_values_of_zero(params: SDPAParams) -> SDPAParams:
    """Return a call without dropout of the same result and gradients, which are 0."""
    everywhere = torch.ones((), dtype=torch.bool, device=params.value.device)
    return replace(params, value=params.value.masked_fill(everywhere, 0.0), dropout=0.0)


def _with_a_mask_of_double(params: SDPAParams) -> SDPAParams:
    return replace(params, attn_mask=as_wide(params.attn_mask, params.query.dtype))


def _with_a_mask_of_two_dimensions(params: SDPAParams) -> SDPAParams:
    return replace(params, attn_mask=torch.atleast_2d(params.attn_mask))


def _with_a_mask_of_dense_rows(params: SDPAParams) -> SDPAParams:
    mask = params.attn_mask
    return replace(params, attn_mask=_copied(mask.expand(*mask.shape[:-1], params.key.shape[-2]), False))


def _with_hidden_keys(params: SDPAParams) -> SDPAParams:
    """Return a call with eight keys more, which the mask hides from each query."""
    mask = params.attn_mask
    hidden = False if mask.dtype is torch.bool else float("-inf")
    key, value = (pad(tensor, (0, 0, 0, 8)) for tensor in (params.key, params.value))
    return replace(params, key=key, value=value, attn_mask=pad(mask, (0, 8), value=hidden))


def _with_a_second_query(params: SDPAParams) -> SDPAParams:
    """Return a call with the one query twice; what calls PyTorch takes the first row of its result."""
    mask = params.attn_mask
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], 2, mask.shape[-1])
    return replace(params, query=torch.cat([params.query] * 2, -2), attn_mask=mask)


def _aligned(params: SDPAParams) -> SDPAParams:
    """Return the call with copies of what is misaligned. PyTorch pads the rows of a mask by itself."""
    query, key, value = (_copied(tensor, is_aligned(tensor)) for tensor in (params.query, params.key, params.value))
    mask = params.attn_mask
    if mask is not None:
        mask = _copied(mask, _starts_aligned(mask))
    return replace(params, query=query, key=key, value=value, attn_mask=mask)


def _copied(tensor: Tensor, is_right: bool) -> Tensor:
    return tensor if is_right else tensor.clone(memory_format=torch.contiguous_format)


HIDDEN_BEFORE_SCALED = Fault(
    "PyTorch's fused kernels hide keys with -inf before they scale, which a scale of 0 turns into NaN and a negative "
    "one into +inf",
    "2.13.0, CPU; 2.11.0, CUDA 13.0",
    None,
    _hides_before_scaling,
    _with_positive_scale,
)
DROPS_EVERYTHING = Fault(
    "PyTorch's CUDA kernels divide by 1 - dropout_p, and give NaN or an error for dropout_p=1",
    "2.11.0, CUDA 13.0",
    "cuda",
    _drops_everything,
    _with_values_of_zero,
)
MISALIGNED = Fault(
    "PyTorch's CUDA kernels read 16 bytes at a time, and fault where a tensor or its rows start between",
    "2.11.0, CUDA 13.0",
    "cuda",
    _is_misaligned,
    _aligned,
)
OF_SDPA = Faults(
    HIDDEN_BEFORE_SCALED,
    DROPS_EVERYTHING,
    Fault(
        "PyTorch reads a float32 attn_mask of half-precision queries as half precision, and gives NaN",
        "2.11.0, CUDA 13.0, cuDNN 9.19",
        "cuda",
        _has_half_queries_and_a_float32_mask,
    ),
    Fault(
        "PyTorch reads a float32 attn_mask of float64 queries as float64",
        "2.13.0, CPU",
        None,
        _has_double_queries_and_a_float32_mask,
        _with_a_mask_of_double,
    ),
    Fault(
        "PyTorch's function trips over an attn_mask of one dimension",
        "2.13.0, CPU",
        None,
        _has_a_mask_of_one_dimension,
        _with_a_mask_of_two_dimensions,
    ),
    Fault(
        "PyTorch raises '(*bias): last dimension must be contiguous' for an attn_mask that broadcasts over keys, or "
        "has another last stride than 1",
        "2.11.0, CUDA 13.0",
        "cuda",
        _has_a_mask_whose_rows_are_not_dense,
        _with_a_mask_of_dense_rows,
    ),
    Fault(
        "PyTorch's function prefers cuDNN on Hopper, whose backward gives NaN with an attn_mask, 64 keys more than a "
        "multiple of 128, and logits far below zero (pytorch#196678)",
        "2.11.0 to 2.15.0, cuDNN before 9.26",
        "cuda",
        _has_gradients_that_cudnn_loses,
        _with_hidden_keys,
    ),
    Fault(
        "PyTorch's function prefers cuDNN on Blackwell, which gets single queries wrong (pytorch#193893)",
        "2.11.0 to 2.13.0, cuDNN 9.19 to 9.25.0",
        "cuda",
        _decodes_where_cudnn_errs,
        _with_a_second_query,
    ),
    MISALIGNED,
)
"""Those of `torch.nn.functional.scaled_dot_product_attention`."""
OF_FLASH = Faults(HIDDEN_BEFORE_SCALED, DROPS_EVERYTHING, MISALIGNED)
"""Those of `aten::_scaled_dot_product_flash_attention` and its equivalent on the CPU."""
