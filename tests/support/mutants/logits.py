"""Wrong logits: softcap, sinks, ALiBi."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnplug import SDPAParams
from mutants import wrong
from mutants.kernel import INF, Kernel, Sequence


@wrong("check_softcap")
class SoftcapIgnored(Kernel):
    """Declares softcap and does nothing about it."""

    def capped(self, params: SDPAParams, logits: Tensor) -> Tensor:
        return logits

    def cap_derivative(self, params: SDPAParams, capped: Tensor) -> Tensor:
        return torch.ones_like(capped)


@wrong("check_softcap")
class SoftcapWithoutDivision(Kernel):
    """Takes softcap * tanh(logits)."""

    def capped(self, params: SDPAParams, logits: Tensor) -> Tensor:
        return params.softcap * torch.tanh(logits) if params.softcap > 0 else logits


@wrong("check_softcap_comes_before_the_mask")
class SoftcapAfterTheMask(Kernel):
    """Caps the sum of products and mask: -inf becomes -softcap."""

    def capped(self, params: SDPAParams, logits: Tensor) -> Tensor:
        return logits

    def masked(self, params: SDPAParams, one: Sequence, logits: Tensor, start: int, stop: int) -> Tensor:
        return Kernel.capped(self, params, super().masked(params, one, logits, start, stop))


@wrong("check_softcap_comes_before_alibi")
class SoftcapAfterAlibi(Kernel):
    """Caps the sum of products and distances."""

    def capped(self, params: SDPAParams, logits: Tensor) -> Tensor:
        return logits

    def biased(self, params: SDPAParams, one: Sequence, logits: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return Kernel.capped(self, params, super().biased(params, one, logits, i, j))


@wrong("check_softcap_gradients")
class SoftcapWithoutDerivative(Kernel):
    """Forgets the derivative of the cap in backward."""

    def cap_derivative(self, params: SDPAParams, capped: Tensor) -> Tensor:
        return torch.ones_like(capped)


@wrong("check_sinks")
class ScaledSinks(Kernel):
    """Scales the sinks with the logits."""

    def sinks(self, params: SDPAParams, dtype: torch.dtype) -> Tensor:
        return super().sinks(params, dtype) * params.scale


@wrong("check_sinks")
class SinkOfTheFirstHead(Kernel):
    """Gives every head the first head's sink."""

    def sinks(self, params: SDPAParams, dtype: torch.dtype) -> Tensor:
        return super().sinks(params, dtype)[:1].expand(params.sinks.numel(), 1, 1)


@wrong("check_sinks")
class LseWithoutSink(Kernel):
    """Leaves the sink out of lse."""

    def finish(self, params: SDPAParams, one: Sequence, top: Tensor, total: Tensor, summed: Tensor) -> Any:
        out, lse = super().finish(params, one, top, total, summed)
        if params.sinks is None:
            return out, lse
        return out, lse + torch.log1p(-torch.exp(self.sinks(params, lse.dtype)[..., 0] - lse).clamp(max=0.999))


@wrong("check_sinks_are_not_scaled_or_shifted")
class SinkAddedWithoutTheMaximum(Kernel):
    """Adds exp(sink) to a sum from which the maximum was taken out."""

    def with_sinks(self, params: SDPAParams, top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        return top, total

    def finish(self, params: SDPAParams, one: Sequence, top: Tensor, total: Tensor, summed: Tensor) -> Any:
        if params.sinks is not None:
            total = total + torch.exp(self.sinks(params, total.dtype))
        return super().finish(params, one, top, total, summed)


@wrong("check_sinks_of_blind_rows")
class NoSinkInBlindRows(Kernel):
    """Gives -inf as the lse of a row that sees no key, though it has a sink."""

    def attend(self, params: SDPAParams, one: Sequence) -> tuple[Tensor, Tensor]:
        out, lse = super().attend(params, one)
        if params.sinks is None:
            return out, lse
        return out, lse.masked_fill((out == 0).all(-1), -INF)


@wrong("check_sinks_gradient")
class SinksGradientHasTheWrongSign(Kernel):
    """Forgets the minus."""

    def sinks_gradient(self, sink: Tensor, delta: Tensor) -> Tensor:
        return -super().sinks_gradient(sink, delta)


@wrong("check_sinks_gradient")
class SinksGradientOfTheLastSequence(Kernel):
    """Each sequence overwrites the gradient of the one before."""

    def joined_sinks(self, parts: list[Tensor]) -> Tensor:
        return parts[-1]


@wrong("check_gradients_beside_sinks")
class GradientsWithoutTheSinksShare(Kernel):
    """Normalises the probabilities of backward without the sink."""

    def probabilities(self, params: SDPAParams, one: Sequence, lse: Tensor) -> Tensor:
        found = super().probabilities(params, one, lse)
        return found if params.sinks is None else found / found.sum(-1, keepdim=True).clamp(min=1e-30)


@wrong("check_alibi")
class AlibiOneSided(Kernel):
    """Forgets the absolute value: right under a causal mask only."""

    def alibi_distance(self, one: Sequence, i: Tensor, j: Tensor) -> Tensor:
        return i - j


@wrong("check_alibi")
class AlibiAdded(Kernel):
    """Adds the distances instead of taking them off."""

    def alibi_distance(self, one: Sequence, i: Tensor, j: Tensor) -> Tensor:
        return -(i - j).abs()


@wrong("check_alibi_lower_right", "check_varlen_alibi")
class AlibiUpperLeft(Kernel):
    """Counts distances from the upper left, whatever the alignment."""

    def alibi_distance(self, one: Sequence, i: Tensor, j: Tensor) -> Tensor:
        return (i - one.offset - j).abs()


@wrong("check_alibi")
class AlibiStartsAnewInEachBlock(Kernel):
    """Counts key positions from the start of the block."""

    def alibi_distance(self, one: Sequence, i: Tensor, j: Tensor) -> Tensor:
        return (i - (j - j[0])).abs()


@wrong("check_alibi_slopes_of_each_sequence")
class SlopesOfTheFirstSequence(Kernel):
    """Reads the first sequence's slopes for all."""

    def slopes_of(self, params: SDPAParams, b: int) -> Tensor | None:
        return super().slopes_of(params, 0)


@wrong("check_alibi_gradients")
class AlibiForgottenInBackward(Kernel):
    """Makes the probabilities again in backward without the bias."""

    def probabilities(self, params: SDPAParams, one: Sequence, lse: Tensor) -> Tensor:
        one.slopes = None
        return super().probabilities(params, one, lse)


@wrong("check_feature_pairs")
class SoftcapLostWithGroupedHeads(Kernel):
    """Takes another path for grouped heads, which does not know softcap."""

    def capped(self, params: SDPAParams, logits: Tensor) -> Tensor:
        grouped = params.cu_seq_q is None and params.query.shape[1] != params.key.shape[1]
        return logits if grouped else super().capped(params, logits)


@wrong("check_feature_pairs")
class SinksLostUnderACausalMask(Kernel):
    """Takes another path for causal calls, which does not know sinks."""

    def with_sinks(self, params: SDPAParams, top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        return (top, total) if params.is_causal else super().with_sinks(params, top, total)


@wrong("check_feature_pairs")
class AlibiLostInWindows(Kernel):
    """Takes another path for windows, which does not know ALiBi."""

    def slopes_of(self, params: SDPAParams, b: int) -> Tensor | None:
        return super().slopes_of(params, b) if params.window_size == (-1, -1) else None


@wrong("check_feature_triples")
class SinksLostUnderCapAndCausalMask(Kernel):
    """Takes another path for causal calls with softcap, which does not know sinks."""

    def with_sinks(self, params: SDPAParams, top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        lost = params.is_causal and params.softcap > 0
        return (top, total) if lost else super().with_sinks(params, top, total)


@wrong("check_feature_pairs")
class DropoutLostInPackedSequences(Kernel):
    """Takes another path for packed sequences, which does not scale what dropout keeps."""

    def dropout_scale(self, params: SDPAParams) -> float:
        return 1.0 if params.cu_seq_q is not None else super().dropout_scale(params)
