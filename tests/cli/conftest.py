"""The command line, run in this process and in fresh interpreters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import attnplug
import forked
from attnplug.cli import main
from bench_kernels import interrupted

__all__ = ["interrupted"]  # a fixture

CLI = Callable[..., SimpleNamespace]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> CLI:
    """Run one command: `cli("list", "--json")`; the result has status, out, err and, of `--json`, data."""

    def run(*arguments: str) -> SimpleNamespace:
        capsys.readouterr()
        status = main(arguments)
        printed = capsys.readouterr()
        data = json.loads(printed.out) if "--json" in arguments and printed.out else None
        return SimpleNamespace(status=status, out=printed.out, err=printed.err, data=data)

    return run


@pytest.fixture
def shell() -> CLI:
    """Run a command in a process of its own; given `options`, none even, as `python OPTIONS -m attnplug`."""

    def run(*arguments: str, options: tuple[str, ...] | None = None, **given: str) -> SimpleNamespace:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ATTNPLUG_")}
        environment = inherited | {"OMP_NUM_THREADS": "1"} | given
        if options is not None:
            command = [sys.executable, *options, "-m", "attnplug", *arguments]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        else:
            done = forked.run(f"import sys; from attnplug.cli import main; sys.exit(main({arguments}))", environment)
        return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)

    return run


@pytest.fixture
def register() -> Iterator[Callable[..., None]]:
    """Register implementations for the length of a test: `register(name="bare", requires=("absent",))`."""
    names: list[str] = []

    def add(**fields: Any) -> None:
        given = {"kernel": never, "backend": None, "capabilities": attnplug.Capabilities(), "priority": -900}
        attnplug.register_impl(attnplug.ImplSpec(**given | fields))
        names.append(fields["name"])

    yield add
    for name in names:
        attnplug.unregister_impl(name)


def never(params: Any) -> Any:
    """A forward that no command of this folder may call."""
    raise AssertionError("a kernel was run")
