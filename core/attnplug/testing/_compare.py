"""A result held against the contract's rule, and what is told where it breaks it."""

from __future__ import annotations

from torch import Tensor

from attnplug._accuracy import Expected, Outcome
from attnplug.testing._failure import failure
from attnplug.testing._fields import Fields
from attnplug.testing._hints import hint
from attnplug.testing._inputs import Inputs


def expected(call: Fields, inputs: Inputs, factors: Tensor | None = None, quantized: bool = False) -> Expected:
    """Return what the call should give."""
    grad_lse = inputs.grad_lse if call.lse_gradient else None
    return Expected(inputs.arguments, call.gradients, inputs.grad_out, grad_lse, factors, quantized)


def assert_right(
    call: Fields, inputs: Inputs, outcome: Outcome, factors: Tensor | None = None, quantized: bool = False
) -> None:
    """Hold all of an outcome against what the formulas give.

    Args:
        call: what was called.
        inputs: with which tensors.
        outcome: what came of it.
        factors: what dropout multiplied the probabilities with.
        quantized: whether the implementation quantizes its inputs.

    Raises:
        CheckFailure: something is further from the formula than the contract allows.
    """
    right = expected(call, inputs, factors, quantized)
    for name in outcome.names:
        mistake = right.mistake(outcome, name)
        if mistake is not None:
            told = "" if mistake.error is None or quantized else hint(call, inputs, right, name, outcome[name])
            raise failure(call, str(mistake), told)


def revealed(call: Fields, out: Tensor) -> Tensor | None:
    """Return what dropout multiplied the probabilities with; None without dropout.

    No kernel says what it has drawn, so values must be the identity: a probability in out is 0 if dropped.
    """
    if call.dropout_p == 0:
        return None
    if call.values != "identity" or call.dropout_p == 1:
        raise ValueError(f"dropout_p: what was dropped shows only with values='identity' and p < 1, got {call!r}")
    return (out != 0).double() / (1 - call.dropout_p)
