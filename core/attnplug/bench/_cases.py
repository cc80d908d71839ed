"""One attention problem as plain data, and what it costs by arithmetic, whoever computes it.

The work is a property of the problem: a kernel that skips nothing of a causal mask is given no credit for the
half that nobody needs. That is what makes TFLOP/s of different kernels comparable.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from attnplug._errors import did_you_mean
from attnplug.bench._errors import BenchError

if TYPE_CHECKING:
    import torch

MASKS = ("", "boolean", "additive")
VARIANTS = ("UPPER_LEFT", "LOWER_RIGHT")
DTYPES = ("float16", "bfloat16", "float32", "float64")
BACKWARD = 2.5
"""Five products against two: the scores again, and one for each of dP, dV, dQ and dK."""

_SIZES = ("batch", "heads", "kv_heads", "queries", "keys", "head_size", "value_head_size")
_NUMBERS = ("softcap", "dropout")
_MORE = ("sinks", "alibi", "lse")
_DEFAULTS = {"kv_heads": "heads", "keys": "queries", "value_head_size": "head_size"}
_SHRUNK = 64


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention problem: `query (batch, heads, queries, head_size)`, `key (batch, kv_heads, keys, head_size)`,
    `value (batch, kv_heads, keys, value_head_size)`.

    Args:
        name: what reports call it; by default a short description.
        batch: at least 1, as every size.
        heads: query heads.
        queries: their number.
        head_size: of query and key.
        kv_heads: key and value heads, a divisor of `heads`, its default.
        keys: their number; by default that of the queries.
        value_head_size: by default the head size.
        causal: query `i` sees keys up to `i`, or, with `causal_variant="LOWER_RIGHT"`, up to `i + keys - queries`.
        causal_variant: `UPPER_LEFT` or `LOWER_RIGHT`.
        mask: `boolean` or `additive`, of shape `(batch, 1, queries, keys)`, with random entries; empty for none.
        window: `(left, right)` keys around a query's position; -1 leaves a side open.
        softcap: of the logits; 0 is off.
        sinks: one more logit in the denominator of each head.
        alibi: a slope for each query head.
        dropout: the probability with which a probability is zeroed, below 1.
        lse: ask for the logsumexp too.
        dtype: float16, bfloat16, float32 or float64.
        device: `cpu`, `cuda`, `cuda:1`.
        backward: measure the gradients of query, key and value too.

    Raises:
        BenchError: a field has a wrong type or value.

    Examples:
        >>> from attnplug.bench import Case
        >>> case = Case(heads=4, queries=2, head_size=8, causal=True)
        >>> case.pairs, case.forward_flops  # 3 of 4 scores, for each 4 * 8 + 2 operations, in 4 heads
        (3, 408)
    """

    name: str = ""
    batch: int = 1
    heads: int = 8
    kv_heads: int = None  # type: ignore[assignment]  # filled below
    queries: int = 1024
    keys: int = None  # type: ignore[assignment]
    head_size: int = 64
    value_head_size: int = None  # type: ignore[assignment]
    causal: bool = False
    causal_variant: str = "UPPER_LEFT"
    mask: str = ""
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    dropout: float = 0.0
    lse: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    backward: bool = False

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name, source in _DEFAULTS.items():
            if getattr(self, name) is None:
                put(self, name, getattr(self, source))
        put(self, "dtype", str(self.dtype).removeprefix("torch."))
        put(self, "device", str(self.device))
        put(self, "window", tuple(self.window) if isinstance(self.window, (list, tuple)) else self.window)
        _check(self)
        if not self.name:
            put(self, "name", self.label())

    def but(self, **changes: Any) -> Case:
        """Return this case with some fields changed.

        A field that equals the one that it has its default from follows it: keys the queries, `kv_heads` the
        heads, the value head size the head size. A name that only describes the case is made anew.
        """
        for name, source in _DEFAULTS.items():
            if source in changes and getattr(self, name) == getattr(self, source):
                changes.setdefault(name, None)
        if self.name == self.label():
            changes.setdefault("name", "")
        return replace(self, **changes)

    def shrunk(self) -> Case:
        """Return a case of the same kind that takes no time: to see that everything runs, not to measure.

        At most two sequences, two key and value heads, and lengths divided by 64.
        """
        kv_heads = min(self.kv_heads, 2)
        return self.but(
            batch=min(self.batch, 2),
            heads=self.heads // self.kv_heads * kv_heads,
            kv_heads=kv_heads,
            queries=-(-self.queries // _SHRUNK),
            keys=-(-self.keys // _SHRUNK),
            window=tuple(-(-side // _SHRUNK) if side > 0 else side for side in self.window),
        )

    def label(self) -> str:
        """Return what the case is, such as `B1 H32/8 S1x4096 D128 causal bfloat16`."""
        heads = f"H{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads != self.heads else "")
        sizes = f"D{self.head_size}" + (f"/{self.value_head_size}" if self.value_head_size != self.head_size else "")
        parts = [f"B{self.batch}", heads, f"S{self.length}", sizes]
        if self.causal:
            parts.append("causal" if self.causal_variant == "UPPER_LEFT" else "causal-lower-right")
        if self.window != (-1, -1):
            parts.append(f"window{self.window[0]},{self.window[1]}")
        if self.mask:
            parts.append(f"{self.mask}-mask")
        parts += [f"{name}{getattr(self, name):g}" for name in _NUMBERS if getattr(self, name)]
        parts += [name for name in _MORE if getattr(self, name)]
        return " ".join([*parts, self.dtype, *(["fwd+bwd"] if self.backward else [])])

    @property
    def length(self) -> str:
        """The lengths: one number, or queries x keys where they differ."""
        return str(self.queries) if self.queries == self.keys else f"{self.queries}x{self.keys}"

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def offset(self) -> int:
        """The key position of query 0."""
        return self.keys - self.queries if self.causal_variant == "LOWER_RIGHT" else 0

    @cached_property
    def pairs(self) -> int:
        """How many pairs of query and key take part in one head: what causality and window leave."""
        left, right = self.window
        count = 0
        for position in range(self.offset, self.offset + self.queries):
            first = max(0, position - left) if left >= 0 else 0
            last = min(self.keys - 1, position + right) if right >= 0 else self.keys - 1
            last = min(last, position) if self.causal else last
            count += max(0, last - first + 1)
        return count

    @property
    def forward_flops(self) -> int:
        """Operations of forward: each pair costs `2 E` for its score, 2 for the softmax, `2 Ev` for the values."""
        return self.batch * self.heads * self.pairs * (2 * self.head_size + 2 + 2 * self.value_head_size)

    @property
    def backward_flops(self) -> float:
        """Operations of backward: 2.5 times those of forward."""
        return BACKWARD * self.forward_flops

    @property
    def forward_bytes(self) -> int:
        """Bytes that forward must at least move: each input read once, the output written once."""
        return self._inputs + self._outputs

    @property
    def backward_bytes(self) -> int:
        """The same of backward: inputs, out, its gradient and lse (4 bytes a row) read, three gradients written."""
        lse = 4 * self.batch * self.heads * self.queries
        return self._inputs + self._tensors + 2 * self._outputs + lse

    @property
    def _tensors(self) -> int:
        """Bytes of query, key and value."""
        keys = self.kv_heads * self.keys * (self.head_size + self.value_head_size)
        return self.batch * (self.heads * self.queries * self.head_size + keys) * self.torch_dtype.itemsize

    @property
    def _inputs(self) -> int:
        entries = self.batch * self.queries * self.keys
        sizes = {"": 0, "boolean": 1, "additive": self.torch_dtype.itemsize}
        return self._tensors + entries * sizes[self.mask]

    @property
    def _outputs(self) -> int:
        return self.batch * self.heads * self.queries * self.value_head_size * self.torch_dtype.itemsize

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return {**asdict(self), "window": list(self.window)}

    @classmethod
    def from_dict(cls, given: Any, where: str = "case") -> Case:
        """Return the case that `given` describes, a mapping of fields.

        Raises:
            BenchError: a field that there is not, or a wrong value; `where` stands before the message.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(given, dict):
            raise BenchError(f"{where}: expected fields such as heads and queries, got {given!r}")
        for name in given:
            if name not in known:
                hint = did_you_mean(name, known)
                raise BenchError(f"{where}: no field {name!r}{hint}; the fields are {', '.join(known)}")
        try:
            return cls(**given)
        except BenchError as error:
            raise BenchError(f"{where}: {error}") from None


def _check(case: Case) -> None:
    for name in _SIZES:
        size = getattr(case, name)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise BenchError(f"{name}: expected a number from 1 on, got {size!r}")
    if case.heads % case.kv_heads:
        raise BenchError(f"kv_heads: expected a divisor of heads ({case.heads}), got {case.kv_heads}")
    for name, known in (("mask", MASKS), ("causal_variant", VARIANTS), ("dtype", DTYPES)):
        if not isinstance(getattr(case, name), str) or getattr(case, name) not in known:
            accepted = ", ".join(repr(item) for item in known)
            raise BenchError(f"{name}: expected one of {accepted}, got {getattr(case, name)!r}")
    for name in ("causal", "backward", *_MORE):
        if not isinstance(getattr(case, name), bool):
            raise BenchError(f"{name}: expected true or false, got {getattr(case, name)!r}")
    for name in _NUMBERS:
        value, most = getattr(case, name), 1.0 if name == "dropout" else math.inf
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < most:
            raise BenchError(f"{name}: expected a number from 0 on, below {most:g}, got {value!r}")
    window = case.window
    sides = isinstance(window, tuple) and len(window) == 2 and all(type(side) is int and side >= -1 for side in window)
    if not sides:
        raise BenchError(f"window: expected two numbers from -1 on, such as [256, 0], got {window!r}")
    if not isinstance(case.name, str):
        raise BenchError(f"name: expected text, got {case.name!r}")
    device_type(case.device)


def device_type(device: str) -> str:
    """Return `cpu`, `cuda`, ...

    Raises:
        BenchError: PyTorch knows no such device.
    """
    if re.fullmatch(r"cpu|cuda(:\d+)?", device):  # `bench compare` reads a report without PyTorch
        return device.partition(":")[0]
    import torch

    try:
        return torch.device(device).type
    except RuntimeError:
        raise BenchError(f"device: {device!r} is not a device; examples: cpu, cuda, cuda:1") from None
