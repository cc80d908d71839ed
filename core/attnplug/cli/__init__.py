"""The command line: `attnplug`, or `python -m attnplug`.

A command is a module `command_<name>.py` beside this one and its name in `parser.COMMANDS`. The module has

* `HELP`: its line in `attnplug --help`; its own docstring is what `attnplug <name> --help` shows;
* `configure(parser)`: adds its options;
* `run(arguments) -> int`: the exit status, 0, or 1 where the answer is no. A usage error, 2, is
  `arguments.fail(message)`, where a message of the library names the options instead of the arguments that they set.

All modules are imported to build the parser, so they import torch, and whatever else is heavy, in `run`.
Data goes to stdout, by `render`; warnings and errors go to stderr, and so does what plugins print.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from attnplug import AttnplugError, PluginError
from attnplug.cli import render
from attnplug.cli.parser import COMMANDS as COMMANDS
from attnplug.cli.parser import build_parser as build_parser
from attnplug.cli.parser import with_negative_values

DONE, NO, USAGE = 0, 1, 2
INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1 (the answer is no) or 2 (it could not run)."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # PyTorch's; nothing here needs it
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        except AttnplugError as error:
            _say(f"error: {error}")
            return NO if isinstance(error, PluginError) else USAGE
        except KeyboardInterrupt:
            return INTERRUPTED


def _run(argv: Sequence[str]) -> int:
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks, because somebody pressed Tab
        _complete(parser)
    try:
        with render.checked_stdout():
            arguments = parser.parse_args(with_negative_values(argv))
            if arguments.run is None:
                parser.print_help()
                return DONE
            with render.only_reports_on_stdout():
                return int(arguments.run(arguments))
        return DONE  # nobody read what was to be printed
    except render.Unwritable as error:
        _say(f"error: {error}")
        return USAGE
    except SystemExit as ended:  # argparse has said why
        return ended.code if isinstance(ended.code, int) else USAGE


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and end the process; without the extra `cli` there is no answer."""
    try:
        import argcomplete
    except ImportError as error:
        raise SystemExit(f"attnplug: completion needs argcomplete: pip install 'attnplug[cli]' ({error})") from None
    argcomplete.autocomplete(parser)


def _show_warning(message: Warning | str, *place: Any, **more: Any) -> None:
    _say(f"warning: {message}")


def _say(text: str) -> None:
    print(f"attnplug: {text}", file=sys.stderr)
