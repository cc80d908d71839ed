"""The benchmarks run and say what they must; what they measure needs a quiet machine, and is not looked at here."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import forked

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OF_A_GPU = {"gpu", "forward", "backward", "without_gpu"}  # not among those of `run.py`: on a GPU, or without one
SHARED = {"run", "harness", "peers", "false_alarms", "instant_failures"}
PROGRAMS = sorted({path.stem for path in BENCHMARKS.glob("*.py")} - OF_A_GPU - SHARED)


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [forked.python(), str(BENCHMARKS / program), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


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


def test_what_stands_for_cuda_without_a_gpu_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="triton, which brings CUDA's headers, is not installed")
    if shutil.which("cc") is None or shutil.which("nm") is None:
        pytest.skip("needs a C compiler and nm")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    without_gpu = importlib.import_module("without_gpu")
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    names = {"cudaGraphLaunch", "cudaMalloc"}
    built = without_gpu.build(BENCHMARKS / "no_gpu" / "runtime.c", "runtime.so", names, [headers], tmp_path, True)
    runtime = ctypes.CDLL(str(built))
    pointer = ctypes.c_void_p()
    assert runtime.cudaGraphLaunch() == runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(5)) == 0
    assert pointer.value is not None and pointer.value % 2**21 == 0
    assert runtime.cudaFree(pointer) == 0


@pytest.mark.slow
def test_calls_on_cuda_are_measured_without_a_gpu(tmp_path: Path) -> None:
    if torch.version.cuda is None or torch.cuda.is_available():
        pytest.skip("needs PyTorch's CUDA build, and no GPU")
    done = run("without_gpu.py", str(BENCHMARKS / "launching.py"), "--quick", "--json", str(tmp_path / "results.json"))
    names = [result["name"] for result in json.loads((tmp_path / "results.json").read_text())["results"]]
    assert "cudnn / F.scaled_dot_product_attention, forward and backward" in names, done.stderr


def test_run_knows_every_benchmark() -> None:
    done = run("run.py", "--help")
    assert PROGRAMS and all(program in done.stdout for program in PROGRAMS)
