"""How long it takes to find the plugins among a thousand installed distributions.

An installed distribution is no more than a folder NAME-1.0.dist-info on the path of modules. Most of them
have entry points, of other groups.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import harness
from harness import Result, alternate_scripts

TIMED = "import {}, time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
STATEMENTS = {
    "importlib_metadata.entry_points()": ("importlib_metadata", "importlib_metadata.entry_points()"),
    "attnplug": ("attnplug, importlib_metadata", "attnplug.list_flash_attention_impls()"),
}


def measure(quick: bool) -> Iterator[Result]:
    number, turns = (10, 1) if quick else (1000, 21)
    scripts = {name: [sys.executable, "-c", TIMED.format(*statement)] for name, statement in STATEMENTS.items()}
    with tempfile.TemporaryDirectory() as folder:
        for index in range(number):
            install(Path(folder), f"distribution-{index}")
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        alternate_scripts(scripts, 1, PYTHONPATH=path)  # the first reads from the disk
        times = alternate_scripts(scripts, turns, PYTHONPATH=path)
    ours, theirs = "attnplug", "importlib_metadata.entry_points()"
    details = {"ms": times.microseconds(ours) / 1e3, "of it": times.microseconds(theirs) / 1e3}
    name = f"discovery among {number} distributions / {theirs}"
    yield Result(name, times.ratio(ours, theirs), "ratio", 1.3, 1.1, details)


def install(folder: Path, name: str) -> None:
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[console_scripts]\n{name} = module:main\n")


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
