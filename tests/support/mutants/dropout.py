"""Wrong dropout."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from attnplug import SDPAParams
from mutants import wrong
from mutants.kernel import Kernel, Sequence


@wrong("check_dropout_scales_what_it_keeps")
class Unscaled(Kernel):
    """Does not scale what it keeps."""

    def dropout_scale(self, params: SDPAParams) -> float:
        return 1.0


@wrong("check_dropout_probability")
class KeepsWhatItShouldDrop(Kernel):
    """Keeps with the probability with which it should drop."""

    def dropout_factors(self, params: SDPAParams, seed: Tensor, b: int, shape: tuple[int, int, int]) -> Tensor:
        kept = super().dropout_factors(params, seed, b, shape) > 0
        return ~kept * self.dropout_scale(params)


@wrong("check_dropout_is_independent")
class SameMaskForAllSequences(Kernel):
    """Leaves the sequence out of the random numbers' position."""

    def dropout_factors(self, params: SDPAParams, seed: Tensor, b: int, shape: tuple[int, int, int]) -> Tensor:
        return super().dropout_factors(params, seed, 0, shape)


@wrong("check_dropout_is_independent", "check_dropout_of_grouped_heads")
class SameMaskForAllHeads(Kernel):
    """Leaves the head out of the random numbers' position."""

    def dropout_factors(self, params: SDPAParams, seed: Tensor, b: int, shape: tuple[int, int, int]) -> Tensor:
        return super().dropout_factors(params, seed, b, shape)[:1].expand(shape)


@wrong("check_dropout_is_independent")
class SameMaskForAllQueries(Kernel):
    """Drops whole keys: one draw for all queries."""

    def dropout_factors(self, params: SDPAParams, seed: Tensor, b: int, shape: tuple[int, int, int]) -> Tensor:
        return super().dropout_factors(params, seed, b, shape)[:, :1].expand(shape)


@wrong("check_dropout_follows_the_seed", "check_dropout_mask_of_backward")
class RedrawnInBackward(Kernel):
    """Draws a new mask in backward."""

    def dropout_factors(self, params: SDPAParams, seed: Tensor, b: int, shape: tuple[int, int, int]) -> Tensor:
        return super().dropout_factors(params, torch.tensor(random.getrandbits(40)), b, shape)


@wrong("check_dropout_mask_survives_other_draws")
class RedrawnFromTheGenerator(Kernel):
    """Reads the generator's seed in backward, instead of saving it in forward."""

    def backward(self, params: SDPAParams, *given: Any) -> tuple[Any, ...]:
        if params.dropout > 0:
            given = (*given[:-1], self.draw_seed(params))
        return super().backward(params, *given)

    def draw_seed(self, params: SDPAParams) -> Tensor | None:
        return torch.tensor(torch.initial_seed() % 2**40) if params.dropout > 0 else None


@wrong("check_dropout_follows_the_seed")
class ConstantSeed(Kernel):
    """Uses one seed for all calls."""

    def draw_seed(self, params: SDPAParams) -> Tensor | None:
        return torch.tensor(42) if params.dropout > 0 else None


@wrong("check_dropout_follows_the_seed")
class SeedFromElsewhere(Kernel):
    """Draws its seed from a generator that torch.manual_seed does not set."""

    def draw_seed(self, params: SDPAParams) -> Tensor | None:
        return torch.tensor(random.getrandbits(40)) if params.dropout > 0 else None


@wrong("check_dropout_scales_what_it_keeps", "check_dropout_leaves_lse_alone")
class DropsBeforeTheSum(Kernel):
    """Drops weights before they are summed: the rest then adds up to 1."""

    def weights_for_total(self, one: Sequence, weights: Tensor, start: int, stop: int) -> Tensor:
        return weights if one.factors is None else weights * one.factors[..., start:stop]


@wrong("check_dropout_of_everything")
class NothingLeftIsNan(Kernel):
    """Divides by 1 - p, which may be 0."""

    def dropout_scale(self, params: SDPAParams) -> float:
        return 1 / (1 - params.dropout) if params.dropout < 1 else float("inf")


@wrong("check_dropout_gradients")
class ForgottenInTheGradientOfWeights(Kernel):
    """Applies the mask to the gradient of value only."""

    def through_dropout(self, one: Sequence, grad_weights: Tensor) -> Tensor:
        return grad_weights


@wrong("check_dropout_under_a_causal_mask")
class UnscaledUnderACausalMask(Kernel):
    """Does not scale what it keeps, in the path for causal calls only."""

    def dropout_scale(self, params: SDPAParams) -> float:
        return 1.0 if params.is_causal else super().dropout_scale(params)
