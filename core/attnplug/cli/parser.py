"""The parser of all commands, whose errors name options, and what was probably meant."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from attnplug import __version__
from attnplug._errors import did_you_mean
from attnplug._tables import wrap

COMMANDS = ("list", "show", "explain", "doctor", "info", "check", "bench", "tune", "new")

_DESCRIPTION = "Attention kernels as plugins: what is installed, what would run, and whether it is right."
_EPILOG = """\
Exit status: 0, success; 1, the answer is no; 2, the command could not run.

Completion in a shell: pip install "attnplug[cli]", then eval "$(register-python-argcomplete attnplug)"."""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Wraps paragraphs to the terminal's width, and leaves those with indented lines, such as examples, as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        return "\n\n".join(part if "\n " in part else "\n".join(wrap(part, width)) for part in paragraphs)


class Parser(argparse.ArgumentParser):
    """A parser that says what was probably meant by a command, an option or a choice that does not exist."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", _Formatter)
        super().__init__(*arguments, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Look for unknown options first: argparse would rather complain of what is required and was misspelt."""
        self._refuse_unknown(args)
        found, more = super().parse_known_args(args, namespace)
        if more:
            self.error(f"unexpected {', '.join(more)}; --help lists what is accepted")
        return found, more

    def _refuse_unknown(self, args: Sequence[str]) -> None:
        known = self._option_string_actions
        commands = next((action.choices or () for action in self._actions if action.nargs == argparse.PARSER), ())
        for position, argument in enumerate(args):
            misspelt = bool(commands) and position == 0 and not argument.startswith("-")
            if argument == "--" or argument in commands or misspelt:
                return
            option = argument.partition("=")[0]
            if re.fullmatch(r"--?[A-Za-z][\w-]*", option) and option not in known and argument not in known:
                attached = option[:2] in known and not option.startswith("--")  # -oFILE
                if not attached:
                    self.error(f"unknown option {option}{did_you_mean(option, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        what = "command" if action.nargs == argparse.PARSER else "value"
        close = did_you_mean(value, choices)
        raise argparse.ArgumentError(action, f"unknown {what} {value!r}{close or ';'} known: {', '.join(choices)}")

    def fail(self, message: str) -> NoReturn:
        """End with a usage error; the message may be one of the library, about an argument that an option sets."""
        self.error(self.in_options(message))

    def in_options(self, message: str) -> str:
        """Return a message of the library for somebody who types options: `enable_gqa=True` is `--gqa`.

        It names arguments as `scale: ...` and `impl='math_ref'`; the option's `dest` says which one it sets.
        """
        options = {action.dest: action.option_strings[0] for action in self._actions if action.option_strings}

        def option(found: re.Match[str]) -> str:
            name, value = found[1] or found[2], found[3]
            if name not in options:
                return found[0]
            return options[name] if value in (None, "True") else f"{options[name]} {value[1:-1]}"

        return re.sub(r"^(\w+)(?=:)|(?<!\S)(\w+)=(True|'[^']*')", option, message)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help or a version; argparse would say nothing where that cannot be written."""
        print(message, end="", file=file or sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; the documentation shows what it says."""
    parser = Parser("attnplug", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", "-V", action="version", version=f"attnplug {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"attnplug.cli.command_{name}")
        command = commands.add_parser(
            name, help=module.HELP, description=inspect.getdoc(module), usage=getattr(module, "USAGE", None)
        )
        command.add_argument("--json", action="store_true", help="print JSON")
        module.configure(command)
        command.set_defaults(run=module.run, fail=command.fail, in_options=command.in_options)
    return parser


def with_negative_values(argv: Sequence[str]) -> list[str]:
    """Join `--window -1,0` into `--window=-1,0`: argparse would take such a value for an option."""
    joined: list[str] = []
    for argument in argv:
        if re.match(r"-\d", argument) and joined and re.fullmatch(r"--[a-z-]+", joined[-1]):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def complete_with(action: argparse.Action, names: Callable[[], Sequence[str]]) -> None:
    """Let a shell complete an option's value with `names()`, which is asked when somebody presses Tab."""
    action.completer = lambda **context: names()  # type: ignore[attr-defined]  # argcomplete asks for it
