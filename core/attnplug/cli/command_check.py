"""Check an implementation against everything that its capabilities promise.

A quick run takes seconds for a fast kernel; a full one makes every check for every dtype, and long
sequences. What fails is shown with a line of Python that does it again. Exit status 1: something failed.

examples:
  attnplug check math_ref
  attnplug check my_kernel --device cuda --dtype bfloat16 --full
  attnplug check my_kernel --only check_causal
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

import attnplug
from attnplug._control.registration import check_name
from attnplug.cli import render

if TYPE_CHECKING:
    from attnplug.testing import Result

HELP = "check an implementation against everything that it promises"

_HEADERS = ("check", "dtype", "result", "why")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="IMPL", help="the implementation")
    parser.add_argument("--device", help="cpu, cuda, ...; by default a card if it runs on one that is here")
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32", "float64"),
        help="the only one to check; by default each that is declared",
    )
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quick", dest="level", action="store_const", const="quick", help="seconds; the default")
    level.add_argument("--full", dest="level", action="store_const", const="full", help="everything")
    parser.set_defaults(level="quick")
    parser.add_argument(
        "--only", dest="checks", metavar="CHECK", action="append", help="make this check alone; may be repeated"
    )


def run(arguments: argparse.Namespace) -> int:
    if (unusable := _unusable(arguments.name)) is not None:
        print(f"attnplug: {arguments.name} cannot be checked: it is {unusable}", file=sys.stderr)
        return 1

    from attnplug.testing import check_impl

    progress = _show_progress if sys.stderr.isatty() else None
    try:
        report = check_impl(
            arguments.name,
            device=arguments.device,
            dtype=arguments.dtype,
            level=arguments.level,
            checks=arguments.checks,
            on_result=progress,
        )
    except (RuntimeError, ValueError) as error:  # torch has RuntimeError for a device that there is not
        arguments.fail(str(error))
    finally:
        if progress is not None:
            print("\r\x1b[K", end="", file=sys.stderr)
    if arguments.json:
        render.print_json(report.as_dict())
    else:
        render.print_table(_HEADERS, report.rows(), _HEADERS.index("result"))
        render.put(f"\n{report.details()}")
    return 0 if report.passed else 1


def _unusable(name: str) -> str | None:
    """Return why an implementation cannot run here, or None if it can."""
    records = {record.name: record for record in attnplug.list_impls()}
    if name not in records:
        check_name(name)
    record = records[name]
    return None if record.status == "available" else f"{record.status}: {record.reason}"


def _show_progress(result: Result) -> None:
    print(f"\r\x1b[K{result.label}: {result.status}", end="", file=sys.stderr, flush=True)
