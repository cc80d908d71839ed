"""`summary`: what ran, by module and kind of call."""

from __future__ import annotations

import html
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._C._autograd import DeviceType

from attnplug._arguments import shown
from attnplug._errors import ScopeError
from attnplug._selection.state import start
from attnplug._selection.watching import RecordedCall, Watcher, add_watcher, remove_watcher
from attnplug._types import OPEN_WINDOW, CausalVariant, SDPAParams, SDPBackend
from attnplug._watch.modules import current_module

Result = tuple[Tensor, Tensor | None]

WIDTH = 80
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
        passed_over: implementation to reasons, for each that was asked before.
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
    """How much of a profile's time an implementation took.

    Attributes:
        forward: seconds, of the device where the profile has any, else of the CPU.
        backward: likewise.
        share: of the time of everything in the profile, from 0 to 1.
    """

    forward: float
    backward: float
    share: float


class summary:
    """Collect what runs: how often, by module of the model, kind of call and implementation.

    As a `with` block it collects this thread's calls, from when the block is entered until it is left; `start()` and
    `stop()` are for the whole process. Calls before are not known: nothing is counted while nobody listens. `str()` is
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
        self._watcher: _Tally | None = None
        self._lock = threading.Lock()
        self._counts: Counter[tuple[Any, ...]] = Counter()
        self._passed_over: dict[tuple[Any, ...], Mapping[str, tuple[str, ...]]] = {}

    def start(self) -> summary:
        """Collect the calls of every thread, until `stop()`; returns itself."""
        return self._begin(everywhere=True)

    def stop(self) -> None:
        """Collect no longer. What was collected stays."""
        if self._watcher is None:
            raise ScopeError("summary is stopped, or left, but it was not started")
        watcher, self._watcher = self._watcher, None
        remove_watcher(watcher)

    def __enter__(self) -> summary:
        return self._begin(everywhere=False)

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _begin(self, everywhere: bool) -> summary:
        if self._watcher is not None:
            raise ScopeError("this summary is started already; make another one")
        start()
        self._watcher = _Tally(self._count)
        add_watcher(self._watcher, everywhere)
        return self

    def _count(self, call: RecordedCall, kind: str) -> None:
        key = (current_module() or call.module, kind, call.impl, call.backend, call.device.partition(":")[0])
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
        """Return the table that `str()` is; with a profile, also the share of its time that each implementation took.

        Args:
            profile: a `torch.profiler.profile` that has ended.
        """
        calls = self.calls
        head = f"{calls:,} attention call{'' if calls == 1 else 's'}"
        lines = [head if calls else f"{head}: nothing ran while this summary was in place"]
        for name, each in ({} if profile is None else self.shares(profile)).items():
            times = f"forward {_seconds(each.forward)}, backward {_seconds(each.backward)}"
            lines += _wrapped(f"{each.share:7.1%}  {name:16}  ", f"of the time: {times}")
        for module, rows in self._grouped():
            lines += ["", *_wrapped("", module)]
            for (kind, impl, device, reasons), count in rows.most_common():
                lines += _wrapped(f"{count:7,}  {impl:16}  ", f"{device} {kind}")
                lines += [line for reason in reasons for line in _wrapped(" " * 9, f"not {reason}")]
        return "\n".join(lines)

    def shares(self, profile: Any) -> dict[str, Share]:
        """Return how much of a profile's time each implementation took, the longest first.

        While a profiler runs, each call is a range `attnplug::<implementation>`, and so is its backward; this adds up
        the ranges, whether this summary was in place or not. In compiled code only opaque kernels have them.

        Args:
            profile: a `torch.profiler.profile` that has ended.
        """
        if not callable(getattr(profile, "key_averages", None)):
            raise TypeError(f"profile: expected a torch.profiler.profile that has ended, got {shown(profile)}")
        averages = profile.key_averages()
        on_device = sum(each.self_device_time_total for each in averages if _is_of_device(each))
        of_cpu = [each for each in averages if each.device_type == DeviceType.CPU]
        total = on_device or sum(each.self_cpu_time_total for each in of_cpu)
        times: dict[str, list[float]] = {}
        for each in of_cpu:
            name = each.key.removeprefix("attnplug::")
            if name != each.key and name not in _OTHERS:
                impl = name.removesuffix("_backward")
                spent = each.device_time_total if on_device else each.cpu_time_total
                times.setdefault(impl, [0.0, 0.0])[impl != name] += spent / 1e6
        return {
            impl: Share(forward, backward, (forward + backward) * 1e6 / total if total else 0.0)
            for impl, (forward, backward) in sorted(times.items(), key=lambda item: -sum(item[1]))
        }

    def __repr__(self) -> str:
        return self.table()

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """Return the table as HTML, for a notebook."""
        head = "".join(f"<th>{title}</th>" for title in ("module", "calls", "implementation", "device", "kind"))
        body = ""
        for module, rows in self._grouped():
            for (kind, impl, device, reasons), count in rows.most_common():
                over = "".join(f"<br><small>not {html.escape(reason)}</small>" for reason in reasons)
                cells = [html.escape(module), f"{count:,}", html.escape(impl) + over, device, html.escape(kind)]
                body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _grouped(self) -> list[tuple[str, Counter[tuple[Any, ...]]]]:
        """Return the rows by module, those whose names differ by numbers together, the most frequent first."""
        groups: dict[str, Counter[tuple[Any, ...]]] = {}
        modules: dict[str, set[str]] = {}
        for row in self.rows:
            pattern = re.sub(r"\.\d+(?=\.|$)", ".*", row.module)
            reasons = tuple(f"{name}: {'; '.join(each)}" for name, each in row.passed_over.items())
            groups.setdefault(pattern, Counter())[row.kind, row.impl, row.device, reasons] += row.calls
            modules.setdefault(pattern, set()).add(row.module)
        ordered = sorted(groups.items(), key=lambda item: -sum(item[1].values()))
        return [(_title(pattern, len(modules[pattern])), rows) for pattern, rows in ordered]


class _Tally(Watcher):
    """What a `summary` watches with, for as long as it is in place."""

    def __init__(self, count: Callable[[RecordedCall, str], None]) -> None:
        self._count = count

    def around(self, call: RecordedCall, params: SDPAParams, run: Callable[[SDPAParams], Result]) -> Result:
        self._count(call, kind_of(params))
        return run(params)

    def told(self, call: RecordedCall) -> None:
        self._count(call, COMPILED)


_OTHERS = frozenset({"told", "seen"})  # operators of the namespace that are no implementation's


def kind_of(params: SDPAParams) -> str:
    """Return what a call has in common with others of its kind, in a line."""
    query, key, value = params.query, params.key, params.value
    dtype = str(query.dtype).removeprefix("torch.")
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
    words += [f"S{letter}<={_power(length)}" for letter, length in zip("qk", lengths, strict=True)]
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


def _power(length: int) -> int:
    """Return the power of two that `length` is not above."""
    return 1 << max(0, int(length) - 1).bit_length()


def _is_of_device(average: Any) -> bool:
    """Whether this is time that a device worked, not a range of it."""
    return average.device_type != DeviceType.CPU and not average.is_user_annotation


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _title(pattern: str, modules: int) -> str:
    return f"{pattern or '(outside any module)'}{f' ({modules} modules)' if modules > 1 else ''}"


def _wrapped(indent: str, text: str) -> list[str]:
    """Return text in lines of 80 columns, the first behind `indent`, the others below."""
    lines, line = [], indent
    for word in text.split():
        if len(line) + len(word) > WIDTH and line.strip():
            lines.append(line.rstrip())
            line = " " * len(indent)
        line += f"{word} "
    return [*lines, line.rstrip()]
