"""The implementation under test, as checks see it: what it declares, and whether it takes a call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch

import attnplug
from attnplug import Capabilities, Feature
from attnplug._call.facts import CallFacts
from attnplug._call.prepare import is_empty, prepare_dense, prepare_varlen
from attnplug._call.requirements import lacking
from attnplug._registry.discovery import get_registry
from attnplug._types import ImplRecord
from attnplug.testing._call import Call, compare
from attnplug.testing._failure import AGAIN, CheckFailure, Declined, failure
from attnplug.testing._inputs import Inputs

DTYPES = ("float32", "float16", "bfloat16", "float64")
"""In the order in which a check that needs only one takes the first that is declared."""

Work = TypeVar("Work")


@dataclass
class Subject:
    """An implementation on one device, for one dtype.

    Attributes:
        ran: how many calls of the current check it took.
        declined: calls of the current check that it declined, with its reasons.
        uncovered: calls that its capabilities do not cover, and which it therefore need not take.
        piece: the number of a piece of the current check, and of how many, where several processes share it.
    """

    record: ImplRecord
    device: str
    dtype: str
    full: bool
    ran: int = 0
    declined: list[str] = field(default_factory=list)
    uncovered: list[str] = field(default_factory=list)
    piece: tuple[int, int] = (0, 1)

    @property
    def name(self) -> str:
        return self.record.name

    @cached_property
    def parts(self) -> list[Capabilities]:
        """The alternatives of its capabilities for this device and dtype."""
        kind = self.device.partition(":")[0]
        return [
            part
            for part in self.record.capabilities.alternatives
            if (part.devices is None or kind in part.devices) and (part.dtypes is None or self.dtype in part.dtypes)
        ]

    @cached_property
    def features(self) -> frozenset[Feature]:
        return frozenset().union(*(part.features for part in self.parts))

    def has(self, *features: Feature) -> bool:
        return self.features.issuperset(features)

    def lacking(self, features: Iterable[Feature]) -> tuple[str, ...]:
        """Return why this machine does not have some of the features, which are declared; see `Kernel`."""
        kernel = get_registry().get(self.name, "impl").load()
        asked, device, dtype = frozenset(features), torch.device(self.device), getattr(torch, self.dtype)
        return () if kernel is None else kernel.missing(asked, device, dtype)

    @cached_property
    def head_sizes(self) -> Any:
        """The head sizes of the first alternative; None if any will do."""
        return self.parts[0].head_sizes if self.parts else None

    def head_size(self, wanted: int) -> int:
        """Return the smallest declared head size from `wanted` on, else the largest."""
        if self.head_sizes is None:
            return wanted
        above = [size for size in self.head_sizes if size >= wanted]
        return min(above) if above else max(self.head_sizes)

    @cached_property
    def gradients(self) -> tuple[str, ...]:
        """The names of the gradients to ask for in an ordinary call; none if it has no backward."""
        wanted = ("query", "key", "value")
        with_them, without = self.form(self.call(gradients=wanted)), self.form(self.call())
        return wanted if not self.refusals(with_them) or self.refusals(without) else ()

    def call(self, **fields: Any) -> Call:
        """Return a call with this device, dtype and a declared head size; `fields` change it."""
        return Call(**{"device": self.device, "dtype": self.dtype, "head_size": self.head_size(32), **fields})

    def form(self, call: Call) -> Call:
        """Return a call in the form that the implementation takes: packed, if it takes no dense calls."""
        dense = any(part.dense for part in self.parts)
        return call if dense else call.packed() or call

    def refusals(self, call: Call, inputs: Inputs | None = None) -> tuple[str, ...]:
        """Return each reason why the implementation does not take the call.

        Raises:
            CheckFailure: its supports function raises, which attnplug takes for a reason, but is a mistake.
        """
        params = call.params(inputs or call.make())
        reasons = attnplug.can_use_impl(self.name, params).reasons
        if mistakes := [reason for reason in reasons if reason.startswith("supports() ")]:
            raise failure(call, "; ".join(mistakes))
        return reasons

    def covers(self, call: Call, inputs: Inputs) -> tuple[str, ...]:
        """Return what the call asks that the capabilities do not state."""
        params = call.params(inputs)
        prepared = prepare_varlen(params) if call.is_varlen else prepare_dense(params)[0]
        if is_empty(prepared):  # which no kernel is asked about
            return ()
        facts = CallFacts.of(prepared)
        assert facts is not None, prepared
        return lacking(self.record.capabilities, facts)

    def takes(self, call: Call, inputs: Inputs) -> bool:
        """Whether the implementation takes the call; why not is remembered for the report."""
        if missing := self.covers(call, inputs):
            self.uncovered.append("; ".join(missing))
            return False
        if reasons := self.refusals(call, inputs):
            self.declined.append(f"{'; '.join(reasons)} -- {call!r}")
            return False
        self.ran += 1
        return True

    def share(self, work: Sequence[Work]) -> Sequence[Work]:
        """Return what of the current check's work is this piece's."""
        number, count = self.piece
        return work[number::count]

    def compare(self, *calls: Call) -> None:
        """Compare each call that the implementation takes with the formulas.

        Raises:
            CheckFailure: a result is further from the formula than the contract allows.
        """
        for call in map(self.form, calls):
            inputs = call.make()
            if not self.takes(call, inputs):
                continue
            try:
                compare(self.name, call, inputs)
            except CheckFailure as found:
                found.again = f"{AGAIN}from attnplug.testing import Call; {call!r}.check({self.name!r})"
                raise

    def taken(self, calls: Iterable[Call]) -> list[tuple[Call, Inputs]]:
        """Return those calls that the implementation takes, with their inputs."""
        made = [(call, call.make()) for call in calls]
        return [(call, inputs) for call, inputs in made if self.takes(call, inputs)]

    def one(self, call: Call) -> tuple[Call, Inputs]:
        """Return the call and its inputs.

        Raises:
            Declined: the implementation does not take it.
        """
        for taken in self.taken([call]):
            return taken
        raise Declined
