"""The command line: `attnplug`, or `python -m attnplug`.

A command is a module `command_<name>.py` beside this one and its name in `COMMANDS`. The module has

* `HELP`: its line in `attnplug --help`; its own docstring is what `attnplug <name> --help` shows;
* `configure(parser)`: adds its options;
* `run(arguments) -> int`: the exit status, 0, or 1 where the answer is no. A usage error, 2, is
  `arguments.fail(message)`.

All modules are imported to build the parser, so they import torch, and whatever else is heavy, in `run`.
Data goes to stdout, by `render`; warnings and errors go to stderr, and so does what plugins print.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from attnplug import AttnplugError, PluginError, __version__
from attnplug.cli import render

COMMANDS = ("list", "explain", "info", "check", "bench", "tune", "new")

DONE, NO, USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1 (the answer is no) or 2 (a usage error)."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            status = _run(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()
        except AttnplugError as error:
            print(f"attnplug: error: {error}", file=sys.stderr)
            return NO if isinstance(error, PluginError) else USAGE
        except BrokenPipeError:  # whoever read has read enough, as in `attnplug list | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return NO
    return status


def _run(argv: Sequence[str]) -> int:
    try:
        arguments = build_parser().parse_args(_with_negative_values(argv))
        with render.only_reports_on_stdout():
            return int(arguments.run(arguments))
    except SystemExit as ended:  # argparse has said why
        return ended.code if isinstance(ended.code, int) else USAGE


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; the documentation shows what it says."""
    parser = argparse.ArgumentParser(
        "attnplug",
        description="Attention kernels as plugins: what is installed, and what would run.",
        epilog="Exit status: 0; 1, the answer is no; 2, usage error.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"attnplug {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"attnplug.cli.command_{name}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=inspect.getdoc(module),
            usage=getattr(module, "USAGE", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_argument("--json", action="store_true", help="print JSON")
        module.configure(command)
        command.set_defaults(run=module.run, fail=command.error)
    return parser


def _with_negative_values(argv: Sequence[str]) -> list[str]:
    """Join `--window -1,0` into `--window=-1,0`: argparse would take such a value for an option."""
    joined: list[str] = []
    for argument in argv:
        if re.match(r"-\d", argument) and joined and re.fullmatch(r"--[a-z-]+", joined[-1]):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _show_warning(message: Warning | str, *place: Any, **more: Any) -> None:
    print(f"attnplug: warning: {message}", file=sys.stderr)
