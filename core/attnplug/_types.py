"""The vocabulary: backends, features, capabilities and specifications; the record of a call is in `_params`.

Nothing here imports torch: a plugin's light module and `attnplug list` need only these names.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum, EnumMeta, IntEnum
from typing import TYPE_CHECKING, Any

from attnplug._arguments import as_list, shown
from attnplug._errors import SpecError, did_you_mean
from attnplug._params import OPEN_WINDOW as OPEN_WINDOW
from attnplug._params import WIDEST as WIDEST
from attnplug._params import CausalVariant as CausalVariant
from attnplug._params import SDPAParams as SDPAParams
from attnplug._version import __version__

if TYPE_CHECKING:
    from torch import dtype
    from torch.nn.attention import SDPBackend as TorchBackend


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


FAMILIES = {member.name: member for member in SDPBackend if member is not SDPBackend.ERROR}
"""By name."""


class _Features(EnumMeta):
    if not TYPE_CHECKING:  # with it, a type checker would let every name pass

        def __getattr__(cls, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                close = "" if name.startswith("_") else did_you_mean(name, cls.__members__)
                raise AttributeError(f"Feature of attnplug {__version__} has no {name!r}{close}") from None


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


DTYPES = ("float16", "bfloat16", "float32", "float64")
"""Of queries, by name."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.\-]*")


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a kernel supports, declared so that it can be read without importing the kernel.

    `None` means no limit. Collections are kept as frozen sets, `head_sizes` as a range if it is one.

    Two declarations joined with `|` mean "either": a kernel that supports one thing on CPU and another on CUDA
    says `on_cpu | on_cuda`; the fields of the union are then the unions of the parts' fields, and
    `alternatives` holds the parts.

    Args:
        devices: torch device types, such as `("cpu", "cuda")`.
        dtypes: of the query: float16, bfloat16, float32, float64, by name or as torch's own.
        compute_capability: the minimum NVIDIA compute capability, such as `(8, 0)`.
        architectures: AMD architectures, such as `("gfx942",)`; matched by prefix, only on ROCm.
        head_sizes: the query head sizes; `range(8, 257, 8)` says multiples of 8 up to 256.
        features: the `Feature`s, or their names, beyond the plain formula.
        quantized: whether the kernel rounds its inputs to fewer bits. It is then right within 5 % of the result's
            norm, and runs only where it is named; lists say so. It holds for all that an implementation does.
        dense: whether dense calls are taken at all; False for a kernel of `varlen_attn` alone.

    Raises:
        SpecError: a field has a wrong type or an unknown value, or `|` joins a quantized part and another.
    """

    devices: frozenset[str] | None = None
    dtypes: frozenset[str] | None = None
    compute_capability: tuple[int, int] | None = None
    architectures: frozenset[str] | None = None
    head_sizes: range | frozenset[int] | None = None
    features: frozenset[Feature] = frozenset()
    quantized: bool = False
    dense: bool = True
    alternatives: tuple[Capabilities, ...] = field(default=(), repr=False, compare=False)

    if TYPE_CHECKING:  # more is accepted than is kept

        def __init__(
            self,
            *,
            devices: Collection[str] | None = None,
            dtypes: Collection[str | dtype] | None = None,
            compute_capability: tuple[int, int] | None = None,
            architectures: Collection[str] | None = None,
            head_sizes: Collection[int] | None = None,
            features: Collection[Feature | str] | type[Feature] = (),
            quantized: bool = False,
            dense: bool = True,
            alternatives: tuple[Capabilities, ...] = (),
        ) -> None: ...

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in ("devices", "architectures"):
            if (value := getattr(self, name)) is not None:
                put(self, name, _strings(f"Capabilities.{name}", value))
        for name in self.devices or ():
            if name == "gpu" or not name.isidentifier():
                raise SpecError(
                    f"Capabilities.devices: {name!r} is not a type of device; write 'cuda', 'cpu' or another "
                    f"`torch.device(...).type`"
                )
        if self.dtypes is not None:
            names = [str(item).removeprefix("torch.") for item in _items("Capabilities.dtypes", self.dtypes)]
            for name in names:
                if name not in DTYPES:
                    raise SpecError(
                        f"Capabilities.dtypes: unknown dtype {name!r}{did_you_mean(name, DTYPES) or ';'} "
                        f"attnplug {__version__} accepts {', '.join(DTYPES)}"
                    )
            put(self, "dtypes", frozenset(names))
        if self.compute_capability is not None:
            put(self, "compute_capability", _pair("Capabilities.compute_capability", self.compute_capability))
        if self.head_sizes is not None and not isinstance(self.head_sizes, range):
            sizes = _items("Capabilities.head_sizes", self.head_sizes)
            if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
                raise SpecError(f"Capabilities.head_sizes: expected a range or integers, got {self.head_sizes!r}")
            put(self, "head_sizes", frozenset(sizes))
        if self.head_sizes and min(self.head_sizes) < 1:
            raise SpecError(f"Capabilities.head_sizes: expected sizes of 1 and above, got {self.head_sizes!r}")
        put(self, "features", frozenset(_feature(item) for item in _items("Capabilities.features", self.features)))
        for name in ("quantized", "dense"):
            if not isinstance(value := getattr(self, name), bool):
                raise SpecError(f"Capabilities.{name}: expected a bool, got {value!r}")
        if not self.dense and Feature.VARLEN not in self.features:
            raise SpecError("Capabilities.dense: without dense calls features must hold Feature.VARLEN")
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
            dense=self.dense or other.dense,
            alternatives=self.alternatives + other.alternatives,
        )


@dataclass(frozen=True, kw_only=True)
class ImplSpec:
    """One implementation, as its author declares it.

    Args:
        name: what users write in `impl=`, scopes and `ATTNPLUG_IMPL`; not that of a family, such as `math`.
        kernel: where the kernel is: `"package.module"` or `"package.module:attribute"`, imported when it is
            first chosen, or asked whether it takes a call; or, from a program, the object itself. It is a function
            (the forward), or a module or object with a `forward` and whatever else `Kernel` lists; an attribute that
            looks like one of those and is not is an error.
        backend: the family that `sdpa_kernel` scopes select by; None for none, so that it runs in a scope only where
            it is named.
        capabilities: what it supports.
        priority: higher is preferred among those of one rank: `torch` stands first, attnplug's own implementations
            next, all others last, whatever priority they claim.
        requires: modules that must be installed, such as `("triton",)` or `("flash_attn.cute",)`; without them
            the implementation is listed as unavailable, and its kernel is never imported.
        install: the command that installs what it requires, such as `pip install triton`; shown where that is missing.
        named_only: whether it runs only where it is named: by `impl=`, a scope, an activation or the environment.

    Raises:
        SpecError: a field has a wrong type or value.
    """

    name: str
    kernel: Any
    backend: SDPBackend | None
    capabilities: Capabilities = field(default_factory=Capabilities)
    priority: int = 0
    requires: tuple[str, ...] = ()
    install: str = ""
    named_only: bool = False

    if TYPE_CHECKING:  # more is accepted than is kept

        def __init__(
            self,
            *,
            name: str,
            kernel: object,
            backend: SDPBackend | TorchBackend | None,
            capabilities: Capabilities = ...,
            priority: int = 0,
            requires: Collection[str] = (),
            install: str = "",
            named_only: bool = False,
        ) -> None: ...

    def __post_init__(self) -> None:
        check_own_name(self.name, "ImplSpec.name")
        where = f"ImplSpec {self.name!r}"
        if self.kernel is None or (isinstance(self.kernel, str) and not is_dotted_path(self.kernel)):
            raise SpecError(
                f"{where}.kernel: {self.kernel!r} is not a dotted path; "
                f"write 'package.module' or 'package.module:attribute'"
            )
        if not (isinstance(self.kernel, str) or callable(self.kernel) or hasattr(self.kernel, "forward")):
            raise SpecError(
                f"{where}.kernel: expected a dotted path, a function, or a module or object with a forward, "
                f"got {shown(self.kernel)}"
            )
        if self.backend is not None:
            object.__setattr__(self, "backend", as_backend(self.backend, f"{where}.backend"))
        if not isinstance(self.capabilities, Capabilities):
            raise SpecError(f"{where}.capabilities: expected Capabilities, got {type(self.capabilities).__name__}")
        if isinstance(self.priority, bool) or not isinstance(self.priority, int):
            raise SpecError(f"{where}.priority: expected an int, got {self.priority!r}")
        if not isinstance(self.install, str):
            raise SpecError(f"{where}.install: expected a command, got {self.install!r}")
        if not isinstance(self.named_only, bool):
            raise SpecError(f"{where}.named_only: expected a bool, got {self.named_only!r}")
        object.__setattr__(
            self,
            "requires",
            tuple(sorted(_strings(f"{where}.requires", () if self.requires is None else self.requires))),
        )


@dataclass(frozen=True)
class Verdict:
    """Whether an implementation takes a call, and each reason why not. Truthy if accepted.

    Attributes:
        name: of the implementation.
        backend: its family; None for `torch`, and for any other that belongs to none.
        accepted: whether it takes the call.
        reasons: each reason why it would not run.
        notes: what the implementation says of how it would run the call, such as which of its kernels does.
    """

    name: str
    backend: SDPBackend | None
    accepted: bool
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.accepted


@dataclass(frozen=True)
class ImplRecord:
    """What is known of one implementation, as `list_impls()` returns it.

    A plugin that could not be loaded, or that the environment keeps from loading, has one too, under its entry
    point's name. Of two implementations with one name, both are listed.

    Attributes:
        name: of the implementation.
        backend: its family; None for `torch`, for any other that belongs to none, and where nothing is known.
        priority: higher is preferred among those of one rank; see `ImplSpec`.
        distribution: the installed package that it comes from, or `this program`.
        version: of the distribution.
        capabilities: what it supports; no device and no dtype where the plugin was not, or could not be, loaded.
        status: `available`, `unavailable` (something it needs is not on this machine, or the environment
            keeps its plugin from loading) or `broken` (it failed to load, or another claims its name).
        reason: what is lacking or what failed; empty when it is available.
        remedy: the command that fixes it; empty when it is available, and where no command can.
        entry_point: the name of the entry point that brought it, which `ATTNPLUG_LOAD` and `ATTNPLUG_DISABLE` take;
            empty for what is built in or registered by a program.
        module: the module, or the object in one, that the entry point names.
        kernel: the dotted path of the kernel; empty where it is an object of a program, or nothing is known.
    """

    name: str
    backend: SDPBackend | None
    priority: int
    distribution: str
    version: str
    capabilities: Capabilities
    status: str
    reason: str
    remedy: str = ""
    entry_point: str = ""
    module: str = ""
    kernel: str = ""


def check_own_name(name: Any, argument: str) -> None:
    """Raise SpecError unless an implementation may be called so."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SpecError(
            f"{argument}: {name!r} is not a name; start with a letter and use letters, digits, '_', '-', '.'"
        )
    if name.upper() in FAMILIES:
        raise SpecError(f"{argument}: {name!r} is the name of a family of implementations; choose another")


def as_backend(value: Any, argument: str) -> SDPBackend:
    """Return `value`, attnplug's or PyTorch's enum member, as an `SDPBackend` that names a family.

    Raises:
        SpecError: it is neither, or it is `ERROR`, which names no family.
    """
    accepted = ", ".join(f"SDPBackend.{name}" for name in FAMILIES)
    if isinstance(value, SDPBackend) or type(value).__name__ in ("SDPBackend", "_SDPBackend"):
        backend = SDPBackend(int(value))
        if backend is not SDPBackend.ERROR:
            return backend
    raise SpecError(f"{argument}: expected one of {accepted}; got {value!r}")


def family(backend: SDPBackend | None) -> str:
    """Return the name of a family as tables show it: a dash for none. (MATH is 0, hence false.)"""
    return "-" if backend is None else backend.name


def is_dotted_path(path: str) -> bool:
    """Whether `path` reads `package.module` or `package.module:attribute`."""
    module, _, attribute = path.partition(":")
    parts = module.split(".") + (attribute.split(".") if ":" in path else [])
    return all(part.isidentifier() for part in parts)


def _items(field: str, value: Any, wanted: str = "a collection") -> list[Any]:
    if isinstance(value, (str, Enum)):
        raise SpecError(f"{field}: expected {wanted}, got {value!r}; write ({value!r},)")
    try:
        return as_list(field, value, wanted)
    except TypeError as error:
        raise SpecError(str(error)) from None


def _strings(field: str, value: Any) -> frozenset[str]:
    items = _items(field, value, "a collection of strings")
    if not all(isinstance(item, str) for item in items):
        raise SpecError(f"{field}: expected a collection of strings, got {value!r}")
    for item in items:
        if not item.isprintable():  # reasons quote it, and go to terminals
            raise SpecError(f"{field}: {item!r} holds characters that do not print")
    return frozenset(items)


def _pair(field: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(type(item) is int for item in value):
        raise SpecError(f"{field}: expected two integers such as (8, 0), got {value!r}")
    return (value[0], value[1])


def _feature(item: Any) -> Feature:
    if isinstance(item, Feature):
        return item
    known = Feature.__members__
    if isinstance(item, str) and item in known:
        return known[item]
    raise SpecError(
        f"Capabilities.features: {item!r} is not a Feature of attnplug {__version__}"
        f"{did_you_mean(str(item).upper(), known) or ';'} Known: {', '.join(known)}"
    )


def _either(one: Any, other: Any) -> Any:
    return None if one is None or other is None else frozenset(one) | frozenset(other)


def _least(one: tuple[int, int] | None, other: tuple[int, int] | None) -> tuple[int, int] | None:
    return None if one is None or other is None else min(one, other)
