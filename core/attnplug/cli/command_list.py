"""List the implementations, built in and installed, in the order of preference.

Plugins that are broken, or that the environment keeps from loading, come last, under their entry points' names. No
kernel is imported, and neither is torch: what is listed is what the packages say of themselves.
"""

from __future__ import annotations

import argparse
import sys

import attnplug
from attnplug import Capabilities, Feature, ImplRecord
from attnplug.cli import describe, render
from attnplug.cli.values import DTYPES

HELP = "list the implementations and whether they can work here"

_HEADERS = (
    *("name", "family", "priority", "distribution", "entry point", "status"),
    *("devices", "dtypes", "features", "reason"),
)
_EXPENDABLE = ("features", "dtypes", "priority", "devices", "entry point", "distribution", "family")
_UNKNOWN = ("-", "-", "-")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--status",
        choices=("available", "unavailable", "broken"),
        help="only those of this status; exit status 1 if there is none",
    )
    parser.add_argument("--verbose", "-v", action="store_true", help="show all that each implementation supports")


def run(arguments: argparse.Namespace) -> int:
    records = [record for record in attnplug.list_impls() if arguments.status in (None, record.status)]
    if arguments.json:
        render.print_json({"implementations": [describe.as_json(record) for record in records]})
    elif not records:
        print(f"attnplug: no implementation is {arguments.status}", file=sys.stderr)
    elif arguments.verbose:
        blocks = [
            describe.block(record.name, [*describe.facts(record), *describe.supported(record)]) for record in records
        ]
        render.put("\n\n".join(blocks))
    else:
        rows = [_row(record) for record in records]
        render.print_table(_HEADERS, rows, _HEADERS.index("status"), _EXPENDABLE)
    return 0 if records else 1


def _row(record: ImplRecord) -> tuple[str, ...]:
    quantized = "quantized, runs only where it is named" if record.capabilities.quantized else ""
    return (
        record.name,
        render.family(record.backend),
        str(record.priority),
        describe.origin(record),
        record.entry_point or "-",
        record.status,
        *(_summary(record.capabilities) if describe.is_known(record) else _UNKNOWN),
        "; ".join(filter(None, (quantized, record.reason))),
    )


def _summary(capabilities: Capabilities) -> tuple[str, str, str]:
    dtypes = "any" if capabilities.dtypes is None else " ".join(DTYPES[name] for name in describe.dtypes(capabilities))
    return describe.joined(capabilities.devices), dtypes, f"{len(capabilities.features)} of {len(Feature)}"
