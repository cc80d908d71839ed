"""The benchmarks run and say what they must; what they measure needs a quiet machine, and is not looked at here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAMS = (
    "calls",
    "registered",
    "decoding",
    "scopes",
    "compiled",
    "encoder",
    "startup",
    "discovery",
    "memory",
    "launching",
    "parallel",
    "choices",
    "watching",
)


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / program), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_each_benchmark_runs_alone_and_gives_every_value_a_verdict(program: str, tmp_path: Path) -> None:
    done = run(f"{program}.py", "--quick", "--json", str(tmp_path / "results.json"))
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["results"], done.stderr
    for result in report["results"]:
        limit = result["limit"]
        assert result["verdict"] == ("-" if limit is None else "ok" if result["value"] <= limit else "OVER")
        assert result["name"] in done.stdout
    over = any(result["verdict"] == "OVER" for result in report["results"])
    assert done.returncode == over, done.stderr


def test_all_run_together_and_the_results_name_machine_and_versions(tmp_path: Path) -> None:
    done = run("run.py", "discovery", "--quick", "--json", str(tmp_path / "results.json"))
    report = json.loads((tmp_path / "results.json").read_text())
    assert {"cpu", "cores", "python", "torch", "attnplug"} <= set(report["environment"])
    assert report["results"], done.stderr
    assert "over the limit:" in done.stdout


def test_run_knows_every_benchmark() -> None:
    done = run("run.py", "--help")
    others = {
        "gpu",
        "forward",
        "backward",
        "candidates",
        "peers",
        "false_alarms",
    }  # on a GPU alone, shared, or without a clock
    assert {path.stem for path in BENCHMARKS.glob("*.py")} - {"run", "harness"} - others == set(PROGRAMS)
    assert all(program in done.stdout for program in PROGRAMS)
