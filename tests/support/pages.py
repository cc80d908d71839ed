"""Runs what a page of the documentation shows, in the order in which a reader meets it.

A block of

* `python` is run in the page's own namespace; with `title="path"` it is a file to be written instead, whatever
  its language;
* `sh` is run by a shell that stays in the folder in which the block before left it, and keeps its variables; Python
  runs in that folder too;
* `text` is what the block before it prints, where `...` stands for anything; of an exception, its type and message.

What a block prints, or raises, must be shown only if a `text` block follows it; an exception that is not shown
fails the page. `pip`, which would need a network, is a stand-in that does the same to fake distributions; Python and
the commands written in it have torch imported when they start.
"""

from __future__ import annotations

import doctest
import gc
import io
import os
import re
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked

DOCS = Path(__file__).resolve().parents[2] / "docs"

_BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

# Installs the package of the current folder as packages.py does: metadata beside modules. What is asked for by name
# must be there already.
_PIP = """
import importlib.metadata, re, sys
import setuptools.build_meta as backend

command, arguments = sys.argv[1], sys.argv[2:]
names = [argument for argument in arguments if re.match("[a-z]", argument) and argument != "dist"]
if command == "install" and "-e" in arguments:
    backend.prepare_metadata_for_build_wheel(".")
elif command == "install" and names:
    for name in names:
        importlib.metadata.version(name.partition("[")[0])
elif command == "wheel" and "." in arguments:
    backend.build_wheel("dist")
else:
    sys.exit(f"the stand-in for pip does not know {sys.argv[1:]}")
"""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page, and the line on which it starts."""

    language: str
    title: str
    source: str
    line: int


def build(site: Path, config: Path = DOCS.parent / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    """Build a site where a warning is an error."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site, "--config-file", config],
        cwd=DOCS.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page, named as `first-steps.md`."""
    text = (DOCS / page).read_text()
    return [Block(m[1], m[2] or "", m[3], text.count("\n", 0, m.start()) + 2) for m in _BLOCK.finditer(text)]


class Page:
    """A page being run: its namespace, its folder and its shell.

    Args:
        name: of the page.
        folder: empty, to work in; what lies in `folder/PACKAGE` is on the path of modules for each of `packages`.
    """

    def __init__(self, name: str, folder: Path, packages: tuple[str, ...] = ()) -> None:
        self.name, self.folder = name, folder
        self.namespace: dict[str, Any] = {"__name__": "page"}
        self._state = folder / ".shell"
        programs = folder / ".bin"
        programs.mkdir()
        (programs / "pip").write_text(f"#!{sys.executable}\n{_PIP}")
        (programs / "python").write_text(f'#!/bin/sh\nexec {forked.python("dynamo")} "$@"\n')
        for name in ("attnplug", "pytest"):
            script = Path(sys.executable).with_name(name)
            (programs / name).write_text(f'#!/bin/sh\nexec {forked.python("dynamo")} {script} "$@"\n')
        for program in programs.iterdir():
            program.chmod(0o755)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("ATTNPLUG_")}
        self._environment = inherited | {
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join((str(programs), str(Path(sys.executable).parent), os.environ["PATH"])),
            "PYTHONPATH": os.pathsep.join(str(folder / package) for package in packages),
        }

    def run(self) -> int:
        """Run every block and return how many there were.

        Raises:
            AssertionError: a block printed something else than the page shows; all of them, each with its line.
            Exception: what a block raises and the page does not show.
        """
        printed, ran = "", 0
        differences = []
        page = blocks(self.name)
        for block, following in zip(page, [*page[1:], None], strict=True):
            shown = following is not None and following.language == "text" and not following.title
            if block.title:
                self._write(block)
            elif block.language == "python":
                printed = self._python(block, shown)
            elif block.language == "sh":
                printed = self._shell(block, shown)
            elif block.language == "text":
                differences += self._differences(block, printed)
            else:
                raise AssertionError(f"{self._where(block)}: nobody runs a block of {block.language!r}")
            ran += 1
        self.namespace.clear()
        gc.collect()  # a model that the page has bound counts as such until then
        assert not differences, "\n\n".join(differences)
        return ran

    def _write(self, block: Block) -> None:
        path = self._cwd() / block.title
        assert path.parent.is_dir(), f"{self._where(block)}: {block.title} would be in a folder that does not exist"
        path.write_text(block.source)

    def _python(self, block: Block, shown: bool) -> str:
        code = compile("\n" * (block.line - 1) + block.source, str(DOCS / self.name), "exec")
        with io.StringIO() as printed, redirect_stdout(printed), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", ResourceWarning)  # of what ran before, and readers see none
            warnings.filterwarnings("ignore", "Warning: Profiler clears")  # PyTorch 2.11, of a process's first profile
            before = os.getcwd()
            os.chdir(self._cwd())
            try:
                exec(code, self.namespace)
            except Exception as error:  # a page shows an error as a reader would see it
                if not shown:
                    raise
                printed.write(f"{type(error).__name__}: {error}\n")
            finally:
                os.chdir(before)
            for warning in caught:
                printed.write(f"{warning.category.__name__}: {warning.message}\n")
            return printed.getvalue()

    def _shell(self, block: Block, shown: bool) -> str:
        state = f"source {self._state}\n" if self._state.exists() else ""
        script = f"{state}{block.source}\nstatus=$?\n(export -p; echo cd $PWD) > {self._state}\nexit $status\n"
        done = subprocess.run(
            ["bash", "-c", script if shown else f"set -e\n{script}"],
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert shown or done.returncode == 0, f"{self._where(block)}: status {done.returncode}\n{done.stdout}"
        return done.stdout

    def _differences(self, block: Block, printed: str) -> list[str]:
        if doctest.OutputChecker().check_output(block.source, printed, _FLAGS):
            return []
        return [f"{self._where(block)} shows\n{block.source}but this came:\n{printed}"]

    def _cwd(self) -> Path:
        if not self._state.exists():
            return self.folder
        return Path(self._state.read_text().rpartition("\ncd ")[2].strip())

    def _where(self, block: Block) -> str:
        return f"docs/{self.name}, line {block.line}"
