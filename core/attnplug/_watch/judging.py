"""What a call should have given: by a reference implementation in float64, and by the rule that holds for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnplug._accuracy import Expected, Mistake, Outcome
from attnplug._call.facts import CallFacts
from attnplug._call.prepare import prepare_dense
from attnplug._call.requirements import needs_grad
from attnplug._dispatch.resolver import resolve
from attnplug._errors import GradientError, NoImplementationError
from attnplug._run.autograd import run
from attnplug._run.contract import DIFFERENTIABLE, TENSORS
from attnplug._run.operator import is_watched
from attnplug._run.transforms import is_transformed
from attnplug._selection.selection import Selection
from attnplug._selection.state import start
from attnplug._types import SDPAParams


class NotJudged(Exception):
    """This result cannot be judged; the message says why."""


def unfit(params: SDPAParams) -> str:
    """Return why a call of this kind cannot be judged; empty if it can."""
    query = params.query
    if params.dropout > 0:
        return "dropout: no other implementation draws the same numbers"
    if query.is_nested:
        return "nested tensors"
    if is_watched(query):
        return "a subclass of Tensor, or a dispatch mode, which would see the reference too"
    if is_transformed():
        return "a transform of torch.func"
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return ""


def plain_form(params: SDPAParams) -> SDPAParams:
    """Return a call in the form that kernels know, with tensors that belong to no graph of autograd."""
    given = {name: getattr(params, name) for name in TENSORS}
    params = replace(params, **{name: each.detach() for name, each in given.items() if each is not None})
    return params if params.is_varlen else prepare_dense(params)[0]


class Judge:
    """Holds calls against one reference.

    Args:
        reference: the name of the implementation that computes what is right.
    """

    def __init__(self, reference: str) -> None:
        self.reference = reference

    def of_result(self, params: SDPAParams, out: Tensor, lse: Tensor | None, quantized: bool) -> list[Mistake]:
        """Return what is wrong with the result of a call in the form that kernels know.

        Raises:
            NotJudged: the reference does not take such a call, or the rule says nothing of such numbers.
        """
        rows = params.query.shape[:-1]
        out = out.detach().reshape(*rows, params.value.shape[-1])
        lse = None if lse is None else lse.detach().reshape(params.lse_shape)
        expected = self._expected(params, lse is not None)
        return _mistakes(expected, Outcome(out, lse), ["out", *([] if lse is None else ["lse"])], quantized)

    def of_gradients(
        self,
        params: SDPAParams,
        gradients: dict[str, Tensor],
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        quantized: bool,
    ) -> list[Mistake]:
        """Return what is wrong with the gradients of a call, given those of its results.

        Raises:
            NotJudged: as `of_result`; or a gradient was summed over dimensions that the call broadcasts.
        """
        shape = (*params.query.shape[:-1], params.value.shape[-1])
        grad_out = params.query.new_zeros(shape) if grad_out is None else grad_out.detach().reshape(shape)
        grad_lse = None if grad_lse is None else grad_lse.detach().reshape(params.lse_shape)
        found = {}
        for name, gradient in gradients.items():
            tensor = getattr(params, name)
            if gradient.numel() != tensor.numel():
                raise NotJudged(f"the gradient of {name} is summed over dimensions that are broadcast")
            found[name] = gradient.detach().reshape(tensor.shape)
        expected = self._expected(params, grad_lse is not None, tuple(found), grad_out, grad_lse)
        return _mistakes(expected, Outcome(grad_out, None, found), list(found), quantized)

    def _expected(
        self,
        params: SDPAParams,
        lse: bool,
        gradients: tuple[str, ...] = (),
        grad_out: Tensor | None = None,
        grad_lse: Tensor | None = None,
    ) -> Expected:
        arguments = {item.name: getattr(params, item.name) for item in fields(params)}
        reference = partial(self._compute, params, lse)
        return Expected(arguments, gradients, grad_out, grad_lse, reference=reference)

    def _compute(self, params: SDPAParams, lse: bool, arguments: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Run the reference in float64."""
        wide = {
            name: each.double()
            for name in (*DIFFERENTIABLE, "alibi_slopes")
            if (each := arguments[name]) is not None and each.is_floating_point()
        }
        params = replace(params, **wide, return_lse=lse)
        facts = CallFacts.of(params)
        assert facts is not None, params
        try:
            decision = resolve(start(), Selection(impl=self.reference), facts, params)
        except NoImplementationError as error:
            reasons = "; ".join(error.reasons.get(self.reference, ()))
            raise NotJudged(f"{self.reference} does not take such a call in float64: {reasons}") from None
        return run(decision.entry, params, needs_grad(facts))


def _mistakes(expected: Expected, outcome: Outcome, names: Sequence[str], quantized: bool) -> list[Mistake]:
    try:
        found = [expected.mistake(outcome, name, quantized) for name in names]
    except ValueError as error:  # the formula itself overflows
        raise NotJudged(str(error)) from None
    except GradientError as error:
        raise NotJudged(f"the reference: {error}") from None
    return [each for each in found if each is not None]
