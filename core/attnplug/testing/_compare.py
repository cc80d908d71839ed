"""When a result is right: contract.md, section 4, the same rule for every implementation and every check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnplug.testing._call import Call, Inputs, Outcome
from attnplug.testing._reference import LOWS, OPPOSITE, attention

OUT, GRADIENT = 2.0, 3.0
LSE = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-3}


class CheckFailure(AssertionError):
    """What a check found wrong; `str()` is what an author needs to see it again."""


class Declined(Exception):
    """The implementation does not take the call, and says why."""


@dataclass
class Expected:
    """What a call should give, and how far from it the plain formula in the input's own dtype is."""

    ref: Outcome
    lows: tuple[Outcome, ...]


def expected(call: Call, inputs: Inputs, factors: Tensor | None = None) -> Expected:
    """Return `ref` and `low` for a call."""
    return Expected(ref(call, inputs, factors), lows(call, inputs, factors))


def ref(call: Call, inputs: Inputs, factors: Tensor | None = None) -> Outcome:
    """Return what the formulas give in float64."""
    return _formula(call, inputs, torch.float64, OPPOSITE, factors)


def lows(call: Call, inputs: Inputs, factors: Tensor | None = None) -> tuple[Outcome, ...]:
    """Return what the formulas give with every operation in the input's own dtype, in each order."""
    return tuple(_formula(call, inputs, call.torch_dtype, order, factors) for order in LOWS)


def _formula(call: Call, inputs: Inputs, dtype: torch.dtype, order: str, factors: Tensor | None) -> Outcome:
    arguments, leaves = call.with_leaves(inputs)
    if order == OPPOSITE and leaves:  # float64 gradients, not rounded to a leaf's own dtype
        leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
        arguments.update(leaves)
    with torch.set_grad_enabled(bool(leaves)):
        out, lse = attention(arguments, dtype, order, factors)
        return Outcome(out.detach(), lse.detach(), call.backward(inputs, out, lse, leaves))


def compare(impl: str, call: Call, inputs: Inputs | None = None, outcome: Outcome | None = None) -> None:
    """Run a call, unless its `outcome` is given, and hold all that it returns against the formulas.

    Raises:
        CheckFailure: something is further from the formula than the contract allows.
    """
    inputs = call.make() if inputs is None else inputs
    outcome = run(impl, call, inputs) if outcome is None else outcome
    assert_right(impl, call, inputs, outcome, expected(call, inputs))


def run(impl: str, call: Call, inputs: Inputs) -> Outcome:
    """Run a call; whatever the implementation raises is a failure."""
    try:
        return call.run(impl, inputs)
    except Exception as error:
        raise failure(impl, call, f"raised {type(error).__name__}: {error}") from error


def assert_right(impl: str, call: Call, inputs: Inputs, outcome: Outcome, wanted: Expected) -> None:
    """Raise CheckFailure unless everything in `outcome` is as near to the formula as the contract asks."""
    from attnplug.testing._hints import hint

    names = ["out", *(["lse"] if outcome.lse is not None else []), *outcome.gradients]
    for name in names:
        actual, exact = part(outcome, name), part(wanted.ref, name)
        rounded = [part(low, name) for low in wanted.lows]
        what = f"gradient of {name}" if name in outcome.gradients else name
        if actual.dtype != rounded[0].dtype and name != "lse":
            raise failure(impl, call, f"{what}: dtype {actual.dtype}, expected {rounded[0].dtype}")
        if actual.shape != exact.shape:
            raise failure(impl, call, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
        if name == "lse":
            error, allowed = lse_error(actual, exact, call.dtype)
        else:
            error, allowed = _away(actual.double() - exact), tolerance(name, exact, rounded)
        if not bool((error <= allowed).all()):
            raise failure(impl, call, _describe(what, actual, exact, error, allowed), hint(call, inputs, name, actual))


def part(outcome: Outcome, name: str) -> Tensor:
    """Return out, lse, or the gradient of `name`."""
    found = {"out": outcome.out, "lse": outcome.lse, **outcome.gradients}[name]
    assert found is not None
    return found


def tolerance(name: str, ref: Tensor, lows: Sequence[Tensor]) -> float:
    """Return `factor * max|low - ref| + 2 * max|ref + 0.3 - 0.3 - ref|`, the last term in the dtype of `low`.

    The factor is 2 for out, 3 for gradients.
    """
    if ref.numel() == 0:
        return 0.0
    rounded = ref.to(lows[0].dtype)
    last = (rounded + 0.3 - 0.3 - rounded).abs().max().item()
    factor = OUT if name == "out" else GRADIENT
    allowed: float = factor * max((low.double() - ref).abs().max().item() for low in lows) + 2 * last
    assert allowed < float("inf"), "the plain formula overflows: the check asks for more than the contract"
    return allowed


def lse_error(actual: Tensor, ref: Tensor, dtype: str) -> tuple[Tensor, float]:
    """Return the error relative to `max(1, |lse|)`, where infinities must be equal, and the largest allowed."""
    error = _away((actual.double() - ref) / ref.abs().clamp(min=1))
    return error.masked_fill(actual.double() == ref, 0.0), LSE[dtype]


def _away(difference: Tensor) -> Tensor:
    return difference.abs().nan_to_num(nan=float("inf"), posinf=float("inf"))


def _describe(name: str, actual: Tensor, ref: Tensor, error: Tensor, allowed: float) -> str:
    """Say how large the largest error is, where, and how many are too large."""
    place = tuple(int(index) for index in torch.unravel_index(error.argmax(), error.shape))
    wrong = int((error > allowed).sum())
    return (
        f"{name}: largest error {error.max().item():.3g} at {list(place)}, allowed {allowed:.3g}; there it is "
        f"{actual[place].item():.6g}, expected {ref[place].item():.6g}; {wrong} of {error.numel()} are too far off"
    )


def failure(impl: str, call: Call | None, message: str, hint: Any = "") -> CheckFailure:
    """Return the failure to raise: what is wrong, what it looks like, and how to see it again."""
    lines = [message]
    if hint:
        lines.append(f"hint: {hint}")
    if call is not None:
        lines.append(f"again: from attnplug.testing import Call; {call!r}.check({impl!r})")
    return CheckFailure("\n".join(lines))
