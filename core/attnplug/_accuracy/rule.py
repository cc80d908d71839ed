"""The rule, with `ref` the call in float64, `low` the plain formula in the input's own dtype, in its worst order of
rounding, and `A` the largest sum of absolute values that an element is made of:

`max|out - ref| <= 2 max|low - ref| + 2 max|ref + 0.3 - 0.3 - ref| + 8 eps A`,

the second term computed in the input's dtype, `eps` that of float32 (float64 for float64 inputs). For gradients the
first factor is 3. `lse` has a tolerance relative to `max(1, |lse|)`. Kernels that quantize their inputs are held to
`||out - ref|| <= 0.05 ||ref||` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnplug._accuracy.formula import LOWS, OPPOSITE, attention, plain
from attnplug._accuracy.magnitudes import sums

OUT, GRADIENT, LAST_PLACE, ROUNDING = 2.0, 3.0, 2.0, 8.0
LSE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}
QUANTIZED = 0.05
_INF = float("inf")


@dataclass
class Outcome:
    """What a call returned, and the gradients that were requested."""

    out: Tensor
    lse: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """Return out, lse, or the gradient of `name`."""
        found = {"out": self.out, "lse": self.lse, **self.gradients}[name]
        assert found is not None
        return found

    @property
    def names(self) -> list[str]:
        return ["out", *(["lse"] if self.lse is not None else []), *self.gradients]


@dataclass(frozen=True)
class Mistake:
    """One result that is wrong; `str()` says how far off it is, and where.

    Attributes:
        name: `out`, `lse`, or the argument whose gradient it is.
        text: what is wrong.
        error: the largest error; for lse relative to `max(1, |lse|)`; None where the shape or dtype is wrong.
        allowed: the largest that is allowed.
        place: where it is.
    """

    name: str
    text: str
    error: float | None = None
    allowed: float | None = None
    place: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False)
class Expected:
    """What a call should give. Nothing is computed before it is needed.

    Args:
        arguments: those of `attnplug.scaled_dot_product_attention`, with four dimensions, or, if `cu_seq_q` is
            among them, of `attnplug.varlen_attn`.
        gradients: the arguments whose gradients are wanted.
        grad_out: the gradient of out that backward starts from; needed for gradients.
        grad_lse: the same of lse; None if lse is not part of the loss.
        factors: what dropout multiplied the probabilities with, `(..., Hq, Sq, n)`, n no smaller than the keys of any
            sequence; needed if the call has dropout.
        reference: computes `ref`, out and lse (or None), from the arguments; None for the formulas. It must compute in
            float64 whatever dtype they have, and be differentiable.

    Examples:
        >>> import torch
        >>> from attnplug._accuracy import Expected, Outcome
        >>> query = torch.randn(1, 2, 4, 8)
        >>> expected = Expected({"query": query, "key": query, "value": query})
        >>> expected.mistakes(Outcome(torch.nn.functional.scaled_dot_product_attention(query, query, query)))
        []
    """

    arguments: dict[str, Any]
    gradients: tuple[str, ...] = ()
    grad_out: Tensor | None = None
    grad_lse: Tensor | None = None
    factors: Tensor | None = None
    reference: Callable[[dict[str, Any]], tuple[Tensor, Tensor | None]] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.arguments["query"].dtype

    @cached_property
    def ref(self) -> Outcome:
        """What the formulas, or the reference, give in float64."""
        return self._computed(torch.float64, OPPOSITE, reference=self.reference)

    @cached_property
    def sums(self) -> Outcome:
        """For each element, the sum of the absolute values of what it is made of."""
        return self._computed(torch.float64, OPPOSITE, sums)

    def low(self, order: str) -> Outcome:
        """Return what the formulas give with every operation in the input's own dtype."""
        if order not in self._lows:
            self._lows[order] = self._computed(self.dtype, order)
        return self._lows[order]

    @cached_property
    def _lows(self) -> dict[str, Outcome]:
        return {}

    def _computed(self, dtype: torch.dtype, order: str, compute: Any = plain, reference: Any = None) -> Outcome:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        # Leaves are wider than half types, so that only what a block gives is rounded, not the sum over blocks.
        leaves = {name: self.arguments[name].detach().to(wide).requires_grad_() for name in self.gradients}
        detached = {
            name: value.detach() if isinstance(value, Tensor) else value for name, value in self.arguments.items()
        }
        with torch.set_grad_enabled(bool(leaves)), torch.autocast(self.arguments["query"].device.type, enabled=False):
            arguments = {**detached, **leaves}
            out, lse = (
                attention(arguments, dtype, order, self.factors, compute) if reference is None else reference(arguments)
            )
            found = self._backward(out, lse, leaves)
        gradients = {
            name: gradient if order == OPPOSITE else gradient.to(self.arguments[name].dtype)
            for name, gradient in found.items()
        }
        return Outcome(out.detach(), None if lse is None else lse.detach(), gradients)

    def _backward(self, out: Tensor, lse: Tensor | None, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        if not leaves:
            return {}
        if self.grad_out is None:
            raise ValueError("grad_out: expected the gradient of out that gradients were computed from, got None")
        outputs, grads = [out], [self.grad_out.to(out.dtype)]
        if self.grad_lse is not None:
            if lse is None:
                raise ValueError("grad_lse: the reference gives no lse")
            outputs.append(lse)
            grads.append(self.grad_lse.to(lse.dtype))
        if not any(output.requires_grad for output in outputs):
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), found, strict=True)
        }

    def mistakes(self, outcome: Outcome, quantized: bool = False) -> list[Mistake]:
        """Return what is wrong with a result; nothing if it is right.

        Args:
            outcome: the result.
            quantized: whether it is that of a kernel that quantizes its inputs.

        Raises:
            ValueError: the plain formula overflows in the input's dtype, so that the rule says nothing.
        """
        return [found for name in outcome.names if (found := self.mistake(outcome, name, quantized)) is not None]

    def mistake(self, outcome: Outcome, name: str, quantized: bool = False) -> Mistake | None:
        """Return what is wrong with out, lse, or the gradient of `name`; None if it is right."""
        actual, ref = outcome[name], self.ref[name]
        what = f"gradient of {name}" if name in outcome.gradients else name
        dtype = self._dtype_of(name)
        if actual.dtype != dtype:
            return Mistake(name, f"{what}: dtype {actual.dtype}, expected {dtype}")
        if actual.shape != ref.shape:
            return Mistake(name, f"{what}: shape {tuple(actual.shape)}, expected {tuple(ref.shape)}")
        error = difference(actual.double(), ref)
        if quantized:
            return _mistake_of_norm(name, what, error, ref)
        if name == "lse":
            error = error / ref.abs().nan_to_num(posinf=1, neginf=1).clamp(min=1)
        allowed = 0.0
        for allowed in self.bounds(name):  # each costs more to know, and is no smaller
            if bool((error <= allowed).all()):
                return None
        return _mistake(name, what, actual, ref, error, allowed)

    def _dtype_of(self, name: str) -> torch.dtype:
        if name == "lse":
            return torch.promote_types(self.dtype, torch.float32)
        return self.dtype if name == "out" else self.arguments[name].dtype

    def bounds(self, name: str) -> Iterator[float]:
        """Yield lower bounds of the largest error that is allowed; the last is that error itself."""
        if name == "lse":
            yield LSE[self.dtype]
            return
        ref = self.ref[name]
        if ref.numel() == 0:
            yield 0.0
            return
        factor, hoped_for, dtype = OUT if name == "out" else GRADIENT, 0.0, self._dtype_of(name)
        for order in LOWS:
            hoped_for = max(hoped_for, _largest(difference(self.low(order)[name].double(), ref)))
            if hoped_for == _INF:
                raise ValueError(f"{name}: the plain formula overflows in {dtype}, so that no result can be judged")
            yield tolerance(factor, hoped_for, ref, dtype, 0.0, self.dtype)
        yield tolerance(factor, hoped_for, ref, dtype, _largest(self.sums[name].nan_to_num()), self.dtype)

    def allowed(self, name: str) -> float:
        """Return the largest error that is allowed, for lse relative to `max(1, |lse|)`."""
        return max(self.bounds(name))


def tolerance(
    factor: float, low_error: float, ref: Tensor, dtype: torch.dtype, sums: float, inputs: torch.dtype
) -> float:
    """Return `factor low_error + 2 max|ref + 0.3 - 0.3 - ref| + 8 eps sums`.

    Args:
        factor: `OUT` or `GRADIENT`.
        low_error: `max|low - ref|`.
        ref: the result in float64.
        dtype: of the result.
        sums: the largest sum of absolute values that an element is made of.
        inputs: the query's dtype, which says what `eps` is.
    """
    rounded = ref.to(dtype)
    last_place = _largest((rounded + 0.3 - 0.3 - rounded).double().nan_to_num())
    eps = torch.finfo(torch.promote_types(inputs, torch.float32)).eps
    return factor * low_error + LAST_PLACE * last_place + ROUNDING * eps * sums


def difference(actual: Tensor, ref: Tensor) -> Tensor:
    """Return `|actual - ref|`: 0 where both are the same infinity or not a number, infinite where only one is."""
    same = (actual == ref) | (actual.isnan() & ref.isnan())
    return (actual - ref).abs().nan_to_num(nan=_INF, posinf=_INF).masked_fill(same, 0.0)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _mistake(name: str, what: str, actual: Tensor, ref: Tensor, error: Tensor, allowed: float) -> Mistake:
    """Say how large the largest error is, where, and how many are too large."""
    place = tuple(int(index) for index in torch.unravel_index(error.argmax(), error.shape))
    wrong, largest = int((error > allowed).sum()), error.max().item()
    text = (
        f"{what}: largest error {largest:.3g} at {list(place)}, allowed {allowed:.3g}; there it is "
        f"{actual[place].item():.6g}, expected {ref[place].item():.6g}; {wrong} of {error.numel()} are too far off"
    )
    return Mistake(name, text, largest, allowed, place)


def _mistake_of_norm(name: str, what: str, error: Tensor, ref: Tensor) -> Mistake | None:
    size = ref.masked_fill(~ref.isfinite(), 0.0).norm().item()
    off = error.norm().item()
    if off <= QUANTIZED * size:
        return None
    text = f"{what}: ||{what} - ref|| is {off:.3g}, allowed for a kernel that quantizes {QUANTIZED} ||ref|| = "
    place = tuple(int(index) for index in torch.unravel_index(error.argmax(), error.shape))
    return Mistake(name, f"{text}{QUANTIZED * size:.3g}; worst at {list(place)}", off, QUANTIZED * size, place)
