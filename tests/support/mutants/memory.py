"""Wrong memory: strides, offsets, and what lies beside a tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnplug import SDPAParams
from mutants import wrong
from mutants.kernel import BLOCK, Kernel

NUMBERS = ("cu_seq_q", "cu_seq_k", "seqused_k", "block_table", "sinks", "alibi_slopes")


def as_if_contiguous(tensor: Tensor, offset: int) -> Tensor:
    """Return what a kernel reads that takes a tensor for contiguous; past the end of memory it starts anew."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    flat = tensor.as_strided((elements,), (1,), 0)
    return flat[(torch.arange(tensor.numel()) + offset) % elements].reshape(tensor.shape)


def with_numbers(params: SDPAParams, read: Callable[[Tensor], Tensor]) -> SDPAParams:
    """Return the call with lengths, pages, sinks and slopes as `read` reads them."""
    given = {name: tensor for name in NUMBERS if (tensor := getattr(params, name)) is not None}
    return replace(params, **{name: read(tensor) for name, tensor in given.items()})


@wrong("check_transposed_inputs", "check_strided_inputs", "check_expanded_inputs")
class TakesInputsForContiguous(Kernel):
    """Ignores strides."""

    def views(self, params: SDPAParams) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (as_if_contiguous(tensor, tensor.storage_offset()) for tensor in super().views(params))
        return query, key, value


@wrong("check_strided_inputs")
class TakesHeadSizesForDense(Kernel):
    """Uses all strides but the last, which it takes for 1."""

    def views(self, params: SDPAParams) -> tuple[Tensor, Tensor, Tensor]:
        def dense(tensor: Tensor) -> Tensor:
            return tensor.as_strided(tensor.shape, (*tensor.stride()[:-1], 1), tensor.storage_offset())

        query, key, value = (dense(tensor) if tensor.stride(-1) == 2 else tensor for tensor in super().views(params))
        return query, key, value


@wrong("check_offset_inputs", "check_misaligned_inputs")
class IgnoresTheOffset(Kernel):
    """Starts to read where the memory starts."""

    def views(self, params: SDPAParams) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (
            as_if_contiguous(tensor, 0) if tensor.is_contiguous() else tensor for tensor in super().views(params)
        )
        return query, key, value


@wrong("check_misaligned_inputs")
class AlignsAddressesDown(Kernel):
    """Loads sixteen bytes at a time, from the next lower address that is a multiple of sixteen."""

    def views(self, params: SDPAParams) -> tuple[Tensor, Tensor, Tensor]:
        def aligned(tensor: Tensor) -> Tensor:
            return as_if_contiguous(tensor, tensor.storage_offset() // 4 * 4) if tensor.is_contiguous() else tensor

        query, key, value = (aligned(tensor) for tensor in super().views(params))
        return query, key, value


@wrong("check_strided_masks", "check_strided_boolean_masks")
class TakesMasksForContiguous(Kernel):
    """Ignores the strides of the mask."""

    def mask_of(self, params: SDPAParams, b: int, keys: int) -> Tensor | None:
        mask = params.attn_mask
        if mask is not None:
            params = replace(params, attn_mask=as_if_contiguous(mask, mask.storage_offset()))
        return super().mask_of(params, b, keys)


STRIDED_NUMBERS = (
    "check_strided_varlen_lengths",
    "check_strided_seqused_k",
    "check_strided_block_tables",
    "check_strided_sinks",
    "check_strided_alibi_slopes",
)


@wrong(*STRIDED_NUMBERS)
class TakesNumbersForContiguous(Kernel):
    """Ignores the strides of lengths, pages, sinks and slopes."""

    def forward(self, params: SDPAParams) -> tuple[Any, ...]:
        return super().forward(with_numbers(params, lambda tensor: as_if_contiguous(tensor, tensor.storage_offset())))


@wrong(*STRIDED_NUMBERS)
class AlignsAddressesOfNumbersDown(Kernel):
    """Loads four lengths, pages, sinks or slopes at a time, from the next lower multiple of sixteen bytes."""

    def forward(self, params: SDPAParams) -> tuple[Any, ...]:
        def aligned(tensor: Tensor) -> Tensor:
            return as_if_contiguous(tensor, tensor.storage_offset() // 4 * 4) if tensor.is_contiguous() else tensor

        return super().forward(with_numbers(params, aligned))


@wrong("check_strided_block_tables", "check_strided_alibi_slopes")
class TakesRowsOfNumbersForDense(Kernel):
    """Uses the last stride of pages and slopes, and takes their rows to follow each other."""

    def forward(self, params: SDPAParams) -> tuple[Any, ...]:
        def dense(tensor: Tensor) -> Tensor:
            step = tensor.stride(-1)
            strides = (tensor.shape[-1] * step, step)
            return tensor.as_strided(tensor.shape, strides, tensor.storage_offset()) if tensor.dim() == 2 else tensor

        return super().forward(with_numbers(params, dense))


@wrong("check_strided_varlen_lengths")
class TakesLengthsForContiguousInBackward(Kernel):
    """Ignores the strides of lengths in backward alone."""

    def backward(self, params: SDPAParams, *given: Any) -> tuple[Any, ...]:
        misread = with_numbers(params, lambda tensor: as_if_contiguous(tensor, tensor.storage_offset()))
        return super().backward(misread, *given)


@wrong("check_nothing_outside_is_read")
class ReadsWholeTiles(Kernel):
    """Reads a whole tile of values past the end, with weights of 0, which NaN survives."""

    def tensors(self, params: SDPAParams, b: int) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().tensors(params, b)
        if params.cu_seq_q is not None or params.seqused_k is not None:
            return query, key, value
        base, last = params.value, params.value[b, :, -1:]
        after = last.storage_offset() + base.stride(2)
        end = after + (last.shape[0] - 1) * base.stride(1) + (last.shape[2] - 1) * base.stride(3)
        if value.shape[1] % BLOCK and end < base.untyped_storage().nbytes() // base.element_size():
            beyond = base.as_strided(last.shape, last.stride(), after)
            value = value + beyond * 0
        return query, key, value


@wrong("check_nothing_outside_is_written")
class WritesWholeTiles(Kernel):
    """Stores a whole tile of rows, past the end of out, wherever there is memory."""

    def forward(self, params: SDPAParams) -> tuple[Any, ...]:
        returned = super().forward(params)
        out = returned[0]
        end = out.storage_offset() + out.numel()
        if out.untyped_storage().nbytes() // out.element_size() >= end + out.shape[-1]:
            out.as_strided((out.shape[-1],), (1,), end).zero_()
        return returned


@wrong("check_nothing_outside_is_written")
class WritesGradientsPastTheEnd(Kernel):
    """Stores one row too many of the gradient of key."""

    def backward(self, params: SDPAParams, *given: Any) -> tuple[Any, ...]:
        query, key, *rest = super().backward(params, *given)
        out = torch.empty(key.shape, dtype=key.dtype).copy_(key)
        end = out.storage_offset() + out.numel()
        if out.untyped_storage().nbytes() // out.element_size() > end:
            out.as_strided((1,), (1,), end).zero_()
        return (query, out, *rest)


@wrong("check_outputs_are_fully_written")
class LeavesBlindRowsUnwritten(Kernel):
    """Returns early for rows that see no key, and never writes them."""

    def store(self, params: SDPAParams, b: int, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        if self.used(params, b) > 0:
            super().store(params, b, out, lse, part, part_lse)
        else:
            lse[..., : self.rows(params, b)[1] if params.cu_seq_q is not None else None] *= 1


@wrong("check_outputs_are_fully_written")
class AddsToGradientsOfNothing(Kernel):
    """Accumulates the gradient of query in memory that was never set to 0."""

    def backward(self, params: SDPAParams, *given: Any) -> tuple[Any, ...]:
        query, *rest = super().backward(params, *given)
        memory = torch.empty(query.shape, dtype=query.dtype)
        return (query + torch.where(memory.isnan(), memory, 0), *rest)


@wrong("check_inputs_are_unchanged")
class ScalesTheQueryInPlace(Kernel):
    """Scales the query where it is, and scales it back."""

    def forward(self, params: SDPAParams) -> tuple[Any, ...]:
        returned = super().forward(params)
        with torch.no_grad():
            params.query.detach().mul_(1.1).div_(1.1)
        return returned


@wrong("check_inputs_are_unchanged")
class MasksInPlace(Kernel):
    """Writes the causal mask, or anything, into the caller's mask."""

    def forward(self, params: SDPAParams) -> tuple[Any, ...]:
        returned = super().forward(params)
        if params.attn_mask is not None:
            params.attn_mask.detach()[..., -1] = 0
        return returned


@wrong("check_inputs_are_unchanged")
class InvertsABooleanMask(Kernel):
    """Makes of a boolean mask, where it is, one whose True hides."""

    def forward(self, params: SDPAParams) -> tuple[Any, ...]:
        returned = super().forward(params)
        if params.attn_mask is not None and params.attn_mask.dtype is torch.bool:
            params.attn_mask.logical_not_()
        return returned


@wrong("check_inputs_are_unchanged")
class ClearsTheGradientOfOut(Kernel):
    """Multiplies the gradient of out where it is."""

    def backward(self, params: SDPAParams, grad_out: Tensor, *given: Any) -> tuple[Any, ...]:
        returned = super().backward(params, grad_out, *given)
        grad_out.mul_(0.5)
        return returned


@wrong("check_nothing_outside_is_read")
class ReadsTheRowBefore(Kernel):
    """Prefetches the row before the first, with a weight of 0."""

    def tensors(self, params: SDPAParams, b: int) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().tensors(params, b)
        before = params.key.storage_offset() - 1
        if params.cu_seq_q is None and before >= 0:
            key = key + params.key.as_strided((1,), (1,), before) * 0
        return query, key, value
