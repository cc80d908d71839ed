"""Check implementations against everything that their capabilities promise.

A quick run takes seconds for a fast kernel; a full one runs every check for every dtype, and long
sequences. Failures are shown with a line of Python that reproduces them, the simplest first: an early failure often
explains those that follow. On a GPU each check runs in one of several worker processes, so that a kernel's fault
costs one check. Exit status 1: something failed.

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
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import attnplug
from attnplug._control.registration import check_name
from attnplug._errors import did_you_mean
from attnplug.cli import outputs, render, values
from attnplug.cli.parser import complete_with

if TYPE_CHECKING:
    from attnplug.testing import Report, Result

HELP = "check an implementation against everything that it promises"


def configure(parser: argparse.ArgumentParser) -> None:
    names = parser.add_argument("names", metavar="IMPL", nargs="+", help="an implementation")
    complete_with(names, attnplug.list_flash_attention_impls)
    parser.add_argument("--device", help="cpu, cuda, ...; by default a GPU if it runs on one that is here")
    parser.add_argument("--dtype", type=values.dtype, help="the dtype to check; by default each that is declared")
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quick", dest="level", action="store_const", const="quick", help="seconds; the default")
    level.add_argument("--full", dest="level", action="store_const", const="full", help="everything")
    parser.set_defaults(level="quick")
    only = parser.add_argument(
        "--only", dest="checks", metavar="CHECK", action="append", help="run only this check; repeatable"
    )
    complete_with(only, _checks)
    parser.add_argument("--failed", action="store_true", help="show failures only")
    parser.add_argument(
        "--workers",
        type=values.count,
        metavar="N",
        help="processes that run checks; 0: this one, the default on a CPU; on a GPU at most 8",
    )
    parser.add_argument(
        "--timeout",
        type=values.seconds,
        default=300.0,
        metavar="SECONDS",
        help="time limit of a check in a worker (default: 300)",
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="also write each result as it is found, one line of JSON each"
    )


def run(arguments: argparse.Namespace) -> int:
    for name in arguments.names:
        check_name(name)
    if arguments.output is not None:
        outputs.check_folder(arguments, arguments.output)
    for name in set(arguments.checks or ()).difference(_checks()):
        known = did_you_mean(name, _checks()) or f"; attnplug check {arguments.names[0]} lists them"
        arguments.fail(f"--only: {name!r} is not a check{known}")

    usable = [name for name in dict.fromkeys(arguments.names) if _is_usable(name)]
    if not usable:
        return 1
    from attnplug.testing import check_impls  # which imports torch, as loading a kernel does

    with contextlib.ExitStack() as stack:
        try:
            written = None
            if arguments.output is not None:
                written = stack.enter_context(arguments.output.open("w", buffering=1, encoding="utf-8"))
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
            render.put_status("")
    if arguments.json:
        render.print_json({"reports": [report.as_dict() for report in reports]})
    else:
        for position, report in enumerate(reports):
            if position:
                render.put("")
            _print(report, arguments.failed)
    return 0 if len(usable) == len(arguments.names) and all(report.passed for report in reports) else 1


@functools.cache
def _checks() -> list[str]:
    """Return the names of all checks, read from their sources: importing them imports torch."""
    folder = Path(__file__).parents[1] / "testing" / "checks"
    sources = (file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py")))
    return [name for source in sources for name in re.findall(r"^def (check_\w+)\(subject", source, re.MULTILINE)]


def _print(report: Report, failures_only: bool) -> None:
    """Print the verdict, the failures in full, the simplest first, and what became of each check."""
    from attnplug.testing._report import HEADERS

    render.put(report.summary())
    if report.failures:
        render.put(f"\n{report.details()}")
    if not failures_only:
        render.put()
        render.print_table(HEADERS, report.rows(), HEADERS.index("result"))


def _is_usable(name: str) -> bool:
    """Whether an implementation can run here; if not, say why."""
    from attnplug.testing._running import find

    try:
        find(name)
    except ValueError as error:
        print(f"attnplug: cannot be checked: {error}", file=sys.stderr)
        return False
    return True


def _found(written: TextIO | None, name: str, result: Result) -> None:
    """Show a result on a terminal, and write it if that is asked for."""
    render.put_status(f"{name} {result.label}: {result.status}")
    if written is not None:
        written.write(json.dumps({"impl": name, **asdict(result)}) + "\n")
