"""`make gpu`: parts with time limits, and a summary that always comes."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import forked
from attnplug import bench
from attnplug.cli import main

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def part(gpu: ModuleType, name: str, program: str, limit: float = 60.0) -> object:
    return gpu.Part(name, f"claim of {name}", [sys.executable, "-uc", program], limit, gpu.told_as_it_is)


def test_a_part_that_hangs_is_ended_at_its_limit_and_the_summary_has_what_it_wrote(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 2.0)
    start = time.monotonic()
    chosen = [
        part(gpu, "hangs", "import time; print('a first result'); time.sleep(600)", 5.0),
        part(gpu, "good", "print('all is well')"),
    ]
    assert gpu.run(chosen, tmp_path / "results") == 1
    assert time.monotonic() - start < 60
    summary = (tmp_path / "results" / "summary.txt").read_text()
    assert "hangs: ended, its time was over, after" in summary
    assert "  a first result" in summary
    assert "good: done after" in summary
    assert summary in capsys.readouterr().out


def test_a_part_that_fails_does_not_keep_the_others_from_running(gpu: ModuleType, tmp_path: Path) -> None:
    chosen = [part(gpu, "bad", "import sys; sys.exit(3)"), part(gpu, "good", "print('all is well')")]
    assert gpu.run(chosen, tmp_path) == 1
    summary = (tmp_path / "summary.txt").read_text()
    assert "bad: failed (exit status 3) after" in summary
    assert "  all is well" in summary
    assert gpu.run(chosen[1:], tmp_path) == 0


@pytest.mark.parametrize("error", [OSError("No space left on device"), ValueError("no JSON")])
def test_a_part_whose_results_cannot_be_kept_or_read_does_not_keep_the_others_from_running(
    gpu: ModuleType, tmp_path: Path, error: Exception
) -> None:
    def told(log: Path) -> list[str]:
        raise error

    chosen = [
        dataclasses.replace(part(gpu, "bad", "print(1)"), told=told),
        part(gpu, "good", "print('all is well')"),
    ]
    assert gpu.run(chosen, tmp_path) == 1
    summary = (tmp_path / "summary.txt").read_text()
    assert f"bad: failed ({type(error).__name__}: {error}) after" in summary
    assert "  all is well" in summary


def test_an_interrupt_ends_the_part_and_the_summary_has_what_came_before(gpu: ModuleType, tmp_path: Path) -> None:
    program = "import os, signal, time; print('begun'); os.kill(os.getppid(), signal.{}); time.sleep(600)"
    for name in ("SIGINT", "SIGTERM"):
        chosen = [part(gpu, "good", "print('all is well')"), part(gpu, "asks", program.format(name))]
        assert gpu.run(chosen, tmp_path) == 1
        summary = (tmp_path / "summary.txt").read_text()
        assert "  all is well" in summary and "\ninterrupted\n" in summary


def test_what_there_is_no_time_for_is_said_to_be_not_run(gpu: ModuleType, tmp_path: Path) -> None:
    assert gpu.run([part(gpu, "late", "print(1)")], tmp_path, limit=1.0) == 1
    assert "late: not run, the 1 s of the whole are over" in (tmp_path / "summary.txt").read_text()


def test_checks_are_summed_up_from_a_file_that_may_be_cut_off(gpu: ModuleType, tmp_path: Path) -> None:
    result = {"impl": "mine", "check": "check_values", "dtype": "float32", "status": "passed", "reason": ""}
    fault = {**result, "check": "check_lse", "status": "failed", "reason": "ended its process: SIGSEGV\nmore"}
    (tmp_path / "found.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (result, fault)) + '{"impl":')
    told = list(gpu.told_by_checks(tmp_path / "found.jsonl"))
    assert told == ["mine: 1 passed, 1 failed", "FAILED mine check_lse[float32]: ended its process: SIGSEGV"]
    assert list(gpu.told_by_checks(tmp_path / "nothing.jsonl")) == []


@pytest.mark.parametrize("spread", [[], ["-n", "1"]], ids=["alone", "spread"])
def test_tests_are_summed_up_from_the_log_of_pytest(gpu: ModuleType, tmp_path: Path, spread: list[str]) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False, 'PASSED is no status here'\n"
        "def test_other(): pytest.skip('no')\n"
    )
    given = ["-v", "-p", "no:cacheprovider", str(tmp_path)]
    tests = gpu.tests(tmp_path, "log", "claim", spread, given, 60.0, rehearsal=False)
    command, log = [forked.python(), *tests.command[1:]], tmp_path / "log.txt"
    environment = os.environ | tests.environment
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    log.write_text(done.stdout)
    counts, *failed = tests.told(log)
    assert sorted(counts.split(", ")) == ["1 failed", "1 passed", "1 skipped"]
    (line,) = failed
    assert line.startswith("FAILED ") and "test_some.py::test_bad: AssertionError: PASSED is no status here" in line


def test_why_a_test_failed_is_kept_of_a_run_that_is_ended(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_some.py").write_text(
        "import os\ndef test_bad():\n    numbers = [1, 2]\n    assert numbers == [2, 1]\ndef test_last(): os._exit(9)\n"
    )
    given = ["-v", "-p", "no:cacheprovider", "-p", "no:randomly", str(tmp_path)]
    tests = gpu.tests(tmp_path / "results", "tests", "claim", [], given, 60.0, rehearsal=False)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.run([tests], tmp_path / "results") == 1
    summary = (tmp_path / "results" / "summary.txt").read_text()
    assert "FAILED test_some.py::test_bad: assert [1, 2] == [2, 1]" in summary
    assert "numbers = [1, 2]" in (tmp_path / "results" / "tests.jsonl").read_text()


def test_every_file_with_tests_for_a_gpu_is_run(gpu: ModuleType) -> None:
    arguments = gpu.pytest_arguments()
    assert "tests/dispatch/test_devices.py" in arguments
    assert all((SCRIPT.parents[1] / name).exists() for name in arguments if name.startswith("tests/"))


def test_all_parts_together_stay_below_eight_minutes(gpu: ModuleType, tmp_path: Path) -> None:
    chosen = gpu.parts(tmp_path, ["torch", "math_ref", "flash_triton"])
    assert sum(part.limit for part in chosen) <= gpu.LIMIT < 480


def test_the_kit_runs_on_both_families_of_kernels(gpu: ModuleType, tmp_path: Path) -> None:
    chosen = {part.name: part for part in gpu.parts(tmp_path, ["torch", "flash_triton"])}
    assert "--full" in chosen["flash_triton"].command and not chosen["flash_triton"].environment
    assert {"check_values", "check_feature_triples"} < {*chosen["flash_triton"].command}
    assert chosen["plain"].environment == {"FLASH_TRITON_HOPPER": "0"}
    assert "flash_triton" not in chosen["conformance"].command
    assert "plain" not in {part.name for part in gpu.parts(tmp_path, ["torch"])}


def test_a_part_has_its_environment(gpu: ModuleType, tmp_path: Path) -> None:
    told = part(gpu, "told", "import os; print(os.environ['FLASH_TRITON_HOPPER'])")
    assert gpu.run([dataclasses.replace(told, environment={"FLASH_TRITON_HOPPER": "0"})], tmp_path) == 0
    assert "\n  0\n" in (tmp_path / "summary.txt").read_text()


@pytest.mark.slow
def test_a_rehearsal_starts_parts_on_a_cpu_and_has_their_results(gpu: ModuleType, tmp_path: Path) -> None:
    """The others are too long for a test; those that time calls may fail by what they measure there."""
    names = ["aten_flash", "forward", "backward"]
    command = [forked.python(), str(SCRIPT), "--rehearse", "--results", str(tmp_path)]
    command += [argument for name in names for argument in ("--part", name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    summary = done.stdout.partition("=== summary")[2]
    for name in names:
        assert re.search(rf"^{name}: (done|failed \(exit status 1\)) after", summary, re.MULTILINE), done.stdout[-6000:]
        assert list(tmp_path.glob(f"{name}.json*"))
    assert "aten_flash: 2 passed" in summary and "Traceback" not in summary


def test_the_benchmark_part_runs_on_a_cpu_when_shrunk(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (figures,) = (each for each in gpu.parts(tmp_path, ["torch", "aten_flash", "math_ref"]) if each.name == "kernels")
    arguments = figures.command[figures.command.index("bench") :]
    arguments[arguments.index("--device") + 1] = "cpu"
    arguments[arguments.index("--seconds") + 1] = "0.001"
    assert main([*arguments, "--tiny"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.csv", "kernels.json", "kernels.png"]
    report = bench.Report.read(tmp_path / "kernels.json")
    impls = arguments[arguments.index("--impl") + 1].split(",")
    assert len(report) == len(impls) * len(bench.case_set("kernels"))
    assert not report.wrong and {"torch", "aten_flash"} <= set(report.impls)
    with (tmp_path / "kernels.csv").open() as lines:
        assert len(list(csv.DictReader(lines))) == len(report)
    capsys.readouterr()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_gpu_passes_the_part_on() -> None:
    command = ["make", "-n", "gpu", "PART=conformance"]
    planned = subprocess.run(command, check=True, cwd=SCRIPT.parents[1], capture_output=True, text=True)
    assert "benchmarks/gpu.py --part conformance" in planned.stdout.replace("\\\n\t", "")


def test_what_a_needed_module_imports_is_needed_too(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needed_by_nobody.py").write_text("import what_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = [gpu.lacking(name) for name in ("json", "what_nobody_has", "needed_by_nobody")]
    assert found == ["", "what_nobody_has", "what_nobody_has"]


def test_figures_are_written_without_matplotlib(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    (figures,) = (each for each in gpu.parts(tmp_path, ["torch"]) if each.name == "kernels")
    outputs = [Path(given).name for given in figures.command if given.startswith(str(tmp_path))]
    assert outputs == ["kernels.json", "kernels.csv"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_it_needs() -> None:
    done = subprocess.run([forked.python(), str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "needs a CUDA device\n")
