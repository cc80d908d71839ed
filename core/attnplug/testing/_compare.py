"""When a result is right: the same rule for every implementation and every check.

With `ref` the call in float64, and `low` the plain formula with every operation in the input's own dtype,
`max|out - ref| <= 2 max|low - ref| + 2 max|ref + 0.3 - 0.3 - ref|`, the last term computed in the input's dtype;
for gradients the same with factor 3. `lse` has a tolerance relative to `max(1, |lse|)`. In float64 `ref` rounds too,
and the bound is doubled. A quantized kernel is held to 5 % of the norm of `ref` instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnplug._registry.discovery import get_registry
from attnplug.testing._call import Call, Inputs, Outcome
from attnplug.testing._reference import LOWS, OPPOSITE, attention

AGAIN = "again: "
OUT, GRADIENT = 2.0, 3.0
QUANTIZED = 0.05
LSE = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-3}


class CheckFailure(AssertionError):
    """What a check found wrong; `str()` ends with what an author needs to see it again.

    Attributes:
        again: the call, or a line of Python that fails in the same way.
    """

    def __init__(self, message: str, again: str = "") -> None:
        super().__init__(message)
        self.again = again

    def __str__(self) -> str:
        return "\n".join(filter(None, (super().__str__(), self.again)))


class Declined(Exception):
    """The implementation does not take the call, and says why."""


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
    if outcome is None:
        torch.manual_seed(call.seed)  # of dropout
        outcome = run(impl, call, inputs)
    factors = revealed(call, outcome.out)
    quantized = is_quantized(impl)
    assert_right(call, inputs, outcome, ref(call, inputs, factors), lows(call, inputs, factors), quantized)


def is_quantized(impl: str) -> bool:
    """Whether an implementation says that it rounds its inputs to fewer bits."""
    return get_registry().get(impl).spec.capabilities.quantized


def assert_right(
    call: Call, inputs: Inputs, outcome: Outcome, ref: Outcome, lows: tuple[Outcome, ...], quantized: bool = False
) -> None:
    """Hold all of an outcome against what the formulas give, which may serve several implementations.

    That of a quantized one may be wrong by `QUANTIZED` of its norm, and must hold no NaN.

    Raises:
        CheckFailure: something is further from the formula than the contract allows.
    """
    names = ["out", *(["lse"] if outcome.lse is not None else []), *outcome.gradients]
    for name in names:
        _assert_right(call, inputs, name, outcome, ref, lows, quantized)


def revealed(call: Call, out: Tensor) -> Tensor | None:
    """Return what dropout multiplied the probabilities with; None without dropout.

    No kernel says what it has drawn, so values must be the identity: a probability in out is 0 if dropped.
    """
    if call.dropout_p == 0:
        return None
    if call.values != "identity" or call.dropout_p == 1:
        raise ValueError(f"dropout_p: what was dropped shows only with values='identity' and p < 1, got {call!r}")
    return (out != 0).double() / (1 - call.dropout_p)


def run(impl: str, call: Call, inputs: Inputs) -> Outcome:
    """Run a call; whatever the implementation raises is a failure."""
    try:
        return call.run(impl, inputs)
    except Exception as error:
        raise failure(call, f"raised {type(error).__name__}: {error}") from error


def _assert_right(
    call: Call, inputs: Inputs, name: str, outcome: Outcome, ref: Outcome, lows: tuple[Outcome, ...], quantized: bool
) -> None:
    from attnplug.testing._hints import hint

    actual, exact = part(outcome, name), part(ref, name)
    rounded = [part(low, name) for low in lows]
    what = f"gradient of {name}" if name in outcome.gradients else name
    dtype = torch.promote_types(call.torch_dtype, torch.float32) if name == "lse" else rounded[0].dtype
    if actual.dtype != dtype:
        raise failure(call, f"{what}: dtype {actual.dtype}, expected {dtype}")
    if actual.shape != exact.shape:
        raise failure(call, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    if quantized:
        error, allowed = _norm_error(actual, exact)
    elif name == "lse":
        error, allowed = lse_error(actual, exact, call.dtype)
    else:
        error, allowed = _away(actual.double() - exact), tolerance(name, exact, rounded)
    if not bool((error <= allowed).all()):
        raise failure(call, _describe(what, actual, exact, error, allowed), hint(call, inputs, name, actual))


def part(outcome: Outcome, name: str) -> Tensor:
    """Return out, lse, or the gradient of `name`."""
    found = {"out": outcome.out, "lse": outcome.lse, **outcome.gradients}[name]
    assert found is not None
    return found


def tolerance(name: str, ref: Tensor, lows: Sequence[Tensor]) -> float:
    """Return `factor * max|low - ref| + 2 * max|ref + 0.3 - 0.3 - ref|`, the last term in the dtype of `low`.

    The factor is 2 for out, 3 for gradients, and twice that in float64, where `ref` is rounded as well.
    """
    if ref.numel() == 0:
        return 0.0
    rounded = ref.to(lows[0].dtype)
    last = (rounded + 0.3 - 0.3 - rounded).abs().max().item()
    factor = OUT if name == "out" else GRADIENT
    if rounded.dtype == torch.float64:  # ref is rounded as well
        factor *= 2
    allowed: float = factor * max((low.double() - ref).abs().max().item() for low in lows) + 2 * last
    assert allowed < float("inf"), "the plain formula overflows: the check asks for more than the contract"
    return allowed


def lse_error(actual: Tensor, ref: Tensor, dtype: str) -> tuple[Tensor, float]:
    """Return the error relative to `max(1, |lse|)`, where infinities must be equal, and the largest allowed."""
    error = _away((actual.double() - ref) / ref.abs().clamp(min=1))
    return error.masked_fill(actual.double() == ref, 0.0), LSE[dtype]


def _norm_error(actual: Tensor, ref: Tensor) -> tuple[Tensor, float]:
    """Return the error's norm as a share of the reference's, and the largest allowed; infinities must be equal."""
    differs = _away(actual.double() - ref).masked_fill(actual.double() == ref, 0.0)
    norm = ref.masked_fill(ref.isinf(), 0.0).norm()
    share = differs.norm() / norm if norm > 0 else differs.norm()
    return torch.where(differs > 0, share, 0.0), QUANTIZED


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


def failure(call: Call | None, message: str, hint: str = "") -> CheckFailure:
    """Return the failure to raise: what is wrong, what it looks like, and the call, if it is about one."""
    lines = [message]
    if hint:
        lines.append(f"hint: {hint}")
    return CheckFailure("\n".join(lines), "" if call is None else f"call: {call!r}")
