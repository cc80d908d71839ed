"""Measure which implementation is the fastest right one for each kind of call, and save the choices.

What is measured is what a program called (--capture, a file that attnplug.capture() saved), named cases (--set), or
cases from a file (--cases); without any of these, a set that takes about a minute. Choices are added to those that the
file holds already. Ctrl-C keeps what is measured. Exit status 1: nothing was right, it was interrupted, or the machine
is busy with something else (--force measures all the same).

examples:
  attnplug tune --capture my_model.json
  attnplug tune --set llama-3-8b --impl flash_triton,cudnn --dtype bfloat16 -o llama.json
  ATTNPLUG_CHOICES=llama.json python serve.py
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from attnplug._control.registration import check_name
from attnplug.cli import cases, choices, render, values

if TYPE_CHECKING:
    from attnplug import Choices

HELP = "measure which correct implementation is fastest for each kind of call, and save it"
USAGE = "attnplug tune [--capture FILE | --set NAME | --cases FILE] [options]"


def configure(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--capture", action="append", default=[], metavar="FILE", help="cases that attnplug.capture() saved"
    )
    cases.configure(what)
    how = parser.add_argument_group("how it is measured and kept")
    how.add_argument("--impl", type=values.names, metavar="NAMES", help="candidates besides torch; by default all")
    how.add_argument("--seconds", type=values.seconds, metavar="S", help="for each implementation and direction")
    how.add_argument("--threads", type=values.size, metavar="N", help="threads of PyTorch on a CPU")
    how.add_argument("--force", action="store_true", help="measure even if the machine is busy")
    how.add_argument("--output", "-o", metavar="FILE", help="add the choices to this file instead of this user's")


def run(arguments: argparse.Namespace) -> int:
    for name in arguments.impl or ():
        check_name(name, "--impl")
    for path in arguments.capture:
        if not Path(path).is_file():
            arguments.fail(f"--capture: {path!r} is not a file; attnplug.capture() and save() make one")
    cases.check(arguments)
    import torch

    import attnplug
    from attnplug._selection.choice_files import check_writable, default_place
    from attnplug.bench._clocks import clock_for
    from attnplug.bench._run import SECONDS
    from attnplug.tuning._machine import busy

    place = default_place() if arguments.output is None else Path(arguments.output)
    arguments.cases += arguments.capture
    measured = cases.of(arguments)
    devices = {case.device for case in measured}
    for device in devices:
        clock_for(device)  # that it is not there is said before that the machine is busy, which takes time to change
    check_writable(place)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if not arguments.force and (reason := busy(devices)):
        print(
            f"attnplug: {reason}. Wait until it is idle, or measure all the same with --force.",
            file=sys.stderr,
        )
        return 1
    with render.progress_bar() as progress, warnings.catch_warnings():
        if arguments.force:
            warnings.simplefilter("ignore", attnplug.ChoicesWarning)
        found = attnplug.tune(measured, arguments.impl, seconds=arguments.seconds or SECONDS, progress=progress)
    if len(found):
        choices.save(found, place)
    _print(arguments, found, place)
    interrupted = any(note.startswith("Interrupted") for note in found.notes)
    return 0 if len(found) and not interrupted else 1


def _print(arguments: argparse.Namespace, found: Choices, place: Path) -> None:
    from attnplug._selection.choice_files import as_plain

    if arguments.json:
        saved = str(place) if len(found) else None
        render.print_json({**as_plain(found.tables, found.notes), "saved": saved})
        return
    choices.show(found)
    if len(found):
        render.put(f"\n{how_to_use(place, is_default=arguments.output is None)}")


def how_to_use(place: Path, is_default: bool) -> str:
    """Return the lines that put saved choices to use."""
    named = "auto" if is_default else str(place)
    return f"Saved in {place}. To use them: attnplug.use_choices({str(place)!r}), or ATTNPLUG_CHOICES={named}"
