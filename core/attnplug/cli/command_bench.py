"""Measure every implementation on this machine: which is fastest, and is it right?

Without options: every implementation, on a set of cases that takes about a minute on a CPU, and is meant to take
two on a GPU. The extension of a file says what is written: .json (all of it), .csv (one line per record), .html (one
self-contained page), .png (plots); {device} and {time} in its name are filled in. Ctrl-C keeps what is measured.
Exit status 1: a result is wrong, nothing ran, or it was interrupted; of compare: there is a regression.

examples:
  attnplug bench
  attnplug bench --set llama-3-8b --impl torch,my_kernel --dtype bfloat16 -o llama.html -o llama.json
  attnplug bench --cases my_model.yaml --device cuda -o 'results/{device}-{time}.csv'
  attnplug bench compare before.json after.json --threshold 0.05
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnplug._control.registration import check_name
from attnplug._tables import table
from attnplug.cli import cases, choices, outputs, render, values

if TYPE_CHECKING:
    from attnplug.bench import Report

HELP = "measure every implementation on this machine, and check that it is right"
USAGE = "attnplug bench [options]\n       attnplug bench compare BEFORE.json AFTER.json [--threshold SHARE]"


def configure(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is measured")
    cases.configure(what)
    what.add_argument("--impl", type=values.names, metavar="NAMES", help="implementations to measure; by default all")
    what.add_argument("--tiny", action="store_true", help="shrink every case, to see that it runs; names no fastest")
    what.add_argument("--sets", action="store_true", help="list the named sets, and measure nothing")
    how = parser.add_argument_group("how it is measured and reported")
    how.add_argument(
        "--baseline", default="torch", metavar="NAME", help="what ratios are relative to; by default torch"
    )
    how.add_argument("--caches", choices=("warm", "cold", "both"), default="both")
    how.add_argument(
        "--seconds", type=values.seconds, metavar="S", help="for each implementation, direction and caches"
    )
    how.add_argument("--threads", type=values.size, metavar="N", help="threads of PyTorch on a CPU")
    how.add_argument("--output", "-o", action="append", default=[], metavar="FILE", help="write results; repeatable")
    how.add_argument("--save-choices", metavar="FILE", help="save what follows for each kind of call, as tune does")
    _configure_compare(parser.add_subparsers(title="two runs", metavar="compare", dest="action", prog="attnplug bench"))


def _configure_compare(actions: Any) -> None:
    parser = actions.add_parser(
        "compare",
        help="say what changed beyond noise between two runs",
        description="Say what changed beyond noise between two runs, both written as .json. Exit status 1: "
        "something is slower, or takes more memory, by more than the threshold, is wrong now, or no longer runs.",
        allow_abbrev=False,
    )
    parser.add_argument("before", metavar="BEFORE.json")
    parser.add_argument("after", metavar="AFTER.json")
    parser.add_argument("--threshold", type=float, default=0.1, metavar="SHARE", help="0.1, a tenth, if not given")
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    if arguments.action == "compare":
        return _compare(arguments)
    if arguments.sets:
        return _list_sets(arguments)
    return _bench(arguments)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what does not exist before torch is imported and before anything is measured."""
    from attnplug.bench._write import check_kind

    for name in [*(arguments.impl or ()), arguments.baseline]:
        check_name(name, "--impl" if name in (arguments.impl or ()) else "--baseline")
    cases.check(arguments)
    if arguments.tiny and arguments.save_choices:
        arguments.fail(
            "--save-choices: times of --tiny mean nothing, so nothing follows from them; leave out one of both"
        )
    for path in map(Path, arguments.output):
        check_kind(path)
        outputs.check_folder(arguments, path)


def _bench(arguments: argparse.Namespace) -> int:
    _check(arguments)
    import torch

    from attnplug import bench
    from attnplug._selection.choice_files import check_writable
    from attnplug.bench._clocks import clock_for
    from attnplug.bench._run import SECONDS
    from attnplug.bench._write import ready

    measured = list(cases.of(arguments))
    for device in {case.device for case in measured}:
        clock_for(device)  # before files are named after it
    outputs = [ready(path, measured[0].device) for path in arguments.output]
    if arguments.save_choices:
        check_writable(Path(arguments.save_choices))
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    with render.progress_bar() as progress:
        report = bench.run(
            measured,
            arguments.impl,
            baseline=arguments.baseline,
            caches=("warm", "cold") if arguments.caches == "both" else (arguments.caches,),
            seconds=arguments.seconds or SECONDS,
            tiny=arguments.tiny,
            progress=progress,
        )
    for path in outputs:
        bench.write(report, path)
    if arguments.save_choices:
        _save_choices(report, Path(arguments.save_choices))
    if arguments.json:
        render.print_json(report.as_dict())
    else:
        _print(report, outputs)
    return 0 if report.impls and not report.wrong and not report.missing else 1


def _save_choices(report: Report, place: Path) -> None:
    from attnplug.tuning import choices_from

    found = choices_from(report)
    if len(found):
        choices.save(found, place)
        print(f"attnplug: saved {choices.counted(found)} in {place}", file=sys.stderr)
    else:
        print(f"attnplug: nothing was right, so nothing is saved in {place}", file=sys.stderr)


def _print(report: Report, outputs: list[Path]) -> None:
    if render.out().isatty():
        _print_by_case(report, shutil.get_terminal_size().columns)
    else:
        render.put(report)
    for path in outputs:
        render.put(f"written: {path}")


def _print_by_case(report: Report, width: int) -> None:
    """Print the rows of each case below its name, every column that fits and says something."""
    from attnplug.bench._text import HEADERS, filled, fitting

    records = [record for record in report if record.status == "ran"]
    lines = report.lines()
    shown = fitting(lines, width, without="case")
    header, *printed = table([HEADERS[at] for at in shown], [[line[at] for at in shown] for line in lines]).splitlines()
    put = _styled()
    put(header, "bold")
    for case in report.cases:
        ran = any(record.case == case for record in records)
        put(case.name if ran else f"{case.name}: nothing ran", "bold cyan")
        for record, line in zip(records, printed, strict=True):
            if record.case == case:
                put(line, "bold red" if not record.correct else "bold green" if record.fastest else "")
    missing = [HEADERS[at] for at in filled(lines) if at not in shown and HEADERS[at] != "case"]
    said = f"Not shown for want of width: {', '.join(missing)}; --json and --output have all." if missing else ""
    for part in ("", *([said, ""] if said else []), *report.summary().splitlines()):
        put("\n".join(textwrap.wrap(part, width, subsequent_indent="  ")) if len(part) > width else part, "")


def _styled() -> Callable[[str, str], None]:
    """Return a function that prints a line in a style, in no style where `rich` is not there."""
    if importlib.util.find_spec("rich") is None:
        return lambda line, style: render.put(line)
    from rich.console import Console
    from rich.text import Text

    console = Console(file=render.out())
    return lambda line, style: console.print(Text(line, style), soft_wrap=True)


def _list_sets(arguments: argparse.Namespace) -> int:
    from attnplug.bench import SETS

    rows = [(name, len(list(make())), (make.__doc__ or "").strip()) for name, make in SETS.items()]
    if arguments.json:
        render.print_json({"sets": [dict(zip(("name", "cases", "description"), row, strict=True)) for row in rows]})
    else:
        render.print_table(("set", "cases", "what it is"), [(name, str(count), text) for name, count, text in rows], 0)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from attnplug import bench
    from attnplug.bench._changes import CHANGE_HEADERS, change_rows, comparison

    before, after = bench.Report.read(arguments.before), bench.Report.read(arguments.after)
    changes = bench.compare(before, after, arguments.threshold)
    regressions = [change for change in changes if change.regression]
    if arguments.json:
        render.print_json({"changes": [vars(change) for change in changes], "regressions": len(regressions)})
    else:
        if changes:
            render.print_table(CHANGE_HEADERS, change_rows(changes), CHANGE_HEADERS.index("verdict"))
            render.put()
        render.put(comparison(before, after, changes))
    return 1 if regressions else 0
