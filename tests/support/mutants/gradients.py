"""Wrong gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnplug import SDPAParams
from mutants import wrong
from mutants.kernel import INF, Kernel, Sequence


@wrong("check_gradients", "check_gradcheck", dtype="float64")
class KeyAndValueSwapped(Kernel):
    """Returns the gradients of key and value in the wrong order."""

    def backward(self, params: SDPAParams, *given: Any) -> tuple[Any, ...]:
        query, key, value, *rest = super().backward(params, *given)
        return (query, value, key, *rest) if key.shape == value.shape else (query, key, value, *rest)


@wrong("check_gradients")
class Unscaled(Kernel):
    """Forgets the scale in the gradients of query and key."""

    def scaled_gradient(self, params: SDPAParams, grad_logits: Tensor) -> Tensor:
        return grad_logits


@wrong("check_gradients")
class NoDelta(Kernel):
    """Forgets to take off the row's sum of gradients times probabilities."""

    def delta(self, grad_out: Tensor, out: Tensor) -> Tensor:
        return torch.zeros_like(super().delta(grad_out, out))


@wrong("check_gradients_of_rising_logits")
class ProbabilitiesOfTheLastMaximum(Kernel):
    """Normalises backward's probabilities with the maximum only, as if every row's sum were that of its end."""

    def probabilities(self, params: SDPAParams, one: Sequence, lse: Tensor) -> Tensor:
        logits = self.logits(params, one, 0, one.key.shape[1])
        last = torch.logsumexp(logits[..., -32:], -1, keepdim=True)
        early = torch.logsumexp(logits[..., :-32], -1, keepdim=True) if logits.shape[-1] > 32 else -INF
        total = torch.logaddexp(last, torch.as_tensor(early)).clamp(min=-1e30)
        return torch.exp(logits - total + 1e-3 * (last > early))


@wrong("check_gradient_from_an_expanded_tensor")
class ContiguousStart(Kernel):
    """Takes the gradient of out for contiguous."""

    def backward(self, params: SDPAParams, grad_out: Tensor, *given: Any) -> tuple[Any, ...]:
        elements = grad_out.untyped_storage().nbytes() // grad_out.element_size()
        flat = grad_out.as_strided((elements,), (1,), 0)
        wrapped = flat[torch.arange(grad_out.numel()) % elements].reshape(grad_out.shape)
        return super().backward(params, wrapped, *given)


@wrong("check_each_gradient_alone")
class KeysNeedQueries(Kernel):
    """Skips the gradients of key and value when that of query is not wanted."""

    def backward(self, params: SDPAParams, *given: Any) -> tuple[Any, ...]:
        query, key, value, *rest = super().backward(params, *given)
        wanted = 1.0 if params.query.requires_grad else 0.0
        return (query, key * wanted, value * wanted, *rest)


@wrong("check_rows_hidden_by_a_boolean_mask", "check_rows_before_the_first_key")
class BlindRowsHaveNanGradients(Kernel):
    """Subtracts an lse of -inf from logits of -inf in backward."""

    def probabilities(self, params: SDPAParams, one: Sequence, lse: Tensor) -> Tensor:
        return torch.exp(self.logits(params, one, 0, one.key.shape[1]) - lse[..., None])


@wrong("check_rows_hidden_by_an_additive_mask", "check_mask_gradient")
class BlindRowsHaveGradients(Kernel):
    """Takes a row that sees nothing for one that sees all keys alike, in backward only."""

    def probabilities(self, params: SDPAParams, one: Sequence, lse: Tensor) -> Tensor:
        found = super().probabilities(params, one, lse)
        return torch.where((lse == -INF)[..., None], 1 / found.shape[-1], found)

    def attend_backward(self, params: SDPAParams, one: Sequence, grad_out: Tensor, out: Tensor, *lses: Any) -> Any:
        found = super().attend_backward(params, one, grad_out, out, *lses)
        blind = (lses[1] == -INF)[..., None]
        weights = grad_out.masked_fill(~blind, 0) @ one.value[self.kv_heads(len(out), len(one.value))].mT
        found["mask"] = found["mask"] + weights / weights.shape[-1]
        found["query"] = found["query"] + weights @ one.key[self.kv_heads(len(out), len(one.key))]
        return found


@wrong("check_lse_gradient")
class LseGradientIgnored(Kernel):
    """Declares gradients through lse and ignores them."""

    def with_lse_gradient(self, delta: Tensor, grad_lse: Tensor) -> Tensor:
        return delta


@wrong("check_lse_gradient", "check_lse_gradient_of_sinks")
class LseGradientHasTheWrongSign(Kernel):
    """Adds where it must subtract."""

    def with_lse_gradient(self, delta: Tensor, grad_lse: Tensor) -> Tensor:
        return delta + grad_lse


@wrong("check_lse_gradient_of_blind_rows")
class LseGradientOfBlindRows(Kernel):
    """Passes the gradient of an lse of -inf on to query and key."""

    def attend_backward(
        self, params: SDPAParams, one: Sequence, grad_out: Tensor, out: Tensor, grad_lse: Tensor | None, lse: Any
    ) -> Any:
        found = super().attend_backward(params, one, grad_out, out, grad_lse, lse)
        if grad_lse is not None:
            through = (grad_lse * torch.exp(0 * lse)).masked_fill(lse != -INF, 0)
            found["query"] = found["query"] + through[..., None]
        return found


@wrong("check_second_derivatives", dtype="float64")
class SecondDerivativesCutOff(Kernel):
    """Detaches the probabilities in backward, and declares second derivatives."""

    def probabilities(self, params: SDPAParams, one: Sequence, lse: Tensor) -> Tensor:
        return super().probabilities(params, one, lse).detach()


@wrong("check_gradcheck", "check_gradients", dtype="float64")
class SlightlyWrong(Kernel):
    """Gradients a hundredth too large, as an approximated constant makes them."""

    def joined(self, params: SDPAParams, name: str, parts: list[Tensor]) -> Tensor:
        return super().joined(params, name, [part * 1.01 for part in parts])


@wrong("check_gradients_of_long_sequences")
class SumsOverTheFirstQueries(Kernel):
    """Gives one program all queries of a key, and stops at 1024 of them."""

    def attend_backward(self, params: SDPAParams, one: Sequence, grad_out: Tensor, *given: Any) -> Any:
        found = super().attend_backward(params, one, grad_out, *given)
        if grad_out.shape[1] > 1024:
            grad_out = grad_out.clone()
            grad_out[:, 1024:] = 0
            found["value"] = super().attend_backward(params, one, grad_out, *given)["value"]
        return found
