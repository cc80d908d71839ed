"""The workflows for GitHub do what `.ci/run` and the Makefile do, on the versions that the project names."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def jobs(workflow: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows" / workflow).read_text())["jobs"]
    return found


def made(text: str) -> set[str]:
    """Return each target that is made, with the option that chooses tests."""
    return set(re.findall(r"^make ([\w-]+(?: SLOW=\w+)?)", text, re.MULTILINE))


def made_by(workflow: str) -> set[str]:
    return made("\n".join(step.get("run", "") for job in jobs(workflow).values() for step in job["steps"]))


def test_they_run_what_ci_runs_and_the_makefile_has() -> None:
    targets = set(re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    ci = made((ROOT / ".ci/run").read_text())
    assert ci == {"lint", "test SLOW=yes"}
    assert made_by("test.yml") == {*ci, "test", "docs", "dist"}
    assert {made.partition(" ")[0] for made in made_by("test.yml")} <= targets
    assert made_by("release.yml") == {"dist"}


def test_they_cover_each_python_and_the_oldest_and_newest_pytorch() -> None:
    about = metadata.metadata("attnplug")
    named = {name.rpartition(" ")[2] for name in about.get_all("Classifier") or () if "Python :: 3." in name}
    (floor,) = (each.partition(">=")[2] for each in about.get_all("Requires-Dist") or () if each.startswith("torch"))
    test, dist = (jobs("test.yml")[job]["strategy"]["matrix"] for job in ("test", "dist"))
    assert set(test["python"]) == named
    for each in (test["include"], dist["include"]):
        assert {"newest", f"{floor}.0"} <= {one["torch"] for one in each}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("fails", [True, False])
def test_other_releases_are_tried_one_after_the_other_and_one_that_fails_is_named(tmp_path: Path, fails: bool) -> None:
    pythons = [tmp_path / "oldest", tmp_path / "newest"]
    for python in pythons:
        ends = f'case "$*" in *pytest*) echo {python.name}: "$*"; exit {int(fails and python.name == "oldest")};; esac'
        python.write_text(f"#!/bin/sh\n{ends}\n")
        python.chmod(0o755)
    command = ["make", "releases", f"PYTHONS={' '.join(map(str, pythons))}", "TESTS=tests/some tests/others"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert [line for line in done.stdout.splitlines() if line.startswith(("oldest: ", "newest: "))] == [
        f"{python.name}: -m pytest -m not slow tests/some tests/others" for python in pythons
    ]
    assert (done.returncode != 0) is fails
    assert (f"failed with: {pythons[0]}\n" in done.stderr) is fails


def test_a_bug_report_is_asked_for_info_and_explain() -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    labels = " ".join(part["attributes"]["label"] for part in form["body"])
    assert "`attnplug info`" in labels and "attnplug.explain" in labels
