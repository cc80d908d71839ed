"""Check implementations against everything that their capabilities promise.

A quick run takes seconds for a fast kernel; a full one makes every check for every dtype, and long
sequences. What fails is shown with a line of Python that does it again. On a GPU each check is made in one
of several worker processes, so that a kernel's fault costs one check. Exit status 1: something failed.

examples:
  attnplug check math_ref
  attnplug check my_kernel --device cuda --dtype bfloat16 --full
  attnplug check my_kernel --only check_causal
  attnplug check my_kernel another_kernel --workers 12 --timeout 60 --output results.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import attnplug
from attnplug._control.registration import check_name
from attnplug.cli import render

if TYPE_CHECKING:
    from attnplug.testing import Result

HELP = "check an implementation against everything that it promises"

_HEADERS = ("check", "dtype", "result", "why")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="IMPL", nargs="+", help="an implementation")
    parser.add_argument("--device", help="cpu, cuda, ...; by default a GPU if it runs on one that is here")
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

    parser.add_argument(
        "--workers", type=int, help="processes that make checks; 0: this one, the default on a CPU; on a GPU at most 8"
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="SECONDS", help="that a check has in a worker (default: 300)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="also write each result as it is found, a line of JSON each"
    )


def run(arguments: argparse.Namespace) -> int:
    usable = [name for name in dict.fromkeys(arguments.names) if _is_usable(name)]
    if not usable:
        return 1

    from attnplug.testing import check_impls

    with contextlib.ExitStack() as stack:
        try:
            written = None
            if arguments.output is not None:
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                written = stack.enter_context(arguments.output.open("w", encoding="utf-8"))
            reports = check_impls(
                usable,
                device=arguments.device,
                dtype=arguments.dtype,
                level=arguments.level,
                checks=arguments.checks,
                workers=arguments.workers,
                timeout=arguments.timeout,
                on_result=functools.partial(_found, written),
            )
        except (OSError, RuntimeError, ValueError) as error:  # torch has RuntimeError for a device that there is not
            arguments.fail(str(error))
        finally:
            if sys.stderr.isatty():
                print("\r\x1b[K", end="", file=sys.stderr)
    if arguments.json:
        data = [report.as_dict() for report in reports]
        render.print_json(data[0] if len(arguments.names) == 1 else data)
    else:
        for position, report in enumerate(reports):
            if position:
                render.put("")
            render.print_table(_HEADERS, report.rows(), _HEADERS.index("result"))
            render.put(f"\n{report.details()}")
    return 0 if len(usable) == len(arguments.names) and all(report.passed for report in reports) else 1


def _is_usable(name: str) -> bool:
    """Whether an implementation can run here; if not, say why."""
    reason = _unusable(name)
    if reason is not None:
        print(f"attnplug: {name} cannot be checked: it is {reason}", file=sys.stderr)
    return reason is None


def _unusable(name: str) -> str | None:
    """Return why an implementation cannot run here, or None if it can."""
    records = {record.name: record for record in attnplug.list_impls()}
    if name not in records:
        check_name(name)
    record = records[name]
    return None if record.status == "available" else f"{record.status}: {record.reason}"


def _found(written: TextIO | None, name: str, result: Result) -> None:
    """Show a result on a terminal, and write it if that is asked for."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{name} {result.label}: {result.status}", end="", file=sys.stderr, flush=True)
    if written is not None:
        written.write(json.dumps({"impl": name, **asdict(result)}) + "\n")
        written.flush()
