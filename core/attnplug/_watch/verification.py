"""`verify`: a sampled share of calls is computed twice, and held against a reference."""

from __future__ import annotations

import inspect
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from torch import Tensor

from attnplug._accuracy import Mistake
from attnplug._api.dense import scaled_dot_product_attention
from attnplug._api.varlen import varlen_attn
from attnplug._arguments import as_float, as_int
from attnplug._errors import MismatchError, MismatchWarning
from attnplug._messages import printable, warn
from attnplug._registry.kernel import OfOneRank
from attnplug._run.contract import Result
from attnplug._selection.state import start
from attnplug._selection.watching import Gradients, RecordedCall, unwatched
from attnplug._types import SDPAParams
from attnplug._watch import totals
from attnplug._watch.gradients import Backward, wanted
from attnplug._watch.judging import Judge, NotJudged, plain_form, unfit
from attnplug._watch.lines import line_of
from attnplug._watch.modules import current_module
from attnplug._watch.observing import UNSEEN, Observer, WatcherOf

KEPT = 100
"""How many mismatches are kept; the others are counted."""


@dataclass(frozen=True)
class Mismatch:
    """One result of a call that is further from the reference than [the rule](../semantics.md) allows.

    Attributes:
        impl: the implementation that computed it.
        name: `out`, `lse`, or the argument whose gradient it is.
        text: what is wrong: the largest error, where, and what is allowed.
        error: the largest error; for lse relative to `max(1, |lse|)`; None where the shape or dtype is wrong.
        allowed: the largest that is allowed.
        place: where it is, in the form `(B, Hq, Sq, E)`, or `(Tq, Hq, E)` for variable length.
        call: a line of Python that makes a call like this one, with random numbers, and checks it.
        reference: the implementation that it was compared with.
        module: that made the call, as `LlamaModel.layers.3.self_attn`; of compiled code the module that was compiled,
            of its gradients none; empty for calls outside any module.
        arguments: of the call, which `scaled_dot_product_attention(**arguments)` repeats (`varlen_attn` where they have
            `cu_seq_q`), for a function that `on_mismatch` names to save; what is kept has none.
    """

    impl: str
    name: str
    text: str
    error: float | None
    allowed: float | None
    place: tuple[int, ...]
    call: str
    reference: str
    module: str = ""
    arguments: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        return _together([self])


def _together(mismatches: Sequence[Mismatch]) -> str:
    """Return in one line what is wrong with one call."""
    first = mismatches[0]
    where = f" in {first.module}" if first.module else ""
    texts = "; ".join(mismatch.text for mismatch in mismatches)
    return f"{first.impl}{where}, held against {first.reference}: {texts}. To see it: {first.call}"


def _arguments_of(params: SDPAParams) -> dict[str, Any]:
    """Return the arguments that make the same call again."""
    given = {item.name: getattr(params, item.name) for item in fields(params)} | {"dropout_p": params.dropout}
    function = varlen_attn if params.is_varlen else scaled_dot_product_attention
    return {name: given[name] for name in inspect.signature(function).parameters if name in given}


class verify(Observer):
    """Verify a sampled share of attention calls against a reference; the caller gets the original result.

    As a `with` block it is for this thread's calls, from when the block is entered until it is left; `start()` and
    `stop()` are for the whole process, and so is the environment variable `ATTNPLUG_VERIFY`. A call is sampled with
    probability `rate`, whatever was sampled before, so that n calls of a wrong kernel are all missed with probability
    `(1 - rate) ** n`. Gradients of sampled calls are compared when backward runs, even after the end.

    Args:
        rate: between 0, which costs nothing, and 1, every call.
        reference: the implementation that computes what is right, in float64.
        on_mismatch: `"warn"` (a `MismatchWarning`, once for the results and once for the gradients of each
            implementation in each module), `"raise"` (a `MismatchError`, from the call or from backward), or a
            function that is called with each `Mismatch`.
        seed: of the choice of calls. Equal seeds choose equal calls, on every rank of a distributed program too.

    Attributes:
        calls: how many calls were seen.
        results: of how many out, and lse where there is one, was compared.
        gradients: how often the gradients of one were.
        wrong: how many mismatches there were.
        mismatches: the first 100 of them.
        skipped: why sampled calls, or their gradients, were not compared, and how many.

    Raises:
        TypeError, ValueError: an argument is wrong, or `reference` does not compute in float64.
        UnknownImplementationError: no implementation is named `reference`.

    Examples:
        >>> import torch, attnplug
        >>> query = torch.randn(1, 2, 4, 8)
        >>> with attnplug.verify(rate=1.0, reference="aten_math") as watched:
        ...     _ = attnplug.scaled_dot_product_attention(query, query, query)
        >>> watched.results, watched.wrong
        (1, 0)
    """

    def __init__(
        self,
        rate: float,
        reference: str = "math_ref",
        on_mismatch: str | Callable[[Mismatch], object] = "warn",
        *,
        seed: int = 0,
    ) -> None:
        wanted_rate = "a number from 0 to 1, the share of calls to verify"
        if not 0 <= as_float("rate", rate, wanted_rate) <= 1:
            raise ValueError(f"rate: expected {wanted_rate}, got {rate!r}")
        if not callable(on_mismatch) and not (isinstance(on_mismatch, str) and on_mismatch in ("warn", "raise")):
            raise ValueError(f"on_mismatch: expected 'warn', 'raise' or a function, got {on_mismatch!r}")
        self.seed = as_int("seed", seed, "an integer")
        dtypes = start().get(reference, "reference").spec.capabilities.dtypes
        if dtypes is not None and "float64" not in dtypes:
            raise ValueError(
                f"reference: {reference!r} does not compute in float64 (only {', '.join(sorted(dtypes))}); "
                f"'math_ref' does"
            )
        self.rate, self.reference, self.on_mismatch = float(rate), reference, on_mismatch
        self.calls = self.results = self.gradients = self.wrong = 0
        self.mismatches: list[Mismatch] = []
        self.skipped: Counter[str] = Counter()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: what was found, but not that it goes on."""
        return {**self.__dict__, "_watcher": None}

    def _is_idle(self) -> bool:
        return self.rate == 0

    def _new_watcher(self, everywhere: bool) -> _Verifier:
        return _Verifier(self, everywhere)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [
            f"verified {self.results:,} of {self.calls:,} calls (rate {self.rate:g}) against {self.reference}, "
            f"and the gradients of {self.gradients:,}: {self.wrong:,} mismatches"
        ]
        if self.rate and not self.calls:
            lines += ["  no call was seen:", *(f"  {line}" for line in UNSEEN)]
        lines += [f"  not verified: {count:,}: {reason}" for reason, count in self.skipped.most_common()]
        return "\n".join([*lines, *(f"  {mismatch}" for mismatch in self.mismatches)])


class _Verifier(WatcherOf[verify]):
    """Observes for a `verify`, which graphs whose gradients are still to be compared hold, too."""

    sees_tensors = True

    def __init__(self, found: verify, everywhere: bool) -> None:
        super().__init__(found, everywhere)
        self._judge = Judge(found.reference)
        self._random = random.Random(found.seed)
        self._lock = threading.Lock()
        self._warned: set[tuple[str, bool, str]] = set()

    @property
    def _found(self) -> verify:
        found = self.observer()
        assert found is not None  # held by a call that is made, or by its graph
        return found

    def around(self, call: RecordedCall, params: SDPAParams, run: Callable[[SDPAParams], Result]) -> Result:
        found = self.observer()
        if found is None or not self._is_sampled(found):
            return run(params)
        reason = self._unfit(call, params)
        if reason:
            self._skip(reason)
            return run(params)
        names = wanted(params)
        if not names:
            result = run(params)
            self._check(call, params, *result)
            return result
        check = partial(self._check_gradients, call, params, held=found, module=current_module())
        backward = Backward(params, names, check, self._skip)
        out, lse = run(backward.of_aliases(params))
        self._check(call, params, out, lse)
        backward.listen(out, lse)
        return out, lse

    def seen(self, call: RecordedCall, params: SDPAParams, result: Result) -> None:
        found = self.observer()
        if found is None or not self._is_sampled(found):
            return
        reason = self._unfit(call, params)
        if reason:
            self._skip(reason)
            return
        self._check(call, params, *result)
        kernel = start().get(call.impl).load()
        if kernel is None or kernel.composite:
            self._skip("gradients: of compiled code that is made of PyTorch's operators, if it has any")
        elif params.query.is_cuda and not self.everywhere:
            self._skip("gradients: of compiled code, which has its backward in a thread of autograd's: start() sees it")

    def differentiated(self, call: RecordedCall, params: SDPAParams, gradients: Gradients) -> None:
        found = self.observer()
        with self._lock:
            if found is None or self._random.random() >= found.rate:
                return
        reason = self._unfit(call, params)
        if reason:
            self._skip(f"gradients: {reason}")
            return
        self._check_gradients(call, params, *gradients)

    def _is_sampled(self, found: verify) -> bool:
        with self._lock:
            found.calls += 1
            return self._random.random() < found.rate

    def _skip(self, reason: str) -> None:
        with self._lock:
            self._found.skipped[reason] += 1

    def _check(self, call: RecordedCall, params: SDPAParams, out: Tensor, lse: Tensor | None) -> None:
        def judge(plain: SDPAParams) -> list[Mistake]:
            asked = lse if params.return_lse else None  # some kernels give one that nobody asked for, and owe it nobody
            return self._judge.of_result(plain, out, asked, self._is_quantized(call))

        self._compare("results", "", call, params, judge)

    def _check_gradients(
        self,
        call: RecordedCall,
        params: SDPAParams,
        gradients: dict[str, Tensor],
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        held: verify | None = None,
        module: str = "",
    ) -> None:
        """Compare gradients; a graph holds the `verify` until it has, and the name of the module, which has ended."""

        def judge(plain: SDPAParams) -> list[Mistake]:
            return self._judge.of_gradients(plain, gradients, grad_out, grad_lse, self._is_quantized(call))

        names = tuple(gradients)
        self._compare("gradients", "gradients: ", call, params, judge, names, grad_lse is not None, module)

    def _compare(
        self,
        kind: str,
        prefix: str,
        call: RecordedCall,
        params: SDPAParams,
        judge: Callable[[SDPAParams], list[Mistake]],
        gradients: tuple[str, ...] = (),
        grad_lse: bool = False,
        module: str | None = None,
    ) -> None:
        try:
            with unwatched():
                plain = plain_form(params)
                mistakes = judge(plain)
        except NotJudged as reason:
            self._skip(f"{prefix}{reason}")
            return
        except Exception as error:  # out of memory, for example: the program shall run on as it would have
            self._skip(f"{prefix}the comparison raised {type(error).__name__}")
            self._warn_of(error)
            return
        with self._lock:
            setattr(self._found, kind, getattr(self._found, kind) + 1)
        totals.add("attnplug.verified", call.impl, kind)
        if mistakes:
            line = line_of(call.impl, plain, mistakes[0], gradients, grad_lse)
            module = current_module() if module is None else module
            self._report([self._mismatch(call, module, mistake, line, _arguments_of(plain)) for mistake in mistakes])

    def _mismatch(
        self, call: RecordedCall, module: str, mistake: Mistake, line: str, arguments: dict[str, Any]
    ) -> Mismatch:
        return Mismatch(
            call.impl,
            mistake.name,
            mistake.text,
            mistake.error,
            mistake.allowed,
            mistake.place,
            line,
            self._found.reference,
            module,
            arguments,
        )

    def _report(self, mismatches: list[Mismatch]) -> None:
        found = self._found
        with self._lock:
            found.wrong += len(mismatches)
            kept = [replace(mismatch, arguments={}) for mismatch in mismatches]
            found.mismatches += kept[: KEPT - len(found.mismatches)]
        for mismatch in mismatches:
            totals.add("attnplug.mismatches", mismatch.impl, mismatch.name)
        if callable(found.on_mismatch):
            for mismatch in mismatches:
                found.on_mismatch(mismatch)
        elif found.on_mismatch == "raise":
            raise MismatchError(*kept)
        else:
            self._warn(kept)

    def _warn_of(self, error: Exception) -> None:
        """Say once for each type of error that, and why, calls are not compared."""
        key = (type(error).__name__, False, "")
        with self._lock:
            if key in self._warned:
                return
            self._warned.add(key)
        warn(RuntimeWarning(f"verify could not compare a call: {type(error).__name__}: {printable(error)}"))

    def _warn(self, mismatches: list[Mismatch]) -> None:
        first = mismatches[0]
        key = (first.impl, first.name in ("out", "lse"), first.module)
        with self._lock:
            if key in self._warned:
                return
            self._warned.add(key)
        warn(MismatchWarning(_together(mismatches)))

    @staticmethod
    def _unfit(call: RecordedCall, params: SDPAParams) -> str:
        """Return why a call cannot be compared; empty if it can."""
        if isinstance(start().get(call.impl).spec.kernel, OfOneRank):
            return f"{call.impl} computes a part of a call, and other ranks the rest"
        return unfit(params)

    @staticmethod
    def _is_quantized(call: RecordedCall) -> bool:
        return start().get(call.impl).spec.capabilities.quantized
