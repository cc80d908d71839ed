"""A result held against the contract's rule, and what is told where it breaks it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

import attnplug
from attnplug._accuracy import Expected, Outcome
from attnplug._arguments import as_dict, expect
from attnplug._errors import did_you_mean
from attnplug.testing._failure import CheckFailure, failure
from attnplug.testing._fields import Fields
from attnplug.testing._hints import hint
from attnplug.testing._inputs import Inputs

_ARGUMENTS = frozenset(
    name
    for function in (attnplug.scaled_dot_product_attention, attnplug.varlen_attn)
    for name in inspect.signature(function).parameters
)


def expected(call: Fields, inputs: Inputs, factors: Tensor | None = None) -> Expected:
    """Return what the call should give; `factors` are what dropout multiplied the probabilities with."""
    grad_lse = inputs.grad_lse if call.lse_gradient else None
    return Expected(inputs.arguments, call.gradients, inputs.grad_out, grad_lse, factors)


def assert_right(
    arguments: Mapping[str, Any],
    out: Tensor,
    lse: Tensor | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    *,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
    quantized: bool = False,
) -> None:
    """Assert that what a call returned is right, by the rule that applies to every implementation.

    Args:
        arguments: of `attnplug.scaled_dot_product_attention`, with tensors of four dimensions, or of
            `attnplug.varlen_attn`, by name; without dropout.
        out: what the call returned.
        lse: its logsumexp, if that is to be compared.
        gradients: by the name of the argument.
        grad_out: the gradient of out that they were computed from.
        grad_lse: the same of lse, if lse was part of the loss.
        quantized: whether the kernel quantizes its inputs, so that only its norm of errors is bounded.

    Raises:
        CheckFailure: something is further from the formula than the rule allows.
        TypeError, ValueError: an argument is wrong; the message names it.

    Examples:
        >>> import torch, attnplug
        >>> from attnplug.testing import assert_right
        >>> query = torch.randn(1, 2, 4, 8)
        >>> assert_right(dict(query=query, key=query, value=query), attnplug.scaled_dot_product_attention(*[query] * 3))
    """
    given = as_dict("arguments", arguments, "arguments of a call, by name")
    for name in given:
        if name not in _ARGUMENTS:
            raise ValueError(f"arguments: no argument {name!r}{did_you_mean(str(name), _ARGUMENTS)}")
    for name in ("query", "key", "value"):
        expect(f"arguments: {name}", given.get(name), Tensor, "a torch.Tensor")
    expect("out", out, Tensor, "a torch.Tensor")
    for name, tensor in (("lse", lse), ("grad_out", grad_out), ("grad_lse", grad_lse)):
        if tensor is not None:
            expect(name, tensor, Tensor, "a torch.Tensor or None")
    found = {} if gradients is None else as_dict("gradients", gradients, "gradients, by the name of the argument")
    for name, tensor in found.items():
        expect(f"gradients: {name}", tensor, Tensor, "a torch.Tensor")
        expect(f"gradients: {name} of arguments", given.get(name), Tensor, "a torch.Tensor")
    expect("quantized", quantized, bool, "a bool")
    outcome = Outcome(out, lse, found)
    right = Expected(given, tuple(outcome.gradients), grad_out, grad_lse)
    if mistakes := right.mistakes(outcome, quantized):
        raise CheckFailure("\n".join(map(str, mistakes)))


def assert_outcome(call: Fields, inputs: Inputs, right: Expected, outcome: Outcome, quantized: bool = False) -> None:
    """Hold all of an outcome against what is right, which may serve several implementations.

    Args:
        call: what was called.
        inputs: with which tensors.
        right: what should have come of it.
        outcome: what did.
        quantized: whether the implementation quantizes its inputs.

    Raises:
        CheckFailure: something is further from the formula than the contract allows.
    """
    for name in outcome.names:
        mistake = right.mistake(outcome, name, quantized)
        if mistake is not None:
            told = "" if mistake.error is None or quantized else hint(call, inputs, right, name, outcome[name])
            raise failure(call, str(mistake), told)


def is_quantized(impl: str) -> bool:
    """Whether an implementation says that it quantizes its inputs."""
    capabilities = [record.capabilities for record in attnplug.list_impls() if record.name == impl]
    return any(getattr(each, "quantized", False) for each in capabilities)


def revealed(call: Fields, out: Tensor) -> Tensor | None:
    """Return what dropout multiplied the probabilities with; None without dropout.

    No kernel says what it has drawn, so values must be the identity: a probability in out is 0 if dropped.
    """
    if call.dropout_p == 0:
        return None
    if call.values != "identity" or call.dropout_p == 1:
        raise ValueError(f"dropout_p: what was dropped shows only with values='identity' and p < 1, got {call!r}")
    return (out != 0).double() / (1 - call.dropout_p)
