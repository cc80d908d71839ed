"""Measured choices as data: which implementation was the fastest right one, for which kind of call, and where.

A table is worth something only on the device and with the versions that it was measured on, so it says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A kind of call. The last three are upper bounds, powers of two: 1024 stands for 513 to 1024.

    Attributes:
        dtype: of the query, such as `bfloat16`.
        head_size: of query and key.
        value_head_size: of value.
        group: how many query heads share one head of keys.
        features: sorted names of the `Feature`s that the call asks for.
        gradients: whether autograd records the call.
        batch_heads: sequences times query heads.
        queries: the length of a sequence of queries.
        keys: the length of a sequence of keys.
    """

    dtype: str
    head_size: int
    value_head_size: int
    group: int
    features: tuple[str, ...]
    gradients: bool
    batch_heads: int
    queries: int
    keys: int

    @property
    def problem(self) -> tuple[Any, ...]:
        """The kind without its sizes."""
        return self[:6]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The upper bounds of batch times heads, of queries and of keys."""
        return self[6:]

    def __str__(self) -> str:
        """Return such as `float32 D64 causal gradients, B·H ≤16, S ≤512x1024`."""
        length = str(self.queries) if self.queries == self.keys else f"{self.queries}x{self.keys}"
        return f"{describe_problem(self.problem)}, B·H ≤{self.batch_heads}, S ≤{length}"


def describe_problem(problem: tuple[Any, ...]) -> str:
    """Return a kind without its sizes, such as `float32 D64 causal gradients`."""
    dtype, head_size, value_head_size, group, features, gradients = problem
    size = f"D{head_size}" + (f"/{value_head_size}" if value_head_size != head_size else "")
    asked = [f"groups-of-{group}"] if group > 1 else []
    asked += [name.lower().replace("_", "-") for name in features if name not in _SAID]
    asked += ["gradients"] if gradients else []
    return " ".join([dtype, size, *asked])


_SAID = ("GQA", "VALUE_HEAD_SIZE")


def rounded_up(size: int) -> int:
    """Return the smallest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


@dataclass(frozen=True)
class Choice:
    """What was found for one kind of call.

    Attributes:
        kind: of call.
        impl: the fastest right implementation; within the noise, the earlier one in the default order.
        default: what runs without measured choices.
        seconds: of one call, forward and, with gradients, backward.
        default_seconds: the same of `default`.
        created: when it was measured, in UTC, ISO 8601.
    """

    kind: Kind
    impl: str
    default: str
    seconds: float
    default_seconds: float
    created: str = ""

    @property
    def gain(self) -> float:
        """How many times faster than the default; 1 where that is what was chosen."""
        return self.default_seconds / self.seconds if self.impl != self.default else 1.0


@dataclass(frozen=True)
class Table:
    """The choices of one device with one set of versions.

    Attributes:
        device: its name, such as `NVIDIA H100 80GB HBM3`.
        capability: such as `9.0`, or of a CPU its vector instructions.
        versions: of torch, cuda, cudnn and triton, and of each distribution whose implementations were measured.
        choices: one for each kind of call.
    """

    device: str
    capability: str
    versions: Mapping[str, str | None]
    choices: tuple[Choice, ...] = ()

    @property
    def place(self) -> tuple[Any, ...]:
        """What two tables must have in common to be one."""
        return self.device, self.capability, tuple(sorted(self.versions.items()))

    def merged(self, other: Table) -> Table:
        """Return the choices of both; of one kind, those measured last."""
        choices = sorted((*self.choices, *other.choices), key=lambda choice: choice.created)
        return replace(self, choices=tuple({choice.kind: choice for choice in choices}.values()))


def joined(tables: Iterable[Table]) -> tuple[Table, ...]:
    """Return tables, one for each device and set of versions; of one kind of call, what was measured last."""
    found: dict[tuple[Any, ...], Table] = {}
    for one in tables:
        known = found.get(one.place)
        found[one.place] = one if known is None else known.merged(one)
    return tuple(found.values())
