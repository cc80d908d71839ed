"""Calls that PyTorch's own kernels get wrong: what each is, where it was seen, and its exact workaround.

PyTorch's function accepts each of these calls and then gives garbage, a memory fault or an internal error.
`torch` and `aten_flash` do not pass them on as they are: `rewritten` changes a call where that is exact, `cut` tells
along which dimension one that is too large is computed in halves, and `reasons` declines the rest. Decisions do not
depend on lengths, so no reason may look at them. Two kinds of calls, of one causal head and one batch, therefore have
no workaround: a backward of too many numbers (`TOO_FAR`) reaches PyTorch as it is, and too many draws of dropout are
left to PyTorch's formula, which needs the memory of all logits. In an exported program, a fault that depends on a
dynamic size is not seen. Checking a plain call takes about a microsecond.

On AMD GPUs, which PyTorch calls `cuda` too, the same rewrites run. Alignment counts there as well: AOTriton's kernels
are compiled for pointers to multiples of 16 bytes (`*fp16:16`, `MAIN_DTYPES` of the flash kernels of ROCm/aotriton).
Whether the others are needed there is not known; being exact, they can only cost time.

What goes wrong in every call with a feature is said of the feature, by `lacking`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnplug import Feature, SDPAParams
from attnplug.builtin.gpus import HALF, counts_too_far, cudnn_on, flash_on, lacks_backward
from attnplug.builtin.rewrites import (
    BATCH,
    HEADS,
    QUERIES,
    aligned,
    divisible,
    holds,
    is_aligned,
    starts_aligned,
    with_a_fifth_dimension,
    with_a_mask_of_dense_rows,
    with_a_mask_of_double,
    with_a_mask_of_two_dimensions,
    with_another_query,
    with_dropout_between_steps,
    with_hidden_keys,
    with_positive_scale,
    with_values_of_zero,
)

KINDS = ("cpu", "cuda")
RELEASE = tuple(map(int, torch.__version__.split(".")[:2]))
INT32, UINT32 = 2**31, 2**32
PREFERRED_CUDNN = 91500
"""PyTorch's function prefers a later cuDNN than this on compute capability 9 and 10."""


@dataclass(frozen=True)
class Fault:
    """A call that PyTorch gets wrong.

    Attributes:
        says: what PyTorch does with it.
        seen: the release in which that was seen, and on what.
        device: the device type that it happens on; None for any.
        concerns: whether a call is one of these, given that it is on such a device.
        rewrite: returns the same call, exactly, in a form that PyTorch gets right; None where there is none.
        cut: returns the dimension of the query along which halves of the call are right, or smaller at least; None
            where there is none.
    """

    says: str
    seen: str
    device: str | None
    concerns: Callable[[SDPAParams], bool]
    rewrite: Callable[[SDPAParams], SDPAParams] | None = None
    cut: Callable[[SDPAParams], int | None] | None = None

    @property
    def reason(self) -> str:
        return f"{self.says} (seen in PyTorch {self.seen})"


class Faults:
    """The faults of one function of PyTorch, in the order in which calls are rewritten."""

    def __init__(self, *faults: Fault) -> None:
        self.all = faults
        # By device type, because every call asks, and on the CPU few are left.
        here = {kind: [each for each in faults if each.device in (None, kind)] for kind in KINDS}
        self._rewritten = {kind: tuple(each for each in found if each.rewrite) for kind, found in here.items()}
        self._cut = {kind: tuple(each for each in found if each.cut) for kind, found in here.items()}
        self._declined = {
            kind: tuple(each for each in found if not each.rewrite and not each.cut) for kind, found in here.items()
        }

    def rewritten(self, params: SDPAParams) -> SDPAParams:
        """Return an equivalent call that no fault with a rewrite concerns."""
        for fault in self._rewritten.get(params.query.device.type, ()):
            if fault.concerns(params):
                assert fault.rewrite is not None
                params = fault.rewrite(params)
        return params

    def cut(self, params: SDPAParams) -> int | None:
        """Return the dimension along which a call must be halved, None for nearly all."""
        for fault in self._cut.get(params.query.device.type, ()):
            if fault.concerns(params):
                assert fault.cut is not None
                return fault.cut(params)
        return None

    def reasons(self, params: SDPAParams) -> tuple[str, ...]:
        """Return why a call must not be given to PyTorch: the faults without a rewrite or a cut."""
        found = self._declined.get(params.query.device.type, ())
        return tuple(fault.reason for fault in found if fault.concerns(params))


# Which calls are concerned.


def _is_not_scaled_up(params: SDPAParams) -> bool:
    return params.scale is not None and params.scale <= 0


def _hides_before_scaling(params: SDPAParams) -> bool:
    return params.is_causal and _is_not_scaled_up(params)


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


def _wants_the_gradient_of_the_mask_alone(params: SDPAParams) -> bool:
    tensors = (params.query, params.key, params.value)
    return params.attn_mask is not None and params.needs_grad and not any(tensor.requires_grad for tensor in tensors)


def _has_a_mask_whose_rows_are_not_dense(params: SDPAParams) -> bool:
    mask = params.attn_mask
    return mask is not None and (holds(mask.shape[-1] != params.key.shape[-2]) or holds(mask.stride(-1) != 1))


def _has_gradients_that_cudnn_loses(params: SDPAParams) -> bool:
    if params.attn_mask is None or params.query.dtype not in HALF or not params.needs_grad:
        return False
    capability, version = cudnn_on(params.query.device)
    return capability == (9, 0) and 0 < version < 92600 and holds(params.key.shape[-2] % 128 == 64)


def _decodes_where_cudnn_errs(params: SDPAParams) -> bool:
    if params.query.is_nested or params.query.dtype not in HALF or not holds(params.query.shape[-2] == 1):
        return False
    capability, version = cudnn_on(params.query.device)
    blackwell = capability is not None and capability[0] in (10, 11)
    return blackwell and 91900 <= version <= 92500 and version != 92401


def _asks_cudnn_for_gradients_of_one_query(params: SDPAParams) -> bool:
    query = params.query
    if not _is_dense(query) or query.dtype not in HALF or not params.needs_grad or not holds(query.shape[-2] == 1):
        return False
    capability, version = cudnn_on(query.device)
    return capability == (9, 0) and version > PREFERRED_CUDNN


def _prefers_cudnn(device: torch.device, dtype: torch.dtype) -> bool:
    if dtype not in HALF:
        return False
    capability, version = cudnn_on(device)
    return capability is not None and capability[0] in (9, 10) and version > PREFERRED_CUDNN


def _has_dropout_in_the_steps_of_cudnn(params: SDPAParams) -> bool:
    query = params.query
    return params.dropout > 0 and (params.dropout * 16) % 1 == 0 and _prefers_cudnn(query.device, query.dtype)


def _shares_keys_with_a_query_left_over(params: SDPAParams) -> bool:
    query, key, value = params.query, params.key, params.value
    return (
        _is_dense(query)
        and holds(key.stride(HEADS) == 0)
        and holds(value.stride(HEADS) == 0)
        and holds(query.shape[HEADS] > 1)
        and holds(query.shape[QUERIES] % 32 == 1)  # a block has 32 or 64 queries
        and not _is_for_flash(params)
        and not params.needs_grad  # which takes an lse, and with one the kernel another way
    )


def _has_a_mask_of_far_rows(params: SDPAParams) -> bool:
    mask = params.attn_mask
    if RELEASE >= (2, 13) or mask is None or not _is_dense(params.query):
        return False
    if mask.dim() < 2:
        return False
    rows, padded = mask.shape[-2] - 1, -(-mask.shape[-1] // 16) * 16
    return holds(rows * mask.stride(-2) >= UINT32) or holds(rows * padded >= UINT32)


def _draws_too_often(params: SDPAParams) -> bool:
    query, keys = params.query, params.key.shape[-2]
    if params.dropout <= 0 or not _is_dense(query) or _is_for_flash(params):
        return False
    return holds(query.shape[BATCH] * query.shape[HEADS] * query.shape[QUERIES] * keys >= INT32)


def _draws_too_often_in_one_head(params: SDPAParams) -> bool:
    return _draws_too_often(params) and divisible(params) is None


def _counts_too_far_in_backward(params: SDPAParams) -> bool:
    query = params.query  # of FlashAttention-2, whichever kernel PyTorch then has for it
    if not params.needs_grad or params.attn_mask is not None or query.dtype not in HALF:
        return False
    return _is_dense(query) and counts_too_far(query)


def _is_dense(query: Tensor) -> bool:
    """Whether these are four dimensions, without which PyTorch has its formula alone, or a nested tensor."""
    return not query.is_nested and query.dim() == 4


def _is_for_flash(params: SDPAParams) -> bool:
    """Whether PyTorch has FlashAttention-2 for a dense call, and so does not come to its efficient kernel."""
    query, key, value = params.query, params.key, params.value
    return (
        params.attn_mask is None
        and query.dtype in HALF
        and holds(query.shape[-1] == value.shape[-1])
        and holds(query.shape[-1] <= 256)
        and (not params.is_causal or holds(query.shape[-2] == key.shape[-2]))
        and (capability := flash_on(query.device)) is not None
        and not lacks_backward(capability, params)
    )


def _is_misaligned(params: SDPAParams) -> bool:
    if params.query.is_nested:
        return False
    mask = params.attn_mask
    inputs = is_aligned(params.query) and is_aligned(params.key) and is_aligned(params.value)
    return not inputs or (mask is not None and not starts_aligned(mask))


HIDDEN_BEFORE_SCALED = Fault(
    "PyTorch's flash kernel for the CPU hides keys with -inf before it scales, which a scale of 0 turns into NaN and a "
    "negative one into +inf",
    "2.13.0, CPU",
    "cpu",
    _hides_before_scaling,
    with_positive_scale,
)
ABSENT_BEFORE_SCALED = Fault(
    "PyTorch's CUDA kernels hide the keys that their last tile lacks with -inf before they scale, which a scale of 0 "
    "turns into NaN, and take the largest logit before, beyond which a negative scale puts others",
    "2.11.0, CUDA 13.0",
    "cuda",
    _is_not_scaled_up,
    with_positive_scale,
)
DROPS_EVERYTHING = Fault(
    "PyTorch's CUDA kernels divide by 1 - dropout_p, and give NaN or an error for dropout_p=1",
    "2.11.0, CUDA 13.0",
    "cuda",
    _drops_everything,
    with_values_of_zero,
)
MISALIGNED = Fault(
    "PyTorch's CUDA kernels read 16 bytes at a time, and fault where a tensor or its rows start between",
    "2.11.0, CUDA 13.0",
    "cuda",
    _is_misaligned,
    aligned,
)
TOO_FAR = Fault(
    "PyTorch's flash kernel counts with 32 bits in backward, and faults where all queries have more than 2^31 numbers "
    "(PriorLabs/TabPFN#1184); still so for one causal head of one batch, which cannot be divided",
    "of August 2026, the last of which was 2.13.0",
    "cuda",
    _counts_too_far_in_backward,
    cut=divisible,
)
OF_SDPA = Faults(
    HIDDEN_BEFORE_SCALED,
    ABSENT_BEFORE_SCALED,
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
        with_a_mask_of_double,
    ),
    Fault(
        "PyTorch's function fails for an attn_mask of one dimension",
        "2.13.0, CPU",
        None,
        _has_a_mask_of_one_dimension,
        with_a_mask_of_two_dimensions,
    ),
    Fault(
        "PyTorch computes no lse if attn_mask alone requires a gradient, and its backward reads one (pytorch#148476)",
        "2.6.0 to 2.11.0, CUDA 12.4 to 13.0",
        "cuda",
        _wants_the_gradient_of_the_mask_alone,
    ),
    Fault(
        "PyTorch raises '(*bias): last dimension must be contiguous' for an attn_mask that broadcasts over keys, or "
        "has another last stride than 1",
        "2.11.0, CUDA 13.0",
        "cuda",
        _has_a_mask_whose_rows_are_not_dense,
        with_a_mask_of_dense_rows,
    ),
    Fault(
        "PyTorch's function prefers cuDNN on Hopper, whose backward gives NaN with an attn_mask, 64 keys more than a "
        "multiple of 128, and logits far below zero (pytorch#196678)",
        "2.11.0 to 2.15.0, cuDNN before 9.26",
        "cuda",
        _has_gradients_that_cudnn_loses,
        with_hidden_keys,
    ),
    Fault(
        "PyTorch's function prefers cuDNN on Blackwell, which gets single queries wrong (pytorch#193893)",
        "2.11.0 to 2.13.0, cuDNN 9.19 to 9.25.0",
        "cuda",
        _decodes_where_cudnn_errs,
        with_another_query,
    ),
    Fault(
        "PyTorch's function prefers cuDNN on Hopper, whose backward of a single query gives NaN with logits far below "
        "zero (cudnn-frontend#1072)",
        "2.11.0 to 2.15.0, cuDNN 9.25.1 and 9.26.0",
        "cuda",
        _asks_cudnn_for_gradients_of_one_query,
        with_a_fifth_dimension,
    ),
    Fault(
        "PyTorch's function prefers cuDNN on Hopper and Blackwell for dropout in steps of 1/16, where it gives queries "
        "the same dropout mask",
        "2.11.0, cuDNN 9.19",
        "cuda",
        _has_dropout_in_the_steps_of_cudnn,
        with_dropout_between_steps,
    ),
    Fault(
        "PyTorch's efficient kernel gets a query that is left over wrong where heads share keys by a stride of 0 "
        "(pytorch#191937, pytorch#192138)",
        "2.12.0, CUDA 13.0; 2.13.0, by its source",
        "cuda",
        _shares_keys_with_a_query_left_over,
        with_another_query,
    ),
    Fault(
        "PyTorch's efficient kernel counts the rows of an attn_mask with 32 bits (pytorch#187227)",
        "2.9.0 to 2.12.0",
        "cuda",
        _has_a_mask_of_far_rows,
        cut=lambda params: QUERIES,
    ),
    Fault(
        "PyTorch's efficient kernel counts the draws of dropout of one causal head with 32 bits, and differently in "
        "backward (pytorch#188015, pytorch#192138); PyTorch's formula takes it, in the memory of all logits",
        "2.13.0, by its source",
        "cuda",
        _draws_too_often_in_one_head,
        with_a_fifth_dimension,
    ),
    Fault(
        "PyTorch's efficient kernel counts its draws of dropout with 32 bits, and differently in backward "
        "(pytorch#188015, pytorch#192138)",
        "2.13.0, by its source",
        "cuda",
        _draws_too_often,
        cut=divisible,
    ),
    TOO_FAR,
    MISALIGNED,
)
"""Those of `torch.nn.functional.scaled_dot_product_attention`."""
OF_FLASH = Faults(HIDDEN_BEFORE_SCALED, ABSENT_BEFORE_SCALED, DROPS_EVERYTHING, TOO_FAR, MISALIGNED)
"""Those of `aten::_scaled_dot_product_flash_attention` and its equivalent on the CPU."""


def lacking(device: torch.device, dtype: torch.dtype) -> dict[Feature, str]:
    """Return the features that PyTorch's function gets wrong in every call on such a device, with no way round."""
    if RELEASE >= (2, 12) or not _prefers_cudnn(device, dtype):
        return {}
    return {
        Feature.DROPOUT: "PyTorch's function prefers cuDNN on Hopper and Blackwell, before 2.12 for every dropout, "
        "where it gives queries the same dropout mask (seen in PyTorch 2.11.0, cuDNN 9.19)"
    }
