"""One attention problem as plain data, and its cost in operations and bytes, whatever kernel computes it.

The work is a property of the problem: a kernel that skips nothing of a causal mask is given no credit for the
half that is not needed. That is what makes TFLOP/s of different kernels comparable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from attnplug._errors import did_you_mean
from attnplug.bench._errors import BenchError
from attnplug.bench._validate import FLAGS, LENGTHS, NUMBERS, check, check_lengths

if TYPE_CHECKING:
    import torch

BACKWARD = 2.5
"""Five products against two: the scores again, and one for each of dP, dV, dQ and dK."""

_DEFAULTS = {"kv_heads": "heads", "keys": "queries", "value_head_size": "head_size"}
_FOLLOWS: Any = None
"""The default of a field that follows from others where it is not given; afterwards it is a number."""
_GRADIENTS = {"attn_mask": "mask_gradient", "sinks": "sinks_gradient"}
_SHRUNK = 64


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention problem: `query (batch, heads, queries, head_size)`, `key (batch, kv_heads, keys, head_size)`,
    `value (batch, kv_heads, keys, value_head_size)`. With `lengths_q` a call of `varlen_attn`, its sequences packed.

    Args:
        name: what reports call it; by default a short description.
        batch: at least 1, as every size; of packed sequences, how many there are, which need not be said.
        heads: query heads.
        queries: their number, 1024 by default; of packed sequences `max_q`, by default the longest.
        head_size: of query and key.
        kv_heads: key and value heads, a divisor of `heads`, its default.
        keys: their number; by default that of the queries; of packed sequences `max_k`, likewise.
        value_head_size: by default the head size.
        causal: query `i` sees keys up to `i`, or, with `causal_variant="LOWER_RIGHT"`, up to `i + keys - queries`.
        causal_variant: `UPPER_LEFT` or `LOWER_RIGHT`.
        mask: `boolean` or `additive`, with random entries; empty for none.
        mask_dims: its dimensions: each a letter of `bhqk` or, where it broadcasts, 1.
        window: `(left, right)` keys around a query's position; -1 leaves a side open.
        softcap: of the logits; 0 is off.
        sinks: one more logit in the denominator of each head.
        alibi: a slope for each query head.
        dropout: the probability with which a probability is zeroed, below 1.
        lse: ask for the logsumexp too.
        lengths_q: of packed sequences, how many queries each has; aligned to the lower right.
        lengths_k: how many keys each has; by default as many.
        used: `seqused_k`: how many keys of each sequence exist.
        page_size: keys and values lie in shuffled pages of so many; for packed sequences alone.
        dtype: float16, bfloat16, float32 or float64.
        device: `cpu`, `cuda`, `cuda:1`.
        backward: measure the gradients of query, key and value too.
        mask_gradient: and that of an additive mask.
        sinks_gradient: and that of the sinks.

    Raises:
        BenchError: a field has a wrong type or value.

    Examples:
        >>> from attnplug.bench import Case
        >>> case = Case(heads=4, queries=2, head_size=8, causal=True)
        >>> case.pairs, case.forward_flops  # 3 of 4 scores, for each 4 * 8 + 2 operations, in 4 heads
        (3, 408)
    """

    name: str = ""
    batch: int = _FOLLOWS
    heads: int = 8
    kv_heads: int = _FOLLOWS
    queries: int = _FOLLOWS
    keys: int = _FOLLOWS
    head_size: int = 64
    value_head_size: int = _FOLLOWS
    causal: bool = False
    causal_variant: str = "UPPER_LEFT"
    mask: str = ""
    mask_dims: str = "b1qk"
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    dropout: float = 0.0
    lse: bool = False
    lengths_q: tuple[int, ...] | None = None
    lengths_k: tuple[int, ...] | None = None
    used: tuple[int, ...] | None = None
    page_size: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    backward: bool = False
    mask_gradient: bool = False
    sinks_gradient: bool = False

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in LENGTHS:
            put(self, name, _as_tuple(getattr(self, name)))
        if self.is_varlen:
            check_lengths(self)
            put(self, "lengths_k", self.lengths_q if self.lengths_k is None else self.lengths_k)
            put(self, "causal_variant", "LOWER_RIGHT")
        longest = {"batch": 1, "queries": 1024} if self.lengths_q is None else _sizes_of(self.lengths_q, self.lengths_k)
        for name, size in longest.items():
            if getattr(self, name) is None:
                put(self, name, size)
        for name, source in _DEFAULTS.items():
            if getattr(self, name) is None:
                put(self, name, getattr(self, source))
        put(self, "dtype", str(self.dtype).removeprefix("torch."))
        put(self, "device", str(self.device))
        put(self, "window", _as_tuple(self.window))
        check(self)
        if not self.name:
            put(self, "name", self.label())

    def but(self, **changes: Any) -> Case:
        """Return this case with some fields changed.

        A field that equals the one that it has its default from follows it: keys the queries, `kv_heads` the
        heads, the value head size the head size. A name that only describes the case is made anew. With other lengths
        of packed sequences, what follows from them does.
        """
        if "lengths_q" in changes:
            changes = {"batch": None, "queries": None, "keys": None, "lengths_k": None, "used": None, **changes}
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
        lengths = {
            name: None if (given := getattr(self, name)) is None else tuple(-(-size // _SHRUNK) for size in given[:2])
            for name in LENGTHS
        }
        return self.but(
            **lengths,
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
        if self.is_varlen:
            rows, keys = self.rows, self.key_rows
            parts.append(f"packed{rows}" + (f"x{keys}" if keys != rows else ""))
        if self.causal:
            aligned = self.causal_variant == "UPPER_LEFT" or self.is_varlen
            parts.append("causal" if aligned else "causal-lower-right")
        if self.window != (-1, -1):
            parts.append(f"window{self.window[0]},{self.window[1]}")
        if self.mask:
            parts.append(f"{self.mask}-mask" + (f"-{self.mask_dims}" if self.mask_dims != "b1qk" else ""))
        parts += [f"{name}{getattr(self, name):g}" for name in NUMBERS if getattr(self, name)]
        parts += [name.replace("_", "-") for name in FLAGS if getattr(self, name)]
        parts += [f"used{sum(self.used)}"] if self.used is not None else []
        parts += [f"pages-of-{self.page_size}"] if self.page_size is not None else []
        return " ".join([*parts, self.dtype, *(["fwd+bwd"] if self.backward else [])])

    @property
    def length(self) -> str:
        """The lengths: one number, or queries x keys where they differ."""
        return str(self.queries) if self.queries == self.keys else f"{self.queries}x{self.keys}"

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype)

    @property
    def is_varlen(self) -> bool:
        """Whether this is a call of `varlen_attn`."""
        return self.lengths_q is not None

    @property
    def leaves(self) -> tuple[str, ...]:
        """The arguments whose gradients are measured."""
        wanted = tuple(name for name, asked in _GRADIENTS.items() if getattr(self, asked))
        return ("query", "key", "value", *wanted) if self.backward else ()

    @property
    def rows(self) -> int:
        """How many queries there are in all sequences."""
        return self.batch * self.queries if self.lengths_q is None else sum(self.lengths_q)

    @property
    def key_rows(self) -> int:
        """How many keys there are in all sequences."""
        return self.batch * self.keys if self.lengths_k is None else sum(self.lengths_k)

    @cached_property
    def pairs(self) -> int:
        """How many pairs of query and key take part in one head of one sequence: what causality and window leave.

        Of sequences that differ in length, in all of them.
        """
        if self._are_alike:
            return self._pairs(self.queries, self.keys)
        lengths_k = self.used or self.lengths_k or ()
        return sum(map(self._pairs, self.lengths_q or (self.queries,) * self.batch, lengths_k))

    def _pairs(self, queries: int, keys: int) -> int:
        """Return how many take part where a sequence has so many queries and keys, without counting them."""
        left, right = self.window
        right = 0 if self.causal else right
        offset = keys - queries if self.causal_variant == "LOWER_RIGHT" else 0

        def up_to(distance: int) -> int:
            """Return how many pairs have a key that lies at most `distance` behind its query."""
            start = offset + distance
            return _sum_to(start + queries, keys) - _sum_to(start, keys)

        seen = up_to(right) if right >= 0 else queries * keys
        return seen - (up_to(-left - 1) if left >= 0 else 0)

    @property
    def _are_alike(self) -> bool:
        """Whether all sequences have the same lengths."""
        return self.lengths_q is None and self.used is None

    @property
    def forward_flops(self) -> int:
        """Operations of forward: each pair costs `2 E` for its score, 2 for the softmax, `2 Ev` for the values."""
        pairs = self.pairs * (self.batch if self._are_alike else 1)
        return self.heads * pairs * (2 * self.head_size + 2 + 2 * self.value_head_size)

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
        lse = 4 * self.heads * self.rows
        return self._inputs + self._tensors + 2 * self._outputs + lse

    @property
    def _tensors(self) -> int:
        """Bytes of query, key and value."""
        existing = self.key_rows if self.used is None else sum(self.used)
        keys = self.kv_heads * existing * (self.head_size + self.value_head_size)
        return (self.heads * self.rows * self.head_size + keys) * self.torch_dtype.itemsize

    @property
    def _inputs(self) -> int:
        entries = math.prod(self.mask_shape)
        sizes = {"": 0, "boolean": 1, "additive": self.torch_dtype.itemsize}
        return self._tensors + entries * sizes[self.mask]

    @property
    def _outputs(self) -> int:
        return self.heads * self.rows * self.value_head_size * self.torch_dtype.itemsize

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """The shape of a mask."""
        full = {"b": self.batch, "h": self.heads, "q": self.queries, "k": self.keys}
        return tuple(full.get(letter, 1) for letter in self.mask_dims)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, given: Any, where: str = "case") -> Case:
        """Return the case that `given` describes, a mapping of fields.

        Raises:
            BenchError: a field that there is not, or a wrong value; `where` stands before the message.
        """
        check_fields(given, where)
        try:
            return cls(**given)
        except BenchError as error:
            raise BenchError(f"{where}: {error}") from None


def _as_tuple(given: Any) -> Any:
    """Return what JSON and YAML have as a list."""
    return tuple(given) if isinstance(given, list) else given


def _sizes_of(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...] | None) -> dict[str, int]:
    return {"batch": len(lengths_q), "queries": max(lengths_q), "keys": max(lengths_k or lengths_q)}


def _sum_to(n: int, most: int) -> int:
    """Return the sum of the numbers from 1 to `n`, of which those above `most` count as that; 0 for `n` below 1."""
    rising = min(max(n, 0), most)
    return rising * (rising + 1) // 2 + (max(n, 0) - rising) * most


def check_fields(given: Any, where: str, also: Sequence[str] = ()) -> None:
    """Refuse what is no mapping of fields of a case, or of what `also` stands for some of them.

    Raises:
        BenchError: what it has that there is not; `where` stands before the message.
    """
    if not isinstance(given, dict):
        raise BenchError(f"{where}: expected fields such as heads and queries, got {given!r}")
    known = [*also, *(field.name for field in fields(Case))]
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known)
            raise BenchError(f"{where}: no field {name!r}{hint or ';'} the fields are {', '.join(known)}")
