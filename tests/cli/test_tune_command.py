"""`attnplug tune`, `bench --save-choices` and `list --choices` as users call them."""

from __future__ import annotations

import json

import pytest
import torch

import attnplug
from attnplug import Choices
from attnplug.bench import Case, Cases
from attnplug.cli import main
from measured import fastest

CASE = Case(heads=2, queries=8, head_size=8)
QUICK = ["--seconds", "0.000001", "--impl", "torch,aten_math"]


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    got = {"share": 1.0}
    monkeypatch.setattr("attnplug.tuning._machine.share_of_processor", lambda threads: got["share"])
    monkeypatch.setattr("attnplug.bench._noise._others", lambda *_: None)
    return got


@pytest.fixture
def captured(tmp_path):
    path = tmp_path / "calls.json"
    Cases([CASE, CASE, CASE.but(causal=True)]).save(path)
    return ["--capture", str(path)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name, appauthor: tmp_path / "cache" / name)
    return tmp_path / "cache" / "attnplug" / "choices.json"


def test_choices_are_saved_shown_and_put_to_use_by_the_line_that_is_printed(captured, tmp_path, capsys):
    path = tmp_path / "mine.json"
    assert main(["tune", *captured, *QUICK, "-o", str(path)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[1].split() == ["kind", "of", "call", "was", "is", "now", "gain"]
    assert lines[2].startswith("float32 D8, B·H ≤2, S ≤8") and lines[3].startswith("float32 D8 causal, B·H ≤2, S ≤8")
    assert lines[-1] == (
        f"Saved in {path}. To use them: attnplug.use_choices({str(path)!r}), or ATTNPLUG_CHOICES={path}"
    )
    assert printed.err == ""
    exec(f"import attnplug; {lines[-1].partition('use them: ')[2].partition(', or')[0]}")
    query = torch.randn(1, 2, 8, 8)
    explained = attnplug.explain(query, query, query, is_causal=True).measured
    attnplug.restore_choices()
    assert explained.startswith("measured choice: ")


def test_without_a_file_they_are_saved_for_this_user(captured, cache, capsys):
    assert main(["tune", *captured, *QUICK]) == 0
    assert "ATTNPLUG_CHOICES=auto" in capsys.readouterr().out
    assert len(Choices.load(cache)) == 2


def test_json_is_what_the_file_has_and_the_place(captured, tmp_path, capsys):
    path = tmp_path / "mine.json"
    assert main(["tune", *captured, *QUICK, "-o", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.pop("saved") == str(path) and isinstance(told["notes"], list)
    assert told == json.loads(path.read_text())


def test_a_busy_machine_is_refused_unless_forced(captured, idle, tmp_path, capsys):
    idle["share"] = 0.3
    path = tmp_path / "mine.json"
    assert main(["tune", *captured, *QUICK, "-o", str(path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and not path.exists()
    assert "this machine is busy" in printed.err and "measure all the same with --force" in printed.err
    assert main(["tune", *captured, *QUICK, "-o", str(path), "--force"]) == 0
    assert path.exists() and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--capture", "none.json"], "--capture: 'none.json' is not a file; attnplug.capture() and save() make one"),
        (["--set", "nope"], "--set: there is no 'nope'"),
        (["--impl", "torhc"], "--impl: unknown implementation 'torhc'; did you mean 'torch'?"),
        (["--device", "cuda:97"], "--device: 'cuda:97' is not on this machine"),
        (["--seconds", "0"], "--seconds: expected seconds above 0"),
        (["-o", "file/mine.json"], "file/mine.json: cannot be written"),
        (["-o", "file"], "file: is not JSON"),
    ],
)
def test_a_wrong_use_is_said_before_anything_is_measured(
    arguments, message, captured, idle, tmp_path, monkeypatch, capsys
):
    idle["share"] = 0.3  # that the machine is busy is no answer to a wrong use
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no JSON")
    monkeypatch.setattr("attnplug.tune", lambda *_, **__: pytest.fail("something was measured"))
    if "--capture" not in arguments:
        arguments = [*captured, *arguments]
    assert main(["tune", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""


def test_bench_saves_the_choices_that_follow_from_a_run(captured, tmp_path, monkeypatch, capsys):
    from attnplug import bench

    known = bench.Ceiling("cpu", "float32", 1e11, 1e10)
    monkeypatch.setattr("attnplug.bench._run.measure_ceiling", lambda *_: known)
    path = tmp_path / "mine.json"
    cases = ["--cases", captured[1]]
    assert main(["bench", *cases, *QUICK, "--save-choices", str(path)]) == 0
    assert f"saved 2 choices in {path}" in capsys.readouterr().err
    assert len(Choices.load(path)) == 2
    path.write_text("no JSON")
    assert main(["bench", *cases, *QUICK, "--save-choices", str(path)]) == 2
    assert "is not JSON" in capsys.readouterr().err
    assert main(["bench", *cases, "--tiny", "--save-choices", str(path)]) == 2
    assert "--save-choices: times of --tiny mean nothing" in capsys.readouterr().err


def test_measured_choices_are_listed_with_whether_they_hold_here(tmp_path, cache, capsys):
    assert main(["list", "--choices"]) == 2
    assert "there is no such file; `attnplug tune" in capsys.readouterr().err
    fastest((CASE, "aten_math")).save()
    assert main(["list", "--choices"]) == 0
    printed = capsys.readouterr().out
    assert "float32 D8, B·H ≤2, S ≤8  torch  aten_math  2.00" in printed
    assert "\nholds here\n" in printed and f"{cache}: 1 choice, not in use; " in printed
    other = tmp_path / "other.json"
    other.write_text(cache.read_text().replace('"torch": "', '"torch": "0.'))
    assert main(["list", "--choices", str(other)]) == 1
    assert "does not hold here: measured with torch 0." in capsys.readouterr().out
    assert main(["list", "--choices", str(other), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["in_use"] is False and told["tables"][0]["reason"].startswith("measured with torch 0.")


def test_choices_in_use_are_listed_as_such(capsys):
    attnplug.use_choices(fastest((CASE, "aten_math")))
    try:
        assert main(["list", "--choices"]) == 0
    finally:
        attnplug.restore_choices()
    assert "1 choice, in use" in capsys.readouterr().out


def test_explain_says_what_was_measured(capsys):
    attnplug.use_choices(fastest((CASE, "aten_math")))
    try:
        assert main(["explain", "--query", "1,2,8,8"]) == 0
        printed = capsys.readouterr().out
        assert main(["explain", "--query", "1,2,8,8", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
    finally:
        attnplug.restore_choices()
    sentence = "measured choice: aten_math, 2.00 times as fast as torch (float32 D8, B·H ≤2, S ≤8)"
    assert f"{sentence}\naten_math would run." in printed
    assert told["measured"] == sentence and told["chosen"] == "aten_math"


def test_an_interruption_keeps_what_is_measured_and_makes_the_status_1(interrupted, tmp_path, capsys):
    calls, path = tmp_path / "calls.json", tmp_path / "mine.json"
    Cases([CASE, CASE.but(queries=9)]).save(calls)
    assert main(["tune", "--capture", str(calls), "--impl", interrupted, "--seconds", "0.001", "-o", str(path)]) == 1
    assert "Interrupted: not measured are B1 H2 S9 D8 float32." in capsys.readouterr().out
    assert [choice.kind.queries for choice in Choices.load(path)] == [8]
