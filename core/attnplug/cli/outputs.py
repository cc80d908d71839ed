"""Whether what a command is to write can be written, asked before it works for minutes."""

from __future__ import annotations

import argparse
from pathlib import Path


def check_folder(arguments: argparse.Namespace, path: Path) -> None:
    """End with a usage error where the folder of `path` does not exist, or `path` is one."""
    if not path.parent.is_dir():
        arguments.fail(f"--output: {str(path.parent)!r} is not a folder; make it first: mkdir -p {path.parent}")
    if path.is_dir():
        arguments.fail(f"--output: {str(path)!r} is a folder; name a file in it")
