"""Empty virtual environments to which this one lends some distributions, with all that they require, and no more.

An environment of its own would download them; this one is made without a network, and still has nothing that a user's
would not have. What is tried in it is installed by pip.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import venv
from pathlib import Path


def required(name: str, found: dict[str, importlib.metadata.Distribution] | None = None) -> set[str]:
    """Return a distribution and all that it requires here, extras left out, by their normalised names."""
    found = {} if found is None else found
    key = _normalised(name)
    if key not in found:
        found[key] = importlib.metadata.distribution(name)
        for requirement in found[key].requires or ():
            each = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
            marker = requirement.partition(";")[2]
            if "extra" not in marker and _holds(marker):
                required(each, found)
    return set(found)


def _holds(marker: str) -> bool:
    from packaging.markers import Marker

    return not marker.strip() or Marker(marker).evaluate()


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class Environment:
    """An empty environment in `folder`, with `lent` from this one.

    Args:
        folder: to make it in.
        lent: distributions, which with all that they require are linked into it.
    """

    def __init__(self, folder: Path, *lent: str) -> None:
        self.folder = folder
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        self.programs = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.programs / "python"
        question = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.packages = Path(subprocess.check_output([self.python, "-c", question], text=True).strip())
        for name in sorted(set().union(*(required(each) for each in lent))):
            self._link(importlib.metadata.distribution(name))

    def _link(self, distribution: importlib.metadata.Distribution) -> None:
        """Link what a distribution has at the top of its folder; parts of a namespace package one by one."""
        for file in distribution.files or ():
            place = Path(*file.parts[:1])
            if place.name in ("..", "__pycache__") or (self.packages / place).exists():
                continue
            (self.packages / place).symlink_to(distribution.locate_file(place))

    def install(self, *folders: Path) -> None:
        """Install projects with pip, from their sources; nothing is downloaded."""
        options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(self.packages))
        command = [sys.executable, "-m", "pip", "install", *options, *map(str, folders)]
        subprocess.run(command, check=True, timeout=600)
        for name in ("attnplug",):  # --target has no place for programs but its own
            program = self.programs / name
            program.write_text(f"#!{self.python}\nimport sys\nfrom attnplug.cli import main\nsys.exit(main())\n")
            program.chmod(0o755)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the environment's Python, which sees nothing else."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ATTNPLUG_", "PYTHONPATH"))}
        return subprocess.run(
            [str(self.python), *arguments],
            env=kept | {"OMP_NUM_THREADS": "1"} | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
