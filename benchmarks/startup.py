"""How long `import attnplug` takes once torch is there, and `attnplug list` from a shell."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import harness
from harness import Result, alternate, alternate_scripts

IMPORT = "import torch, time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
STATEMENTS = {
    "import attnplug": "import attnplug",
    "and its functions": "from attnplug import scaled_dot_product_attention, sdpa_kernel, patch_torch",
}


def measure(quick: bool) -> Iterator[Result]:
    turns = 1 if quick else 15
    scripts = {name: [sys.executable, "-c", IMPORT.format(statement)] for name, statement in STATEMENTS.items()}
    times = alternate_scripts(scripts, turns)
    for name in scripts:
        yield Result(f"{name}, beyond import torch", times.microseconds(name) / 1e3, "ms", 60, 30)

    command = Path(sysconfig.get_path("scripts"), "attnplug")
    shell = {
        "attnplug list": lambda: run(str(command), "list"),
        "attnplug --help": lambda: run(str(command), "--help"),
        "python -c pass": lambda: run(sys.executable, "-c", "pass"),
    }
    times = alternate(shell, turns, 1)
    for name, limits in zip(shell, ((0.5, 0.2), (None, None), (None, None)), strict=True):
        yield Result(f"{name}, from a shell", statistics.median(times.seconds[name]), "s", *limits)
    imported = run(sys.executable, "-X", "importtime", "-m", "attnplug", "list").stderr
    modules = {line.rpartition("|")[2].strip() for line in imported.splitlines()}
    yield Result("attnplug list: imports torch", int("torch" in modules), "yes=1", 0, 0)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=os.environ | {"NO_COLOR": "1"}, capture_output=True, text=True, check=True)


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
