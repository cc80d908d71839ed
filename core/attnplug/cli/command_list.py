"""List the implementations, built in and installed, in the order of preference.

Plugins that are broken, or that the environment keeps from loading, come last, under their entry points' names. No
kernel is imported, and neither is torch: what is listed is what the packages say of themselves.
"""

from __future__ import annotations

import argparse
import sys

import attnplug
from attnplug import Capabilities, Feature, ImplRecord
from attnplug._types import family
from attnplug.cli import choices, describe, render
from attnplug.cli.values import DTYPES

HELP = "list the implementations, and whether they work on this machine"

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


def _list_choices(arguments: argparse.Namespace) -> int:
    """List measured choices, and say of each table whether it holds here; exit status 1 if none does."""
    from attnplug._selection.choice_files import as_plain
    from attnplug._selection.state import process, start

    start()
    used = None if arguments.choices else process.choices
    listed = used if used is not None else attnplug.Choices.load(arguments.choices or None)

    from attnplug._dispatch.measured import why_not_here

    reasons = [why_not_here(one) for one in listed.tables]
    if arguments.json:
        plain = as_plain(listed.tables, listed.notes)
        render.print_json(
            {
                "source": listed.source,
                "in_use": used is not None,
                "tables": [{**one, "reason": reason} for one, reason in zip(plain["tables"], reasons, strict=True)],
                "notes": plain["notes"],
            }
        )
    else:
        for one, reason in zip(listed.tables, reasons, strict=True):
            choices.show(attnplug.Choices((one,)))
            render.put(f"does not hold here: {reason}\n" if reason else "holds here\n")
        for note in listed.notes:
            render.put(note)
        state = "in use" if used is not None else "not in use; ATTNPLUG_CHOICES or use_choices puts them to use"
        render.put(f"{listed.source}: {choices.counted(listed)}, {state}")
    return 0 if "" in reasons else 1


def _row(record: ImplRecord) -> tuple[str, ...]:
    quantized = "quantized, runs only where it is named" if record.capabilities.quantized else ""
    return (
        record.name,
        family(record.backend),
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
