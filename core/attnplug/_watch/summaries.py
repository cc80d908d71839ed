"""`summary`: what ran, by module and kind of call."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch._C._autograd import DeviceType

from attnplug._arguments import shown
from attnplug._call.device import name_of_dtype
from attnplug._dispatch.ranges import is_profiled, labelled
from attnplug._run.contract import Result
from attnplug._selection.choice_tables import rounded_up
from attnplug._selection.state import start
from attnplug._selection.watching import RecordedCall
from attnplug._tables import WIDTH, html_table, wrap
from attnplug._types import OPEN_WINDOW, CausalVariant, SDPAParams, SDPBackend
from attnplug._watch.modules import current_module
from attnplug._watch.observing import UNSEEN, Observer, WatcherOf

COMPILED = "compiled"
"""The kind of a call of compiled code, which tells no more."""


@dataclass(frozen=True)
class Ran:
    """The calls of one kind, in one module, that one implementation ran.

    Attributes:
        module: as `LlamaModel.layers.3.self_attn`; of compiled code, the module that was compiled; empty for calls
            outside any module.
        kind: what the calls have in common: dtype, head size, heads, lengths up to a power of two, and what they ask
            for; `compiled` for calls of compiled code.
        impl: the implementation that ran.
        backend: its family; None for none.
        device: `cpu`, `cuda` and so on.
        passed_over: implementation to reasons, for each that was preferred but declined.
        calls: how many there were.
    """

    module: str
    kind: str
    impl: str
    backend: SDPBackend | None
    device: str
    passed_over: Mapping[str, tuple[str, ...]]
    calls: int


@dataclass(frozen=True)
class Share:
    """How much of a profile's time an implementation, or its calls of one kind in one module, took.

    Attributes:
        forward: seconds, of the device where the profile has any, else of the CPU.
        backward: likewise.
        share: of the time of everything in the profile, from 0 to 1.
    """

    forward: float
    backward: float
    share: float


class summary(Observer):
    """Collect what runs: how often, by module of the model, kind of call and implementation.

    As a `with` block it collects this thread's calls, from when the block is entered until it is left; `start()` and
    `stop()` are for the whole process. Earlier calls are not known: nothing is counted without a summary. `str()` is
    a table of 80 columns; a notebook shows it as HTML.

    Raises:
        ScopeError: it is started twice, or stopped without having been started.

    Examples:
        >>> import torch, attnplug
        >>> query = torch.randn(1, 2, 4, 8)
        >>> with attnplug.summary() as ran:
        ...     _ = attnplug.scaled_dot_product_attention(query, query, query, is_causal=True)
        >>> print(ran)
        1 attention call
        <BLANKLINE>
        (outside any module)
              1  torch             cpu float32 E8 H2 Sq<=4 Sk<=4 causal
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[Any, ...]] = Counter()
        self._passed_over: dict[tuple[Any, ...], Mapping[str, tuple[str, ...]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: what was collected, but not that it goes on."""
        with self._lock:
            counts, passed_over = self._counts.copy(), dict(self._passed_over)
        return {"_counts": counts, "_passed_over": passed_over}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]  # a copy has a lock of its own
        self.__dict__.update(state)

    def _new_watcher(self, everywhere: bool) -> _Tally:
        start()
        return _Tally(self, everywhere)

    def _count(self, call: RecordedCall, kind: str, module: str) -> None:
        key = (module, kind, call.impl, call.backend, call.device.partition(":")[0])
        with self._lock:
            self._counts[key] += 1
            self._passed_over.setdefault(key, call.passed_over)

    @property
    def rows(self) -> list[Ran]:
        """What ran, the most frequent first."""
        with self._lock:
            counted = self._counts.most_common()
            names = ("module", "kind", "impl", "backend", "device")
            return [
                Ran(**dict(zip(names, key, strict=True)), passed_over=self._passed_over[key], calls=calls)
                for key, calls in counted
            ]

    @property
    def calls(self) -> int:
        """How many calls there were."""
        with self._lock:
            return sum(self._counts.values())

    def table(self, profile: Any = None) -> str:
        """Return the table that `str()` is; with a profile, also the shares of its time.

        Args:
            profile: a `torch.profiler.profile` that has ended.
        """
        calls = self.calls
        head = f"{calls:,} attention call{'' if calls == 1 else 's'}"
        lines = [head] if calls else [f"{head}: nothing ran while this summary was in place", *UNSEEN]
        for name, each in ({} if profile is None else self.shares(profile)).items():
            times = f"forward {_seconds(each.forward)}, backward {_seconds(each.backward)}"
            lines += _wrapped(f"{each.share:7.1%}  {name:16}  ", f"of the time: {times}")
        for module, lines_of_module in self._grouped({} if profile is None else self.shares_of_calls(profile)):
            lines += ["", *_wrapped("", module)]
            for line in lines_of_module:
                share = "" if profile is None else f"{line.share:6.1%}  " if line.share else " " * 8
                lines += _wrapped(f"{line.calls:7,}  {share}{line.impl:16}  ", f"{line.device} {line.kind}")
                lines += [wrapped for reason in line.reasons for wrapped in _wrapped(" " * 9, f"not {reason}")]
        return "\n".join(lines)

    def shares(self, profile: Any) -> dict[str, Share]:
        """Return how much of a profile's time each implementation took, the longest first.

        While a profiler runs, each call is a range `attnplug::<implementation>`, and so is its backward; this adds up
        the ranges, whether this summary was in place or not. In compiled code only opaque kernels have them.

        Args:
            profile: a `torch.profiler.profile` that has ended.
        """
        return _shares(profile, lambda impl, event: impl)

    def shares_of_calls(self, profile: Any) -> dict[tuple[str, str, str], Share]:
        """Return the same by module, kind and implementation, as `rows` has them.

        Known are the calls that were made, and whose backward was recorded, while both this summary was in place and
        the profiler ran; of compiled code no module is.

        Args:
            profile: a `torch.profiler.profile` that has ended.
        """
        return _shares(profile, lambda impl, event: _called(impl, event.cpu_parent))

    def __repr__(self) -> str:
        return self.table()

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """Return the table as HTML, for a notebook."""
        headers = ("module", "calls", "implementation", "device", "kind", "passed over")
        rows = [
            (module, f"{line.calls:,}", line.impl, line.device, line.kind, "; ".join(line.reasons))
            for module, lines in self._grouped({})
            for line in lines
        ]
        return html_table(headers, rows)

    def _grouped(self, shares: Mapping[tuple[str, str, str], Share]) -> list[tuple[str, list[_Line]]]:
        """Return the rows by module, those whose names differ by numbers together, the most frequent first."""
        groups: dict[str, dict[Any, _Line]] = {}
        modules: dict[str, set[str]] = {}
        for row in self.rows:
            pattern = re.sub(r"\.\d+(?=\.|$)", ".*", row.module)
            reasons = tuple(f"{name}: {'; '.join(each)}" for name, each in row.passed_over.items())
            new = _Line(row.kind, row.impl, row.device, reasons)
            line = groups.setdefault(pattern, {}).setdefault((row.kind, row.impl, row.device, reasons), new)
            line.calls += row.calls
            found = shares.get((row.module, row.kind, row.impl))
            line.share += 0.0 if found is None else found.share
            modules.setdefault(pattern, set()).add(row.module)
        ordered = sorted(groups.items(), key=lambda item: -sum(line.calls for line in item[1].values()))
        return [
            (_title(pattern, len(modules[pattern])), sorted(lines.values(), key=lambda line: -line.calls))
            for pattern, lines in ordered
        ]


@dataclass
class _Line:
    """One line of the table."""

    kind: str
    impl: str
    device: str
    reasons: tuple[str, ...]
    calls: int = 0
    share: float = 0.0


class _Tally(WatcherOf[summary]):
    """Counts for a `summary`."""

    def _count(self, call: RecordedCall, kind: str, module: str) -> None:
        summed = self.observer()
        if summed is not None:
            summed._count(call, kind, module)

    def around(self, call: RecordedCall, params: SDPAParams, run: Callable[[SDPAParams], Result]) -> Result:
        kind, module = kind_of(params), current_module() or call.module
        self._count(call, kind, module)
        if not is_profiled():
            return run(params)
        with labelled(f"{_CALL}{kind}{_IN}{module}" if module else f"{_CALL}{kind}"):
            return run(params)

    def told(self, call: RecordedCall) -> None:
        self._count(call, COMPILED, current_module() or call.module)


_CALL, _IN = "attnplug.call::", " in "
"""Of the name of the range around a call's own: what stands before its kind, and before its module."""


def _called(impl: str, around: Any) -> tuple[str, str, str] | None:
    """Return module, kind and implementation of a call, given the range around its own."""
    if around is None or not around.name.startswith(_CALL):
        return None
    kind, _, module = around.name.removeprefix(_CALL).partition(_IN)
    return module, kind, impl


Key = TypeVar("Key")


def _shares(profile: Any, key_of: Callable[[str, Any], Key | None]) -> dict[Key, Share]:
    """Add up the ranges of a profile by what `key_of` returns of implementation and event, the longest first."""
    if not callable(getattr(profile, "key_averages", None)):
        raise TypeError(f"profile: expected a torch.profiler.profile that has ended, got {shown(profile)}")
    averages = profile.key_averages()
    on_device = sum(each.self_device_time_total for each in averages if _is_of_device(each))
    total = on_device or sum(each.self_cpu_time_total for each in averages if each.device_type == DeviceType.CPU)
    times: dict[Key, list[float]] = {}
    for event in profile.events():
        name = event.name.removeprefix("attnplug::")
        if name == event.name or event.device_type != DeviceType.CPU:
            continue
        impl = name.removesuffix("_backward")
        key = key_of(impl, event)
        if key is not None:
            spent = event.device_time_total if on_device else event.cpu_time_total
            times.setdefault(key, [0.0, 0.0])[impl != name] += spent / 1e6
    return {
        key: Share(forward, backward, (forward + backward) * 1e6 / total if total else 0.0)
        for key, (forward, backward) in sorted(times.items(), key=lambda item: -sum(item[1]))
    }


def kind_of(params: SDPAParams) -> str:
    """Return what a call has in common with others of its kind, in a line."""
    query, key, value = params.query, params.key, params.value
    dtype = name_of_dtype(query.dtype)
    if query.is_nested:
        return f"{dtype} nested"
    size, value_size = query.shape[-1], value.shape[-1]
    words = [dtype, f"E{size}" if size == value_size else f"E{size}/{value_size}"]
    if params.is_varlen:
        heads, kv_heads = query.shape[1], key.shape[-2]
        lengths = (params.max_q, params.max_k)
        words.append("varlen")
    else:
        heads, kv_heads = (tensor.shape[-3] if tensor.dim() > 2 else 1 for tensor in (query, key))
        lengths = (query.shape[-2], key.shape[-2])
    words.append(f"H{heads}" if heads == kv_heads else f"H{heads}/{kv_heads}")
    words += [f"S{letter}<={rounded_up(max(1, int(length)))}" for letter, length in zip("qk", lengths, strict=True)]
    return " ".join([*words, *_asked(params)])


def _asked(params: SDPAParams) -> list[str]:
    lower_right = not params.is_varlen and params.causal_variant is CausalVariant.LOWER_RIGHT
    asked = {
        "causal": params.is_causal,
        "lower-right": lower_right and (params.is_causal or params.window_size != OPEN_WINDOW),
        "mask": params.attn_mask is not None,
        "window": params.window_size != OPEN_WINDOW,
        "softcap": params.softcap > 0,
        "sinks": params.sinks is not None,
        "alibi": params.alibi_slopes is not None,
        "used": params.seqused_k is not None,
        "paged": params.block_table is not None,
        "dropout": params.dropout > 0,
        "lse": params.return_lse,
        "grad": params.needs_grad,
    }
    return [word for word, is_asked in asked.items() if is_asked]


def _is_of_device(average: Any) -> bool:
    """Whether this is time that a device worked, not a range of it."""
    return average.device_type != DeviceType.CPU and not average.is_user_annotation


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _title(pattern: str, modules: int) -> str:
    return f"{pattern or '(outside any module)'}{f' ({modules} modules)' if modules > 1 else ''}"


def _wrapped(indent: str, text: str) -> list[str]:
    """Return text in lines of 80 columns, the first behind `indent`, the others below."""
    return wrap(text, WIDTH, indent, " " * len(indent))
