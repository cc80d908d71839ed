"""What changed between two runs: beyond noise, by how much, and whether that is a regression."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from attnplug import bench
from attnplug.bench import BenchError, Case, Change, Record, Report, Timing
from attnplug.cli import main

CASE = Case(name="one", queries=8)


def made(**fields) -> Record:
    timing = Timing(1.0, 0.95, 1.05, 9)
    return Record(CASE, "mine", **{"status": "ran", "correct": True, "forward": timing, "memory": 100, **fields})


def of(*records: Record, **environment) -> Report:
    known = {"cpu": "abacus", "torch": "2", "implementations": {"mine": "1"}, **environment}
    return Report(records, known, (), "torch", "2026-01-01T00:00:00+00:00")


def timing(factor: float, spread: float = 0.05) -> Timing:
    return Timing(factor, factor - spread, factor + spread, 9)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, []),
        ({"forward": timing(1.07)}, []),  # the ranges meet
        ({"forward": timing(1.3, 0.5)}, []),
        ({"forward": timing(1.2)}, [("forward", 1.2, True)]),
        ({"forward": timing(1.09, 0.05)}, [("forward", 1.09, False)]),  # beyond noise, but below the threshold
        ({"forward": timing(0.5)}, [("forward", 0.5, False)]),
        ({"memory": 105}, [("memory", 1.05, False)]),
        ({"memory": 200}, [("memory", 2.0, True)]),
        ({"memory": 50}, [("memory", 0.5, False)]),
        ({"correct": False}, [("correct", None, True)]),
        ({"status": "failed", "correct": None, "forward": None}, [("status", None, True)]),
    ],
)
def test_changes_are_those_beyond_noise_and_regressions_those_above_the_threshold(fields, expected):
    changes = bench.compare(of(made(forward=timing(1.0, 0.03))), of(made(**{"forward": timing(1.0)} | fields)))
    assert [(change.what, change.ratio, change.regression) for change in changes] == expected
    assert all((change.case, change.impl) == ("one", "mine") for change in changes)


def test_the_other_way_round_a_regression_is_an_improvement():
    failed = of(made(status="failed", correct=None, forward=None))
    for worse, changes in ((of(made(forward=timing(2.0), correct=False)), 2), (failed, 1)):
        assert [change.regression for change in bench.compare(worse, of(made()))] == [False] * changes


def test_a_threshold_decides_what_a_regression_is():
    before, after = of(made()), of(made(forward=timing(1.3)))
    assert [change.regression for change in bench.compare(before, after, 0.4)] == [False]
    assert [change.regression for change in bench.compare(before, after, 0.0)] == [True]


def test_cases_are_the_same_by_what_they_are_not_by_their_name():
    renamed = replace(made(forward=timing(2.0)), case=CASE.but(name="other"))
    assert bench.compare(of(made()), of(renamed)) == [Change("other", "mine", "forward", 1.0, 2.0, 2.0, True)]
    with pytest.raises(BenchError, match="no case and implementation in common"):
        bench.compare(of(made()), of(replace(made(), case=CASE.but(queries=9))))


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_a_meaningless_threshold_is_an_error(threshold):
    with pytest.raises(BenchError, match="threshold: expected a number from 0 on"):
        bench.compare(of(made()), of(made()), threshold)


@pytest.fixture
def files(tmp_path):
    def write(*reports: Report) -> list[str]:
        paths = [str(tmp_path / f"{at}.json") for at in range(len(reports))]
        for path, report in zip(paths, reports, strict=True):
            bench.write(report, path)
        return paths

    return write


def test_the_command_ends_with_1_on_a_regression_and_with_0_otherwise(files, capsys):
    paths = files(of(made()), of(made(forward=timing(1.5), memory=50)))
    assert main(["bench", "compare", *paths]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"one +mine +forward +1 s +1\.5 s +\+50\.0% +REGRESSION", printed)
    assert re.search(r"one +mine +memory +100 B +50 B +-50\.0% +less", printed)
    assert "1 records compared: 2 changes beyond noise, 1 regressions." in printed
    assert main(["bench", "compare", *paths, "--threshold", "0.6"]) == 0
    assert main(["bench", "compare", *reversed(paths)]) == 1  # the memory
    assert main(["bench", "compare", paths[0], paths[0]]) == 0
    assert capsys.readouterr().out.endswith("1 records compared: 0 changes beyond noise, 0 regressions.\n")


def test_the_command_says_what_differs_between_the_machines(files, capsys):
    only = replace(made(), impl="other")
    paths = files(of(made()), of(made(), only, torch="3", implementations={"mine": "2"}))
    assert main(["bench", "compare", *paths]) == 0
    printed = capsys.readouterr().out
    assert "torch differs: 2 before, 3 now" in printed and "mine differs: 1 before, 2 now" in printed
    assert "1 records are in the run now alone" in printed and "cpu" not in printed


def test_the_command_prints_json(files, capsys):
    paths = files(of(made()), of(made(forward=timing(1.5))))
    assert main(["bench", "compare", *paths, "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["regressions"] == 1 and data["changes"][0]["ratio"] == 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.json", "none.json"], "none.json: cannot be read"),
        (["none.json"], "the following arguments are required: AFTER.json"),
        (["a", "b", "--threshold", "x"], "--threshold: invalid float value: 'x'"),
    ],
)
def test_a_wrong_use_of_the_command_is_a_usage_error(arguments, message, capsys):
    assert main(["bench", "compare", *arguments]) == 2
    assert message in capsys.readouterr().err
