"""Wrong sums: the online softmax, its blocks, and lse."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attnplug import SDPAParams
from mutants import wrong
from mutants.kernel import BLOCK, INF, Kernel, Sequence, finite


@wrong("check_values", "check_lse")
class MissingScale(Kernel):
    """Forgets to scale the products."""

    def scale(self, params: SDPAParams) -> float:
        return 1.0


@wrong("check_scale")
class DefaultScale(Kernel):
    """Always scales by 1 / sqrt(E), whatever the call says."""

    def scale(self, params: SDPAParams) -> float:
        return float(params.query.shape[-1] ** -0.5)


@wrong("check_scale")
class ScaleOfZeroIsNone(Kernel):
    """Writes `scale or default`, so that a scale of 0 is the default."""

    def scale(self, params: SDPAParams) -> float:
        return float(params.scale or params.query.shape[-1] ** -0.5)


@wrong("check_large_values", "check_very_negative_logits")
class NoMaximum(Kernel):
    """Takes the exponential of bare logits."""

    def maximum(self, top: Tensor, logits: Tensor) -> Tensor:
        return torch.where(torch.maximum(top, logits.amax(-1, keepdim=True)) == -INF, -INF, 0.0)


@wrong("check_growing_logits")
class StaleAccumulator(Kernel):
    """Rescales the sum of weights but not the accumulated values when the maximum rises."""

    def next_sum(self, summed: Tensor, rescale: Tensor, added: Tensor) -> Tensor:
        return summed + added


@wrong("check_growing_logits")
class StaleTotal(Kernel):
    """Rescales the accumulated values but not the sum of weights."""

    def next_total(self, total: Tensor, rescale: Tensor, weights: Tensor) -> Tensor:
        return total + weights.sum(-1, keepdim=True)


@wrong("check_shrinking_logits", "check_growing_logits")
class MaximumOfTheBlock(Kernel):
    """Forgets what was summed before: rescales by the block's own maximum, at most by 1."""

    def next_sum(self, summed: Tensor, rescale: Tensor, added: Tensor) -> Tensor:
        return added

    def next_total(self, total: Tensor, rescale: Tensor, weights: Tensor) -> Tensor:
        return weights.sum(-1, keepdim=True)


@wrong("check_tail_blocks")
class TailNotMasked(Kernel):
    """Fills the last block of keys with zeros, which then take part with logits of 0."""

    def next_total(self, total: Tensor, rescale: Tensor, weights: Tensor) -> Tensor:
        padding = -weights.shape[-1] % BLOCK
        return super().next_total(total, rescale, weights) + padding * 0.01


@wrong("check_tail_blocks")
class TailForgotten(Kernel):
    """Rounds the number of blocks down: keys past the last whole block are left out."""

    def blocks(self, params: SDPAParams, one: Sequence) -> Iterator[tuple[int, int]]:
        keys = one.key.shape[1]
        for start in range(0, max(1, keys // BLOCK) * BLOCK, BLOCK):
            yield start, min(start + BLOCK, keys)


@wrong("check_tail_blocks")
class LastKeyForgotten(Kernel):
    """Compares with < where it must be <=, in the last block only."""

    def blocks(self, params: SDPAParams, one: Sequence) -> Iterator[tuple[int, int]]:
        for start, stop in super().blocks(params, one):
            last = stop == one.key.shape[1] and stop % BLOCK and stop - start > 1
            yield start, stop - 1 if last else stop


@wrong("check_head_sizes")
class HeadSizeRoundedDown(Kernel):
    """Loads head sizes in steps of 16 and forgets the rest."""

    def products(self, params: SDPAParams, one: Sequence, start: int, stop: int) -> Tensor:
        index, size = self.kv_heads(one.query.shape[0], one.key.shape[0]), one.query.shape[-1] // 16 * 16 or 16
        return one.query[..., :size] @ one.key[index, start:stop, :size].mT * self.scale(params)


@wrong("check_value_head_size")
class ValueHeadSizeOfQuery(Kernel):
    """Accumulates only as many columns of value as the query has."""

    def finish(self, params: SDPAParams, one: Sequence, top: Tensor, total: Tensor, summed: Tensor) -> Any:
        summed = summed.clone()
        summed[..., one.query.shape[-1] :] = 0
        return super().finish(params, one, top, total, summed)


@wrong("check_batches_and_heads")
class FirstSequenceOfKeys(Kernel):
    """Forgets the batch stride of the keys."""

    def tensors(self, params: SDPAParams, b: int) -> tuple[Tensor, Tensor, Tensor]:
        query, _, value = super().tensors(params, b)
        return query, super().tensors(params, 0)[1], value


@wrong("check_values")
class LowPrecisionProducts(Kernel):
    """Multiplies float32 inputs in bfloat16, or TF32, unasked."""

    def products(self, params: SDPAParams, one: Sequence, start: int, stop: int) -> Tensor:
        return super().products(params, one, start, stop).bfloat16().to(one.query.dtype)


@wrong("check_exact_selection", dtype="float16")
class CorruptProduct(Kernel):
    """One column of the second product is off by one unit, as a miscompiled register operand makes it."""

    def weighted_values(self, one: Sequence, weights: Tensor, start: int, stop: int) -> Tensor:
        added = super().weighted_values(one, weights, start, stop)
        return added + torch.nn.functional.one_hot(torch.tensor(3), added.shape[-1]) * 0.02


@wrong("check_lse")
class LseInBaseTwo(Kernel):
    """Computes with exp2, and forgets to convert lse back."""

    def lse(self, params: SDPAParams, top: Tensor, total: Tensor) -> Tensor:
        return super().lse(params, top, total) / torch.log(torch.tensor(2.0))

    def probabilities(self, params: SDPAParams, one: Sequence, lse: Tensor) -> Tensor:
        return super().probabilities(params, one, lse * torch.log(torch.tensor(2.0)))


@wrong("check_lse")
class LseWithoutMaximum(Kernel):
    """Returns the logarithm of the sum, without the maximum that was taken out of it."""

    def lse(self, params: SDPAParams, top: Tensor, total: Tensor) -> Tensor:
        return torch.log(total)


@wrong("check_lse")
class LseInHalfPrecision(Kernel):
    """Rounds lse to half precision on the way."""

    def lse(self, params: SDPAParams, top: Tensor, total: Tensor) -> Tensor:
        return super().lse(params, top, total).bfloat16().to(top.dtype)


@wrong("check_rows_hidden_by_a_boolean_mask", "check_rows_before_the_first_key")
class LseOfBlindRowsIsZero(Kernel):
    """Writes 0 as the lse of a row that sees nothing."""

    def attend(self, params: SDPAParams, one: Sequence) -> tuple[Tensor, Tensor]:
        out, lse = super().attend(params, one)
        return out, lse.masked_fill(lse == -INF, 0)


@wrong("check_rows_hidden_by_an_additive_mask", "check_rows_hidden_by_a_boolean_mask", "check_rows_past_the_window")
class BlindRowsAreNan(Kernel):
    """Subtracts -inf from -inf in a row that sees nothing."""

    def finish(self, params: SDPAParams, one: Sequence, top: Tensor, total: Tensor, summed: Tensor) -> Any:
        return summed / total + (top - top), (top - top + finite(top) + torch.log(total))[..., 0]


@wrong("check_rows_hidden_by_a_boolean_mask", "check_rows_before_the_first_key", "check_rows_before_the_window")
class BlindRowsAverage(Kernel):
    """Hides with a large negative number: a row that sees nothing is then the mean of all values."""

    def logits(self, params: SDPAParams, one: Sequence, start: int, stop: int) -> Tensor:
        return super().logits(params, one, start, stop).clamp(min=-1e30)


@wrong("check_growing_logits")
class LastKeyOfBlocksLost(Kernel):
    """The last key of each block but the last does not reach the sum of values."""

    def weighted_values(self, one: Sequence, weights: Tensor, start: int, stop: int) -> Tensor:
        if stop < one.key.shape[1]:
            weights = weights.clone()
            weights[..., -1] = 0
        return super().weighted_values(one, weights, start, stop)


@wrong("check_values_of_long_sequences")
class RoomForSoManyBlocks(Kernel):
    """Has room for the maxima of 128 blocks, and leaves out the keys of all others."""

    def blocks(self, params: SDPAParams, one: Sequence) -> Iterator[tuple[int, int]]:
        yield from itertools.islice(super().blocks(params, one), 128)
