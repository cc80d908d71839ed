"""Checks in worker processes: what takes a process down is the failure of one check, and the others go on."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attnplug
import faulty
import forked
from attnplug import Capabilities, Feature, ImplSpec, SDPBackend
from attnplug.testing import Report, Result, _pool, all_checks, check_impl, check_impls
from attnplug.testing._tasks import Task
from faulty import WORDS

CHECKS = ("check_values", "check_scale", "check_batches_and_heads")
KERNELS = ("crashes", "exits", "quits", "hangs", "loses", "loses_later", "prints")
TIMEOUT = 6.0


def register(name: str, kernel: Any) -> None:
    capabilities = Capabilities(devices=("cpu",), dtypes=("float32",))
    attnplug.register_impl(ImplSpec(name=name, kernel=kernel, backend=SDPBackend.MATH, capabilities=capabilities))


def checked(name: str, **options: Any) -> Report:
    return check_impl(name, **{"device": "cpu", "checks": CHECKS, "workers": 1, **options})


@pytest.fixture(scope="module", autouse=True)
def _workers_have_torch_imported() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", forked.python())
        yield


@pytest.fixture(scope="module")
def found() -> list[tuple[str, str]]:
    return []


@pytest.fixture(scope="module")
def reports(found: list[tuple[str, str]]) -> dict[str, Report]:
    """What workers say of each kernel of `faulty`, all in one run."""
    for name in KERNELS:
        register(name, f"faulty:{name}")
    try:
        made = check_impls(
            KERNELS,
            device="cpu",
            checks=CHECKS,
            workers=2,
            timeout=TIMEOUT,
            on_result=lambda name, result: found.append((name, result.check)),
        )
    finally:
        for name in KERNELS:
            attnplug.unregister_impl(name)
    return {report.name: report for report in made}


def the_failure(report: Report) -> Result:
    """Return the one failure: what other checks made afterwards in a fresh process passed."""
    assert {result.check: result.status for result in report.results} == {
        "check_values": "passed",
        "check_batches_and_heads": "passed",
        "check_scale": "failed",
    }, str(report)
    return report.failures[0]


def test_a_crash_costs_one_check_which_names_the_signal_and_shows_what_was_said(reports: dict[str, Report]) -> None:
    reason = the_failure(reports["crashes"]).reason
    assert "ended its process: SIGSEGV" in reason
    assert "about to read what is not there" in reason
    assert "in fault" in reason  # where in Python it was


def test_an_exit_costs_one_check(reports: dict[str, Report]) -> None:
    assert "ended its process: exit status 3" in the_failure(reports["exits"]).reason
    assert "ended its process: exit status 0" in the_failure(reports["quits"]).reason


def test_a_lost_device_costs_one_check_with_the_words_of_the_driver(reports: dict[str, Report]) -> None:
    reason = the_failure(reports["loses"]).reason
    assert f"RuntimeError: {WORDS}" in reason
    assert "after it the device cannot be used" in reason
    assert "again: " in reason


def test_a_device_that_is_lost_unnoticed_is_the_failure_of_the_check_that_lost_it(reports: dict[str, Report]) -> None:
    reason = the_failure(reports["loses_later"]).reason
    assert f"passed, but\nafter it the device cannot be used: RuntimeError: {WORDS}" in reason


def test_a_hang_is_ended_after_the_stated_time_and_says_where_it_hung(reports: dict[str, Report]) -> None:
    failure = the_failure(reports["hangs"])
    assert f"did not end within {TIMEOUT:g} s" in failure.reason
    assert "in fault" in failure.reason
    assert TIMEOUT < failure.seconds < 3 * TIMEOUT


def test_what_a_kernel_prints_does_not_disturb_the_results(reports: dict[str, Report]) -> None:
    assert reports["prints"].passed, str(reports["prints"])


def test_results_come_as_they_are_found_and_reports_in_the_order_that_was_asked_for(
    reports: dict[str, Report], found: list[tuple[str, str]]
) -> None:
    assert list(reports) == list(KERNELS)
    assert sorted(found) == sorted((name, check) for name in KERNELS for check in CHECKS)


def test_several_workers_give_what_one_process_gives_in_the_same_order() -> None:
    here, there = (checked("math_ref", dtype="float32", workers=count) for count in (0, 2))
    assert [(each.check, each.status) for each in there.results] == [(each.check, each.status) for each in here.results]


def test_workers_share_the_features_of_a_full_run_and_what_each_finds_is_one_result() -> None:
    features = {Feature.CAUSAL, Feature.BOOLEAN_MASK, Feature.VALUE_HEAD_SIZE}
    capabilities = Capabilities(devices=("cpu",), dtypes=("float32",), features=features)
    spec = ImplSpec(name="pairs", kernel="faulty:wrong_together", backend=SDPBackend.MATH, capabilities=capabilities)
    attnplug.register_impl(spec)
    told: list[Result] = []
    options: dict[str, Any] = {"level": "full", "workers": 2, "timeout": 60.0, "on_result": told.append}
    checks = ["check_feature_pairs", "check_window_lower_right", "check_values"]
    results = check_impl("pairs", device="cpu", checks=checks, **options).results
    assert [(each.check, each.status) for each in results] == [
        ("check_values", "passed"),
        ("check_window_lower_right", "not applicable"),
        ("check_feature_pairs", "failed"),
    ]
    assert sorted(told, key=str) == sorted(results, key=str)
    reason = results[-1].reason
    assert "boolean mask and causal: " in reason and "ended its process: SIGSEGV" in reason


def test_on_a_cpu_checks_run_in_this_process_unless_workers_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def noted(params: attnplug.SDPAParams) -> Any:
        ran.append(params)
        return torch.softmax(params.scale * params.query @ params.key.mT, -1) @ params.value, None

    monkeypatch.setattr(faulty, "prints", noted)  # a worker would import the one that is there
    register("noted", "faulty:prints")
    assert check_impl("noted", device="cpu", checks=["check_values"]).passed and ran


def test_a_kernel_that_cannot_be_sent_to_a_worker_says_what_to_do() -> None:
    name = "local"
    register(name, lambda params: (params.query, None))
    with pytest.raises(ValueError, match="give ImplSpec.kernel as 'package.module', or use workers=0"):
        checked(name)
    assert not checked(name, workers=None).passed  # which on a CPU is this process


@pytest.mark.parametrize(("argument", "value"), [("workers", -1), ("timeout", 0.0)])
def test_arguments_that_mean_nothing_are_refused(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{argument}: expected"):
        checked("torch", **{argument: value})


def test_a_worker_that_cannot_start_is_an_error_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="no worker could be started: exit status 1"):
        checked("math_ref", dtype="float32")


_ODD = """\
#!{python} -SE
import os, pathlib, signal, sys, time

count = pathlib.Path({folder!r}, "count")
with count.open("ab") as file:
    file.write(b".")
answer, end = {ways!r}[count.stat().st_size - 1]
if end == "never begins":
    sys.exit(7)
os.write(1, b"\\x8c\\x01x.")  # the greeting, pickled
os.read(0, 1)
os.write(1, answer)
if end == "stays":
    os.close(1)
    time.sleep(600)
os.kill(os.getpid(), signal.SIGKILL)
"""
ODD = [
    ("in the middle of a message", pickle.dumps("a long word" * 9)[:40], "dies", "ended its process: SIGKILL"),
    ("in its first bytes", b"\x80", "dies", "ended its process: SIGKILL"),
    ("without a word", b"", "dies", "ended its process: SIGKILL"),
    ("a later protocol", b"\x80\xff", "dies", "ended its process: SIGKILL"),
    ("more than there is memory", b"\x8e" + b"\xff" * 7 + b"\x7f", "dies", "ended its process: SIGKILL"),
    ("a class of no module", b"cno_such_module\nname\n.", "stays", "ModuleNotFoundError"),
    ("a class that is not there", b"cos\nno_such_name\n.", "stays", "AttributeError"),
    ("a number", b"I1\n.", "stays", "something other than a result: int"),
    ("text", b"hello", "stays", "UnpicklingError"),
    ("nothing more", b"", "stays", "EOFError"),
    ("no start", b"", "never begins", "no worker could be started: exit status 7"),
]


@pytest.mark.parametrize("stays", [False, True])
def test_whatever_a_worker_leaves_half_said_costs_one_check(
    stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process in the worker's place misbehaves in another way each time that it is started."""
    kinds = [each for each in ODD if (each[2] == "stays") is stays]
    ways = [(b"", "stays"), *((answer, end) for _, answer, end, _ in kinds)]
    odd, python = tmp_path / "odd", sys.base_prefix + "/bin/python3"
    odd.write_text(_ODD.format(python=python, folder=str(tmp_path), ways=ways))
    odd.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(odd))
    if stays:  # which is waited for in vain; what is about to end may need all the time that there is
        monkeypatch.setattr(_pool, "_GRACE", 0.1)

    worker = _pool.Worker()
    process = worker._started()
    process.kill()
    process.wait()
    result = worker.run(Task("math_ref", "check_values", "cpu", "float32", full=False), TIMEOUT)
    assert "ended its process before this check, after it began: SIGKILL" in result.reason

    names = tuple(check.name for check in all_checks()[: len(kinds)])
    report = checked("math_ref", dtype="float32", checks=names)
    assert len(report.failures) == len(kinds), str(report)
    for result, (how, _, _, expected) in zip(reversed(report.results), kinds, strict=True):
        assert expected in result.reason, how


_TEST = """
import sys
sys.executable = {python!r}
sys.path.insert(0, {folder!r})
import attnplug
from attnplug.testing import parametrize_with_checks

attnplug.register_impl(attnplug.ImplSpec(
    name="mine", kernel="faulty:crashes", backend=attnplug.SDPBackend.MATH,
    capabilities=attnplug.Capabilities(devices=("cpu",), dtypes=("float32",))))

@parametrize_with_checks("mine", isolated=True)
def test_mine(check):
    check()
"""


def test_parametrized_tests_survive_a_crash(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        _TEST.format(python=sys.executable, folder=str(Path(faulty.__file__).parent))
    )
    wanted = "check_scale or check_batches"
    command = [forked.python(), "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-q", "-k", wanted, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "ended its process: SIGSEGV" in done.stdout
    assert "1 failed, 1 passed" in done.stdout.splitlines()[-1], done.stdout
