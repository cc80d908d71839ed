"""Whether what a command is to write can be written, asked before it works for minutes."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path


def check_folder(arguments: argparse.Namespace, path: Path) -> None:
    """End with a usage error where the folder of `path` does not exist, or `path` is one.

    A folder whose name is filled in later, such as `{device}`, is made then.
    """
    folder = path.parent
    while "{" in str(folder):
        folder = folder.parent
    if not folder.is_dir():
        arguments.fail(f"--output: {str(folder)!r} is not a folder; make it first: mkdir -p {shlex.quote(str(folder))}")
    if path.is_dir():
        arguments.fail(f"--output: {str(path)!r} is a folder; name a file in it")
