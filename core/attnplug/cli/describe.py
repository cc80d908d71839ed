"""One implementation in words and as JSON, for `list --verbose`, `list --json` and `show`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attnplug import Capabilities, Feature, ImplRecord
from attnplug._tables import wrap
from attnplug._types import family
from attnplug.cli import render
from attnplug.cli.values import DTYPES

Fields = list[tuple[str, str]]

_WIDTH = 100
_NAMES = 16


def is_known(record: ImplRecord) -> bool:
    """Whether anything is known of what it supports: it is not broken, and its plugin is loaded."""
    return record.status != "broken" and record.capabilities.devices != frozenset()


def origin(record: ImplRecord) -> str:
    """Return the distribution and its version."""
    return f"{record.distribution} {record.version}".rstrip()


def dtypes(part: Capabilities) -> list[str]:
    """Return the dtypes that are declared, in the order of their sizes."""
    return [name for name in DTYPES if name in (part.dtypes or ())]


def joined(names: Iterable[str] | None) -> str:
    """Return names with commas, or `any`."""
    return "any" if names is None else ", ".join(sorted(names))


def block(name: str, fields: Fields) -> str:
    """Return a name, and below it a line or more for each field."""
    lines = [name]
    for field, value in fields:
        lines += wrap(value, render.width(_WIDTH), f"  {field:{_NAMES - 2}}", " " * _NAMES) or [f"  {field}"]
    return "\n".join(lines)


def facts(record: ImplRecord) -> Fields:
    """Return what is known of an implementation besides what it supports."""
    fields = [
        ("family", family(record.backend)),
        ("priority", str(record.priority)),
        ("distribution", origin(record)),
        ("entry point", f"{record.entry_point} = {record.module}" if record.entry_point else ""),
        ("kernel", record.kernel),
        ("status", f"{record.status}: {record.reason}" if record.reason else record.status),
        ("remedy", record.remedy),
        ("quantized", "yes: right within 5 %, and run only where it is named" * record.capabilities.quantized),
    ]
    return [field for field in fields if field[1]]


def supported(record: ImplRecord) -> Fields:
    """Return what an implementation supports, one alternative after the other."""
    if not is_known(record):
        return []
    return [field for part in record.capabilities.alternatives for field in _alternative(part)]


def _alternative(part: Capabilities) -> Fields:
    """Return what one alternative supports, the part that describes the device first."""
    device = "any device" if part.devices is None else joined(part.devices)
    if part.compute_capability is not None:
        device += f", compute capability {_dotted(part)} or later"
    if part.architectures is not None:
        device += f", AMD architectures {joined(part.architectures)}"
    return [
        ("supports on", device),
        ("  dtypes", "any" if part.dtypes is None else ", ".join(dtypes(part))),
        ("  head sizes", _head_sizes(part)),
        ("  features", ", ".join(_features(part)) or "none"),
    ]


def as_json(record: ImplRecord) -> dict[str, Any]:
    """Return a record as JSON; its capabilities are alternatives, in which null means no limit."""
    return {
        "name": record.name,
        "family": record.backend.name if record.backend is not None else None,
        "priority": record.priority,
        "distribution": record.distribution,
        "version": record.version,
        "entry_point": record.entry_point,
        "module": record.module,
        "kernel": record.kernel,
        "status": record.status,
        "reason": record.reason,
        "remedy": record.remedy,
        "quantized": record.capabilities.quantized,
        "capabilities": [
            {
                "devices": _sorted(part.devices),
                "dtypes": None if part.dtypes is None else dtypes(part),
                "compute_capability": None if part.compute_capability is None else _dotted(part),
                "architectures": _sorted(part.architectures),
                "head_sizes": _sizes_as_json(part),
                "features": _features(part),
            }
            for part in (record.capabilities.alternatives if is_known(record) else ())
        ],
    }


def _head_sizes(part: Capabilities) -> str:
    sizes = part.head_sizes
    if isinstance(sizes, range) and len(sizes) > 1:
        every = f" in steps of {sizes.step}" if sizes.step != 1 else ""
        return f"{sizes[0]} to {sizes[-1]}{every}"
    return "any" if sizes is None else ", ".join(map(str, sorted(sizes)))


def _sizes_as_json(part: Capabilities) -> Any:
    sizes = part.head_sizes
    if isinstance(sizes, range):
        return {"start": sizes.start, "stop": sizes.stop, "step": sizes.step}
    return _sorted(sizes)


def _features(part: Capabilities) -> list[str]:
    return [feature.name for feature in Feature if feature in part.features]


def _dotted(part: Capabilities) -> str:
    return ".".join(map(str, part.compute_capability or ()))


def _sorted(items: Iterable[Any] | None) -> list[Any] | None:
    return None if items is None else sorted(items)
