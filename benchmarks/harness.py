"""What every benchmark shares: alternating measurement, verdicts against limits, and results with their machine.

A ratio is worth something only if both sides met the same conditions, so the candidates of a comparison take
turns, in short samples, within one process; what is reported are medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "attnplug", "attnplug-math-ref", "pluggy", "importlib-metadata", "fa3-fwd")


@dataclass(frozen=True)
class Result:
    """One measured value. Without a `limit` it informs; `aim` is what would be better still."""

    name: str
    value: float
    unit: str  # "ratio" for what is compared in one run
    limit: float | None = None
    aim: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        if self.limit is None:
            return "-"
        return "ok" if self.value <= self.limit else "OVER"

    def __str__(self) -> str:
        details = ", ".join(f"{key} {_short(value)}" for key, value in self.details.items())
        columns = f"{self.value:10.3f} {self.unit:6} {_short(self.limit):>6} {_short(self.aim):>6}  {self.verdict:4}"
        return f"{self.name:66} {columns}  {details}".rstrip()


HEADER = f"{'':66} {'value':>10} {'unit':6} {'limit':>6} {'aim':>6}"


@dataclass(frozen=True)
class Turns:
    """Seconds per call of each candidate, turn by turn."""

    seconds: Mapping[str, list[float]]

    def microseconds(self, name: str) -> float:
        return statistics.median(self.seconds[name]) * 1e6

    def ratio(self, name: str, to: str) -> float:
        """Return the median over the turns of the ratio within one turn: both met the same conditions."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return statistics.median(one / other for one, other in pairs)

    def added(self, name: str, to: str) -> float:
        """Return the median over the turns of the microseconds that `name` takes longer than `to`."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return statistics.median(one - other for one, other in pairs) * 1e6


def alternate(
    candidates: Mapping[str, Callable[[], Any]],
    turns: int,
    calls: int,
    inside: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
) -> Turns:
    """Let the candidates take turns of `calls` calls each; the order is reversed from one turn to the next.

    Keep a turn near a millisecond: then most turns pass without the operating system stepping in. `inside`
    gives the contexts, entered outside the clock, in which some candidates run.
    """
    timers = [(name, timeit.Timer(call)) for name, call in candidates.items()]
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(-1, turns):  # the first is to get warm
        for name, timer in timers if turn % 2 else reversed(timers):
            with (inside or {}).get(name, nullcontext)():
                taken = timer.timeit(calls) / calls
            if turn >= 0:
                seconds[name].append(taken)
    return Turns(seconds)


def alternate_scripts(scripts: Mapping[str, list[str]], turns: int, **environment: str) -> Turns:
    """Run fresh interpreters in turns. What each prints last is the number of seconds that it measured itself."""
    seconds: dict[str, list[float]] = {name: [] for name in scripts}
    for _ in range(turns):
        for name, command in scripts.items():
            done = subprocess.run(
                command, env=os.environ | environment, capture_output=True, text=True, check=True, timeout=600
            )
            seconds[name].append(float(done.stdout.split()[-1]))
    return Turns(seconds)


def environment() -> dict[str, Any]:
    """Describe the machine, without its name, and what is installed."""
    described = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": 1,
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            described[package] = None
    return described | _gpu()


def _gpu() -> dict[str, Any]:
    """Describe the GPU, and what of its software is in no package; nothing where a benchmark used none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    assembler = shutil.which(os.environ.get("TRITON_PTXAS_PATH", ""))
    told = "" if assembler is None else subprocess.run([assembler, "--version"], capture_output=True, text=True).stdout
    ptxas = re.search(r"V(\d+\.\d+)", told)
    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "ptxas": ptxas and ptxas[1],
    }


def as_json(results: Iterable[Result]) -> str:
    described = [asdict(result) | {"verdict": result.verdict} for result in results]
    return json.dumps({"environment": environment(), "results": described}, indent=2) + "\n"


def from_json(text: str) -> list[Result]:
    described = json.loads(text)["results"]
    return [Result(**{key: value for key, value in item.items() if key != "verdict"}) for item in described]


def main(measure: Callable[[bool], Iterable[Result]], description: str | None) -> int:
    """Run one benchmark as a program; the exit status is 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    arguments = parser.parse_args()
    results = []
    print(HEADER, flush=True)
    try:
        for result in measure(arguments.quick):
            results.append(result)
            print(result, flush=True)
    finally:  # what was measured before an interrupt counts
        if arguments.json is not None:
            arguments.json.write_text(as_json(results))
    return int(any(result.verdict == "OVER" for result in results))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results, with the machine, to FILE")
    parser.add_argument("--quick", action="store_true", help="see that it runs: the numbers mean nothing")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
