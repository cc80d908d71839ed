"""Wrong masks: attn_mask, causality, windows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnplug import SDPAParams
from mutants import wrong
from mutants.kernel import BLOCK, INF, Kernel, Sequence


@wrong("check_boolean_mask")
class InvertedMask(Kernel):
    """Takes True for hidden."""

    def with_mask(self, params: SDPAParams, logits: Tensor, mask: Tensor) -> Tensor:
        return super().with_mask(params, logits, ~mask if mask.dtype == torch.bool else mask)


@wrong("check_boolean_mask")
class BooleanMaskAdded(Kernel):
    """Adds a boolean mask as 0 and 1."""

    def with_mask(self, params: SDPAParams, logits: Tensor, mask: Tensor) -> Tensor:
        return logits + mask.to(logits.dtype)


@wrong("check_additive_mask")
class ScaledMask(Kernel):
    """Scales the mask together with the products."""

    def with_mask(self, params: SDPAParams, logits: Tensor, mask: Tensor) -> Tensor:
        return super().with_mask(params, logits, mask if mask.dtype == torch.bool else mask * params.scale)


@wrong("check_boolean_mask", "check_additive_mask")
class MaskOfTheFirstHead(Kernel):
    """Reads the mask of the first head for all."""

    def mask_of(self, params: SDPAParams, b: int, keys: int) -> Tensor | None:
        mask = super().mask_of(params, b, keys)
        return None if mask is None else mask[:1]


@wrong("check_boolean_mask_broadcasts", "check_additive_mask_broadcasts")
class MaskOfTheFirstSequence(Kernel):
    """Forgets the batch stride of a mask that has one query for all."""

    def mask_of(self, params: SDPAParams, b: int, keys: int) -> Tensor | None:
        mask = params.attn_mask
        return super().mask_of(params, 0 if mask is not None and mask.shape[2] == 1 else b, keys)


@wrong("check_additive_mask_broadcasts", "check_boolean_mask_broadcasts")
class MaskOfTheFirstQuery(Kernel):
    """Takes a mask with one head for one that has one query too."""

    def mask_of(self, params: SDPAParams, b: int, keys: int) -> Tensor | None:
        mask = super().mask_of(params, b, keys)
        return mask if mask is None or mask.shape[0] > 1 else mask[:, :1]


@wrong("check_additive_minus_infinity")
class MinusInfinityIsClamped(Kernel):
    """Clamps the mask, so that what it hides still counts a little."""

    def with_mask(self, params: SDPAParams, logits: Tensor, mask: Tensor) -> Tensor:
        return super().with_mask(params, logits, mask if mask.dtype == torch.bool else mask.clamp(min=-8))


@wrong("check_mask_gradient_is_summed")
class MaskGradientOfTheFirstHead(Kernel):
    """Writes the gradient of a mask that all heads share from the first head alone."""

    def joined_mask(self, params: SDPAParams, parts: list[Tensor]) -> Tensor:
        gradient = super().joined_mask(params, parts)
        return gradient[:, :1] if params.attn_mask.shape[1] == 1 else gradient


@wrong("check_mask_gradient_is_summed")
class MaskGradientOfTheFirstRow(Kernel):
    """Writes the gradient of a mask that all queries share from the first query alone."""

    def joined_mask(self, params: SDPAParams, parts: list[Tensor]) -> Tensor:
        gradient = super().joined_mask(params, parts)
        return gradient[:, :, :1] if params.attn_mask.shape[2] == 1 else gradient


@wrong("check_mask_gradient")
class MaskGradientIsScaled(Kernel):
    """Returns the gradient of the products for that of the mask."""

    def joined_mask(self, params: SDPAParams, parts: list[Tensor]) -> Tensor:
        return super().joined_mask(params, parts) * params.scale


@wrong("check_causal")
class DiagonalHidden(Kernel):
    """Hides the diagonal: < for <=."""

    def causal(self, i: Tensor, j: Tensor) -> Tensor:
        return j < i


@wrong("check_causal")
class OneKeyTooMany(Kernel):
    """Shows the key after the diagonal."""

    def causal(self, i: Tensor, j: Tensor) -> Tensor:
        return j <= i + 1


@wrong("check_causal")
class DiagonalBlockNotMasked(Kernel):
    """Skips blocks above the diagonal, and forgets to mask those that it crosses."""

    def causal(self, i: Tensor, j: Tensor) -> Tensor:
        return j // BLOCK <= i // BLOCK


@wrong("check_causal_lower_right", "check_window_lower_right", "check_varlen_causal")
class AlwaysUpperLeft(Kernel):
    """Aligns to the upper left, whatever the call says."""

    def offset(self, params: SDPAParams, b: int, queries: int, keys: int) -> int:
        return 0


@wrong("check_causal_upper_left", "check_window_upper_left", "check_alibi_upper_left")
class AlwaysLowerRight(Kernel):
    """Aligns to the lower right, as FlashAttention does, whatever the call says."""

    def offset(self, params: SDPAParams, b: int, queries: int, keys: int) -> int:
        return keys - queries


@wrong("check_causal_lower_right")
class OffsetNeverNegative(Kernel):
    """Clamps the offset at 0: wrong with more queries than keys."""

    def offset(self, params: SDPAParams, b: int, queries: int, keys: int) -> int:
        return max(0, super().offset(params, b, queries, keys))


@wrong("check_causal_gradients")
class CausalForgottenInBackward(Kernel):
    """Makes the probabilities again in backward without the causal mask."""

    def probabilities(self, params: SDPAParams, one: Sequence, lse: Tensor) -> Tensor:
        if not params.is_causal:
            return super().probabilities(params, one, lse)
        logits = self.products(params, one, 0, one.key.shape[1])
        return torch.exp(logits - lse.masked_fill(lse == -INF, INF)[..., None])


class _Window(Kernel):
    def visible(self, params: SDPAParams, i: Tensor, j: Tensor) -> Tensor:
        seen = torch.ones(i.shape[0], j.shape[0], dtype=torch.bool)
        left, right = params.window_size
        if params.is_causal:
            seen &= self.causal(i, j)
        return seen & self.left(i, j, left) & self.right(i, j, right)

    def left(self, i: Tensor, j: Tensor, left: int) -> Tensor:
        return j >= i - left if left >= 0 else j > -1

    def right(self, i: Tensor, j: Tensor, right: int) -> Tensor:
        return j <= i + right if right >= 0 else j > -1


@wrong("check_window")
class WindowLeftIsExclusive(_Window):
    """Counts the query itself among the keys on the left: one key too few."""

    def left(self, i: Tensor, j: Tensor, left: int) -> Tensor:
        return j > i - left if left > 0 else super().left(i, j, left)


@wrong("check_window")
class WindowRightTooWide(_Window):
    """Shows one key too many on the right."""

    def right(self, i: Tensor, j: Tensor, right: int) -> Tensor:
        return super().right(i, j, right + 1 if right >= 0 else right)


@wrong("check_window")
class WindowOfZeroIsOpen(_Window):
    """Takes 0 for an open side."""

    def left(self, i: Tensor, j: Tensor, left: int) -> Tensor:
        return super().left(i, j, left or -1)


@wrong("check_window")
class WindowSidesSwapped(_Window):
    """Swaps left and right."""

    def visible(self, params: SDPAParams, i: Tensor, j: Tensor) -> Tensor:
        left, right = params.window_size
        seen = self.left(i, j, right) & self.right(i, j, left)
        return seen & self.causal(i, j) if params.is_causal else seen


@wrong("check_window")
class WindowBlockSkipped(Kernel):
    """Skips the block that the left edge of the last query's window is in, as if it lay outside."""

    def blocks(self, params: SDPAParams, one: Sequence) -> Iterator[tuple[int, int]]:
        left = params.window_size[0]
        edge = one.offset + one.query.shape[1] - 1 - left
        for start, stop in super().blocks(params, one):
            if not (left > 0 and 0 < start <= edge < stop):
                yield start, stop


@wrong("check_window_gradients")
class WindowForgottenInBackward(Kernel):
    """Makes the probabilities again in backward without the window."""

    def probabilities(self, params: SDPAParams, one: Sequence, lse: Tensor) -> Tensor:
        if params.window_size == (-1, -1):
            return super().probabilities(params, one, lse)
        logits = self.products(params, one, 0, one.key.shape[1])
        return torch.exp(logits - lse.masked_fill(lse == -INF, INF)[..., None])


@wrong("check_causal_window")
class WindowReplacesCausal(_Window):
    """Lets a window's right side take the place of the causal mask."""

    def visible(self, params: SDPAParams, i: Tensor, j: Tensor) -> Tensor:
        left, right = params.window_size
        seen = self.left(i, j, left) & self.right(i, j, right)
        return seen & self.causal(i, j) if params.is_causal and right < 0 else seen
