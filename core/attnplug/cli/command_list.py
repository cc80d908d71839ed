"""List the implementations, built in and installed, in the order of preference.

No kernel is imported, and neither is torch: what is listed is what the packages say of themselves.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable
from typing import Any

import attnplug
from attnplug import Capabilities, Feature, ImplRecord
from attnplug.cli import render

HELP = "list the implementations and whether they can work here"

_HEADERS = ("name", "family", "priority", "distribution", "status", "devices", "dtypes", "features", "reason")
_EXPENDABLE = ("features", "dtypes", "priority", "devices", "distribution")
_SHORT = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}
_UNKNOWN = ("-", "-", "-")
_WIDTH = 100


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--status",
        choices=("available", "unavailable", "broken"),
        help="only those of this status; exit status 1 if there is none",
    )
    parser.add_argument(
        "--choices",
        nargs="?",
        const="",
        metavar="FILE",
        help="list measured choices instead: those in use (ATTNPLUG_CHOICES), this user's, or those in FILE",
    )
    parser.add_argument("--verbose", "-v", action="store_true", help="show all that each implementation supports")


def run(arguments: argparse.Namespace) -> int:
    if arguments.choices is not None:
        return _list_choices(arguments)
    records = [record for record in attnplug.list_impls() if arguments.status in (None, record.status)]
    if arguments.json:
        render.print_json([_as_json(record) for record in records])
    elif not records:
        print(f"attnplug: no implementation is {arguments.status}", file=sys.stderr)
    elif arguments.verbose:
        render.put("\n\n".join(_described(record) for record in records))
    else:
        rows = [_row(record) for record in records]
        render.print_table(_HEADERS, rows, _HEADERS.index("status"), _EXPENDABLE)
    return 0 if records else 1


def _list_choices(arguments: argparse.Namespace) -> int:
    """List measured choices, and say of each table whether it holds here; exit status 1 if none does."""
    from attnplug._selection.choice_files import as_plain
    from attnplug._selection.state import process, start
    from attnplug.cli.command_tune import print_choices

    start()
    used = None if arguments.choices else process.choices
    choices = used if used is not None else attnplug.Choices.load(arguments.choices or None)

    from attnplug._dispatch.measured import why_not_here

    reasons = [why_not_here(one) for one in choices.tables]
    if arguments.json:
        tables = as_plain(choices)["tables"]
        render.print_json(
            {
                "source": choices.source,
                "in_use": used is not None,
                "tables": [{**one, "reason": reason} for one, reason in zip(tables, reasons, strict=True)],
            }
        )
    else:
        for one, reason in zip(choices.tables, reasons, strict=True):
            print_choices(attnplug.Choices((one,)))
            render.put(f"does not hold here: {reason}\n" if reason else "holds here\n")
        state = "in use" if used is not None else "not in use; ATTNPLUG_CHOICES or use_choices puts them to use"
        render.put(f"{choices.source}: {len(choices)} choices, {state}")
    return 0 if "" in reasons else 1


def _row(record: ImplRecord) -> tuple[str, ...]:
    return (
        f"{record.name} (quantized)" if record.capabilities.quantized else record.name,
        render.family(record.backend),
        str(record.priority),
        _origin(record),
        record.status,
        *(_summary(record.capabilities) if _is_known(record) else _UNKNOWN),
        record.reason,
    )


def _summary(capabilities: Capabilities) -> tuple[str, str, str]:
    dtypes = "any" if capabilities.dtypes is None else " ".join(_SHORT[name] for name in _dtypes(capabilities))
    return _joined(capabilities.devices), dtypes, f"{len(capabilities.features)} of {len(Feature)}"


def _described(record: ImplRecord) -> str:
    fields = [
        ("family", render.family(record.backend)),
        ("priority", str(record.priority)),
        ("distribution", _origin(record)),
        ("status", f"{record.status}: {record.reason}" if record.reason else record.status),
    ]
    if record.capabilities.quantized:
        fields.append(("quantized", "yes: right within 5 %, and run only where it is named"))
    if _is_known(record):
        fields += [field for part in record.capabilities.alternatives for field in _fields(part)]
    wrapped = [
        textwrap.fill(value, _WIDTH, initial_indent=f"  {name:14}", subsequent_indent=" " * 16, break_long_words=False)
        for name, value in fields
    ]
    return "\n".join([record.name, *wrapped])


def _fields(part: Capabilities) -> list[tuple[str, str]]:
    """Return what one alternative supports, the part that describes the device first."""
    device = "any device" if part.devices is None else _joined(part.devices)
    if part.compute_capability is not None:
        device += f", compute capability {_dotted(part)} or later"
    if part.architectures is not None:
        device += f", AMD architectures {_joined(part.architectures)}"
    return [
        ("supports on", device),
        ("  dtypes", "any" if part.dtypes is None else ", ".join(_dtypes(part))),
        ("  head sizes", _head_sizes(part)),
        ("  features", ", ".join(_features(part)) or "none"),
    ]


def _head_sizes(part: Capabilities) -> str:
    sizes = part.head_sizes
    if isinstance(sizes, range) and len(sizes) > 1:
        every = f" in steps of {sizes.step}" if sizes.step != 1 else ""
        return f"{sizes[0]} to {sizes[-1]}{every}"
    return "any" if sizes is None else ", ".join(map(str, sorted(sizes)))


def _as_json(record: ImplRecord) -> dict[str, Any]:
    """Return a record as JSON; its capabilities are alternatives, in which null means no limit."""
    parts = record.capabilities.alternatives if _is_known(record) else ()
    return {
        "name": record.name,
        "family": record.backend.name if record.backend is not None else None,
        "priority": record.priority,
        "distribution": record.distribution,
        "version": record.version,
        "status": record.status,
        "reason": record.reason,
        "quantized": record.capabilities.quantized,
        "capabilities": [
            {
                "devices": _sorted(part.devices),
                "dtypes": None if part.dtypes is None else _dtypes(part),
                "compute_capability": None if part.compute_capability is None else _dotted(part),
                "architectures": _sorted(part.architectures),
                "head_sizes": _sizes_as_json(part),
                "features": _features(part),
            }
            for part in parts
        ],
    }


def _sizes_as_json(part: Capabilities) -> Any:
    sizes = part.head_sizes
    if isinstance(sizes, range):
        return {"start": sizes.start, "stop": sizes.stop, "step": sizes.step}
    return _sorted(sizes)


def _is_known(record: ImplRecord) -> bool:
    """Whether anything is known of what it supports: it is not broken, and its plugin is loaded."""
    return record.status != "broken" and record.capabilities.devices != frozenset()


def _origin(record: ImplRecord) -> str:
    return f"{record.distribution} {record.version}".rstrip()


def _features(part: Capabilities) -> list[str]:
    return [feature.name for feature in Feature if feature in part.features]


def _dtypes(part: Capabilities) -> list[str]:
    return [name for name in _SHORT if name in (part.dtypes or ())]


def _dotted(part: Capabilities) -> str:
    return ".".join(map(str, part.compute_capability or ()))


def _joined(names: Iterable[str] | None) -> str:
    return "any" if names is None else ", ".join(sorted(names))


def _sorted(items: Iterable[Any] | None) -> list[Any] | None:
    return None if items is None else sorted(items)
