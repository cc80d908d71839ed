"""The vocabulary: backends, features, capabilities, specifications, and the record of one call.

Nothing here imports torch: a plugin's light module and `attnplug list` need only these names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum, EnumMeta, IntEnum
from typing import Any

from attnplug._errors import SpecError, did_you_mean


class SDPBackend(IntEnum):
    """Families of kernels, with the values of `torch.nn.attention.SDPBackend`.

    Wherever one is accepted, PyTorch's own enum is accepted too.
    """

    ERROR = -1
    MATH = 0
    FLASH_ATTENTION = 1
    EFFICIENT_ATTENTION = 2
    CUDNN_ATTENTION = 3
    OVERRIDEABLE = 4


class CausalVariant(IntEnum):
    """Where the diagonal of query and key positions starts; values of `torch.nn.attention.bias.CausalVariant`.

    With `Sq` queries and `Sk` keys, query `i` stands at key position `i + off`: `off = 0` for
    `UPPER_LEFT` (PyTorch's meaning of `is_causal`), `off = Sk - Sq` for `LOWER_RIGHT`
    (FlashAttention's). Causal masks, windows and ALiBi distances all count from there.
    """

    UPPER_LEFT = 1
    LOWER_RIGHT = 2


class _Features(EnumMeta):
    def __getattr__(cls, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            close = "" if name.startswith("_") else did_you_mean(name, cls.__members__)
            raise AttributeError(f"Feature has no {name!r}{close}") from None


class Feature(Enum, metaclass=_Features):
    """What a call may ask of a kernel beyond `softmax(scale * q @ k.T) @ v`.

    The one list of features: capabilities, reasons, command line and documentation all read it. The
    value is the phrase that completes "does not support ...".
    """

    BOOLEAN_MASK = "a boolean attn_mask"
    ADDITIVE_MASK = "a floating attn_mask"
    MASK_GRADIENT = "the gradient of attn_mask"
    CAUSAL = "is_causal"
    UPPER_LEFT = "upper-left alignment of unequal query and key lengths"
    LOWER_RIGHT = "lower-right alignment of unequal query and key lengths"
    WINDOW = "window_size"
    SOFTCAP = "softcap"
    SINKS = "sinks"
    SINKS_GRADIENT = "the gradient of sinks"
    ALIBI = "alibi_slopes"
    DROPOUT = "dropout"
    GQA = "grouped queries (more query heads than key/value heads)"
    VALUE_HEAD_SIZE = "a value head size other than the query's"
    LSE = "return_lse"
    LSE_GRADIENT = "gradients through lse"
    SEQUSED_K = "seqused_k"
    VARLEN = "variable-length sequences (varlen_attn)"
    PAGED = "paged keys and values (block_table)"
    NESTED = "nested tensors"
    SECOND_DERIVATIVES = "second derivatives"
    DETERMINISTIC = "equal bits on repeated runs, backward included"


OPEN_WINDOW = (-1, -1)
"""The one tuple that an unrestricted window is in a checked call."""

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.\-]*")


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a kernel supports, stated so that it can be read without importing the kernel.

    `None` means no limit. Collections are kept as frozen sets, `head_sizes` as a range if it is one.

    Two statements joined with `|` mean "either": a kernel that does one thing on CPU and another on CUDA
    says `on_cpu | on_cuda`; the fields of the union are then the unions of the parts' fields, and
    `alternatives` holds the parts.

    Args:
        devices: torch device types, such as `("cpu", "cuda")`.
        dtypes: names of the query's dtype: float16, bfloat16, float32, float64 (torch dtypes are
            accepted).
        compute_capability: the least NVIDIA compute capability, such as `(8, 0)`.
        architectures: AMD architectures, such as `("gfx942",)`; matched by prefix, asked only on ROCm.
        head_sizes: the query head sizes; `range(8, 257, 8)` says multiples of 8 up to 256.
        features: the `Feature`s, beyond the plain formula.
        quantized: whether the kernel rounds its inputs to fewer bits. It is then right within 5 % of the result's
            norm, and runs only where it is named; lists say so. It holds for all that an implementation does.

    Raises:
        SpecError: a field has a wrong type or an unknown value, or `|` joins a quantized part and another.
    """

    devices: Collection[str] | None = None
    dtypes: Collection[str] | None = None
    compute_capability: tuple[int, int] | None = None
    architectures: Collection[str] | None = None
    head_sizes: Collection[int] | None = None
    features: Collection[Feature] = frozenset()
    quantized: bool = False
    alternatives: tuple[Capabilities, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "devices", _strings("devices", self.devices))
        put(self, "architectures", _strings("architectures", self.architectures))
        if self.dtypes is not None:
            names = [str(item).removeprefix("torch.") for item in _items("dtypes", self.dtypes)]
            for name in names:
                if name not in _DTYPES:
                    raise SpecError(
                        f"Capabilities.dtypes: unknown dtype {name!r}{did_you_mean(name, _DTYPES)}; "
                        f"accepted: {', '.join(_DTYPES)}"
                    )
            put(self, "dtypes", frozenset(names))
        if self.compute_capability is not None:
            put(self, "compute_capability", _pair("compute_capability", self.compute_capability))
        if self.head_sizes is not None and not isinstance(self.head_sizes, range):
            sizes = _items("head_sizes", self.head_sizes)
            if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
                raise SpecError(f"Capabilities.head_sizes: expected a range or integers, got {self.head_sizes!r}")
            put(self, "head_sizes", frozenset(sizes))
        put(self, "features", frozenset(_feature(item) for item in _items("features", self.features)))
        if not isinstance(self.quantized, bool):
            raise SpecError(f"Capabilities.quantized: expected a bool, got {self.quantized!r}")
        if not self.alternatives:
            put(self, "alternatives", (self,))

    def __or__(self, other: Capabilities) -> Capabilities:
        if not isinstance(other, Capabilities):
            return NotImplemented
        if self.quantized != other.quantized:
            raise SpecError(
                "Capabilities.quantized: one part is and the other is not; register two implementations, so that "
                "naming one says what is asked for"
            )
        return Capabilities(
            quantized=self.quantized,
            devices=_either(self.devices, other.devices),
            dtypes=_either(self.dtypes, other.dtypes),
            compute_capability=_least(self.compute_capability, other.compute_capability),
            architectures=_either(self.architectures, other.architectures),
            head_sizes=_either(self.head_sizes, other.head_sizes),
            features=frozenset(self.features) | frozenset(other.features),
            alternatives=self.alternatives + other.alternatives,
        )


@dataclass(frozen=True, kw_only=True)
class ImplSpec:
    """One implementation, as its author describes it.

    Args:
        name: what users write in `impl=`, scopes and `ATTNPLUG_IMPL`.
        kernel: where the kernel is: `"package.module"` or `"package.module:attribute"`, imported when
            first chosen; or, from a program, the object itself. It is a function (the forward), or
            anything with a `forward` and, optionally, `backward`, `supports`, `composite` and
            `shape_dependent`; see `Kernel`.
        backend: the family that `sdpa_kernel` scopes select by.
        capabilities: what it supports.
        priority: higher is preferred, among the implementations that stand behind `torch`.
        requires: modules that must be installed, such as `("triton",)` or `("flash_attn.cute",)`; without them
            the implementation is listed as unavailable, and its kernel is never imported.
        install: the command that brings what it requires, such as `pip install triton`; shown where that is missing.

    Raises:
        SpecError: a field has a wrong type or value.
    """

    name: str
    kernel: str | Callable[..., Any] | Any
    backend: SDPBackend | None
    capabilities: Capabilities = field(default_factory=Capabilities)
    priority: int = 0
    requires: Collection[str] = ()
    install: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise SpecError(
                f"ImplSpec.name: {self.name!r} is not a name; "
                f"start with a letter and use letters, digits, '_', '-', '.'"
            )
        where = f"ImplSpec {self.name!r}"
        if self.kernel is None or (isinstance(self.kernel, str) and not is_dotted_path(self.kernel)):
            raise SpecError(
                f"{where}.kernel: {self.kernel!r} is not a dotted path; "
                f"write 'package.module' or 'package.module:attribute'"
            )
        if self.backend is not None:
            object.__setattr__(self, "backend", as_backend(self.backend, f"{where}.backend"))
        if not isinstance(self.capabilities, Capabilities):
            raise SpecError(f"{where}.capabilities: expected Capabilities, got {type(self.capabilities).__name__}")
        if isinstance(self.priority, bool) or not isinstance(self.priority, int):
            raise SpecError(f"{where}.priority: expected an int, got {self.priority!r}")
        if not isinstance(self.install, str):
            raise SpecError(f"{where}.install: expected a command, got {self.install!r}")
        object.__setattr__(self, "requires", tuple(sorted(_strings("requires", self.requires, where) or ())))


@dataclass(frozen=True, eq=False)
class SDPAParams:
    """A read-only record of one call; building one checks nothing.

    The first seven fields are those of `torch.backends.cuda.SDPAParams`, in its order. What a kernel's
    forward receives is such a record, already checked and brought into one form:

    * dense: `query (B, Hq, Sq, E)`, `key (B, Hkv, Sk, E)`, `value (B, Hkv, Sk, Ev)`, `attn_mask` of
      four dimensions, each 1 or the full size of `(B, Hq, Sq, Sk)`;
    * variable length: `query (Tq, Hq, E)`, `key (Tk, Hkv, E)`, `value (Tk, Hkv, Ev)`, or pages
      `(pages, page_size, Hkv, E)` with `block_table`; `cu_seq_q`, `cu_seq_k` int32 of length B + 1;
    * `scale` is a number, `alibi_slopes` float32, and no size among B, Hq, Sq, Sk is zero.

    Attributes:
        query: the queries.
        key: the keys.
        value: the values.
        attn_mask: boolean, True takes part; or floating, added to the logits; or None.
        dropout: `dropout_p` of the call.
        is_causal: query `i` sees keys `j <= i + off`.
        enable_gqa: whether `Hq` may be a multiple of `Hkv`; a kernel looks at the shapes.
        scale: factor of the logits.
        causal_variant: alignment of causal masks, windows and ALiBi distances.
        window_size: `(left, right)`; -1 leaves a side open.
        softcap: 0 is off.
        sinks: `(Hq,)` or None.
        alibi_slopes: `(Hq,)` or `(B, Hq)` or None.
        seqused_k: int32 `(B,)` or None.
        return_lse: whether the caller wants `lse`.
        cu_seq_q: of a call of variable length; None in a dense one.
        cu_seq_k: likewise.
        max_q: the longest sequence of queries.
        max_k: the longest sequence of keys.
        block_table: int32 `(B, blocks)` or None.
    """

    query: Any
    key: Any
    value: Any
    attn_mask: Any = None
    dropout: float = 0.0
    is_causal: bool = False
    enable_gqa: bool = False
    scale: float | None = field(default=None, kw_only=True)
    causal_variant: CausalVariant = field(default=CausalVariant.UPPER_LEFT, kw_only=True)
    window_size: tuple[int, int] = field(default=OPEN_WINDOW, kw_only=True)
    softcap: float = field(default=0.0, kw_only=True)
    sinks: Any = field(default=None, kw_only=True)
    alibi_slopes: Any = field(default=None, kw_only=True)
    seqused_k: Any = field(default=None, kw_only=True)
    return_lse: bool = field(default=False, kw_only=True)
    cu_seq_q: Any = field(default=None, kw_only=True)
    cu_seq_k: Any = field(default=None, kw_only=True)
    max_q: int | None = field(default=None, kw_only=True)
    max_k: int | None = field(default=None, kw_only=True)
    block_table: Any = field(default=None, kw_only=True)

    @property
    def is_varlen(self) -> bool:
        """Whether this is a call of `varlen_attn`."""
        return self.cu_seq_q is not None

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """The shape of `lse`: `(B, Hq, Sq)`, or `(Hq, Tq)` in a call of variable length."""
        query = self.query
        return (query.shape[1], query.shape[0]) if self.is_varlen else tuple(query.shape[:-1])

    @property
    def lse_dtype(self) -> Any:
        """The dtype of `lse`: `torch.float64` for float64 queries, else `torch.float32`."""
        import torch

        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    @property
    def needs_grad(self) -> bool:
        """Whether autograd records this call."""
        import torch

        if not torch.is_grad_enabled():
            return False
        tensors = (self.query, self.key, self.value, self.attn_mask, self.sinks)
        return any(tensor is not None and tensor.requires_grad for tensor in tensors)


@dataclass(frozen=True)
class Verdict:
    """Whether an implementation takes a call, and each reason why not. Truthy if accepted.

    Attributes:
        name: of the implementation.
        backend: its family; None for `torch`.
        accepted: whether it takes the call.
        reasons: each reason why it would not run.
    """

    name: str
    backend: SDPBackend | None
    accepted: bool
    reasons: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.accepted


@dataclass(frozen=True)
class ImplRecord:
    """What is known of one implementation, as `list_impls()` returns it.

    A plugin that could not be loaded has one too, under its entry point's name.

    Attributes:
        name: of the implementation.
        backend: its family; None for `torch`, and where nothing is known.
        priority: higher is preferred, behind `torch`.
        distribution: the installed package that it comes from, or `this program`.
        version: of the distribution.
        capabilities: what it supports.
        status: `available`, `unavailable` (something it needs is not on this machine) or `broken` (it failed
            to load).
        reason: what is lacking or what failed; empty when it is available.
    """

    name: str
    backend: SDPBackend | None
    priority: int
    distribution: str
    version: str
    capabilities: Capabilities
    status: str
    reason: str


def as_backend(value: Any, argument: str) -> SDPBackend:
    """Return `value`, attnplug's or PyTorch's enum member, as an `SDPBackend` that names a family.

    Raises:
        SpecError: it is neither, or it is `ERROR`, which names no family.
    """
    accepted = ", ".join(f"SDPBackend.{member.name}" for member in SDPBackend if member is not SDPBackend.ERROR)
    if isinstance(value, SDPBackend) or type(value).__name__ in ("SDPBackend", "_SDPBackend"):
        backend = SDPBackend(int(value))
        if backend is not SDPBackend.ERROR:
            return backend
    raise SpecError(f"{argument}: expected one of {accepted}; got {value!r}")


def is_dotted_path(path: str) -> bool:
    """Whether `path` reads `package.module` or `package.module:attribute`."""
    module, _, attribute = path.partition(":")
    parts = module.split(".") + (attribute.split(".") if ":" in path else [])
    return all(part.isidentifier() for part in parts)


def _items(name: str, value: Any) -> list[Any]:
    if isinstance(value, (str, Enum)) or not isinstance(value, Iterable):
        raise SpecError(f"Capabilities.{name}: expected a collection, got {value!r}; write ({value!r},)")
    return list(value)


def _strings(name: str, value: Any, where: str = "Capabilities") -> frozenset[str] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Iterable) or not all(isinstance(item, str) for item in value):
        raise SpecError(f"{where}.{name}: expected a collection of strings, got {value!r}")
    return frozenset(value)


def _pair(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(type(item) is int for item in value):
        raise SpecError(f"Capabilities.{name}: expected two integers such as (8, 0), got {value!r}")
    return (value[0], value[1])


def _feature(item: Any) -> Feature:
    if isinstance(item, Feature):
        return item
    known = [feature.name for feature in Feature]
    raise SpecError(
        f"Capabilities.features: {item!r} is not a Feature{did_you_mean(str(item).upper(), known) or ';'} "
        f"Known: {', '.join(known)}"
    )


def _either(one: Any, other: Any) -> Any:
    return None if one is None or other is None else frozenset(one) | frozenset(other)


def _least(one: tuple[int, int] | None, other: tuple[int, int] | None) -> tuple[int, int] | None:
    return None if one is None or other is None else min(one, other)
