"""The options that name cases, which `bench` and `tune` share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnplug._errors import did_you_mean
from attnplug.cli import values

if TYPE_CHECKING:
    from attnplug.bench import Cases


def configure(what: Any) -> None:
    """Add the options that name cases."""
    what.add_argument(
        "--set", action="append", default=[], metavar="NAME", help="named cases; attnplug bench --sets lists them"
    )
    what.add_argument(
        "--cases", action="append", default=[], metavar="FILE", help="cases from a .yaml, .toml or .json file"
    )
    what.add_argument("--device", help="cpu, cuda, ...; by default a GPU if there is one")
    what.add_argument("--dtype", type=values.dtype, help="by default bfloat16 on a GPU, float32 on a CPU")


def check(arguments: argparse.Namespace) -> None:
    """Refuse sets, files and devices that do not exist."""
    from attnplug.bench import SETS, BenchError

    for name in arguments.set:
        if name not in SETS:
            arguments.fail(f"--set: there is no {name!r}{did_you_mean(name, SETS) or ';'} the sets: {', '.join(SETS)}")
    for path in arguments.cases:
        if not Path(path).is_file():
            arguments.fail(f"--cases: {path!r} is not a file")
    if arguments.device is not None:
        from attnplug.bench._clocks import clock_for  # which imports torch

        try:
            clock_for(arguments.device)
        except BenchError as error:
            arguments.fail(str(error))


def of(arguments: argparse.Namespace) -> Cases:
    """Return the cases that the options name, with their counts, or the default set of the device."""
    from attnplug.bench import Cases, case_set, read_cases
    from attnplug.bench._sets import default_device, default_set

    chosen = {"device": arguments.device, "dtype": arguments.dtype}
    sets = arguments.set
    if not sets and not arguments.cases:
        sets = [default_set(arguments.device or default_device())]
    cases = Cases()
    for name in sets:
        cases.update(case_set(name, **chosen))
    for path in arguments.cases:
        cases.update(read_cases(path, **chosen))
    return cases
