"""`attnplug bench` as users call it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import forked
from attnplug import bench
from attnplug.cli import main
from bench_kernels import plain, zeros

ROOT = Path(__file__).parents[2]
QUICK = ["--seconds", "0.002"]


@pytest.fixture
def small(tmp_path):
    """A file with one case that takes no time."""
    path = tmp_path / "small.yaml"
    path.write_text("cases: [{name: small, heads: 2, queries: 8, head_size: 8, device: cpu, dtype: float32}]")
    return ["--cases", str(path), *QUICK]


def test_a_table_goes_to_stdout_nothing_to_stderr_and_the_status_is_0(small, capsys):
    assert main(["bench", *small, "--impl", "torch,aten_math"]) == 0
    printed = capsys.readouterr()
    assert re.search(r"^small +torch +(fastest|tied|right) +1.00 +[\d.]+ (µs|ms)", printed.out, re.MULTILINE)
    assert "backward" not in printed.out  # a column that says nothing
    assert re.search(r"^torch +\d +\d +1 +1 +1.00$", printed.out, re.MULTILINE)
    assert printed.err == ""


def test_json_is_the_report(small, capsys):
    assert main(["bench", *small, "--impl", "torch", "--json"]) == 0
    report = bench.Report.from_dict(json.loads(capsys.readouterr().out))
    assert [(record.impl, record.correct) for record in report] == [("torch", True)]
    assert report.settings == {"caches": ["warm", "cold"], "seconds": 0.002, "tiny": False}


def test_every_output_is_written_and_its_name_filled_in(small, tmp_path, capsys):
    names = [f"deep/{{device}}/{{time}}{suffix}" for suffix in (".json", ".csv", ".html", ".png")]
    outputs = [argument for name in names for argument in ("-o", str(tmp_path / name))]
    (tmp_path / "deep").mkdir()
    assert main(["bench", *small, "--impl", "torch", *outputs]) == 0
    (folder,) = (tmp_path / "deep").iterdir()
    assert re.fullmatch(r"[a-z0-9-]+", folder.name)
    assert sorted(path.suffix for path in folder.iterdir()) == [".csv", ".html", ".json", ".png"]
    assert all(re.fullmatch(r"\d{8}T\d{6}Z", path.stem) and path.stat().st_size for path in folder.iterdir())
    assert capsys.readouterr().out.count("written: ") == 4


def test_a_wrong_kernel_makes_the_status_1(small, register, capsys):
    assert main(["bench", *small, "--impl", register("wrong", zeros)]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^small +wrong +WRONG", printed, re.MULTILINE)
    assert "wrong WRONG: all: out: largest error" in printed


def test_where_nothing_runs_the_status_is_1_and_each_reason_is_said(small, register, capsys):
    def broken(params):
        raise RuntimeError("no tiles")

    assert main(["bench", *small, "--impl", "broken", "--baseline", register("broken", broken)]) == 1
    assert "broken failed: all: RuntimeError: no tiles" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "nope"], "--set: there is no 'nope'"),
        (["--cases", "none.yaml"], "--cases: 'none.yaml' is not a file"),
        (["--device", "abacus"], "--device: 'abacus' is not a device"),
        (["--device", "cuda:99", "-o", "{device}.json"], "--device: 'cuda:99' is not on this machine"),
        (["--impl", "torhc"], "unknown implementation 'torhc'; did you mean 'torch'?"),
        (["--baseline", "torhc"], "baseline: unknown implementation 'torhc'"),
        (["--seconds", "-1"], "--seconds: expected seconds above 0, such as 0.5, got '-1'"),
        (["--threads", "0"], "--threads: expected a number above 0, got '0'"),
        (["--dtype", "int8"], "--dtype: expected float16"),
        (["--caches", "tepid"], "--caches: unknown value 'tepid'"),
        (["-o", "x.txt"], "x.txt: expected a file that ends in .json, .csv, .png, .html"),
        (["comparr"], "unknown command 'comparr'; did you mean 'compare'?"),
    ],
)
def test_a_wrong_use_is_a_usage_error_that_names_the_option(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_said_before_anything_runs(small, register, tmp_path, capsys):
    def never(params):
        raise AssertionError("a kernel was run")

    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "x.json"
    assert main(["bench", *small, "--impl", register("never", never), "-o", str(output)]) == 2
    assert f"{str(output.parent)!r} is not a folder" in capsys.readouterr().err


def test_a_library_that_is_missing_is_said_before_anything_runs(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", *small, "-o", str(tmp_path / "x.png")]) == 2
    assert "needs matplotlib, not installed; pip install 'attnplug[bench]'" in capsys.readouterr().err


@pytest.fixture
def terminal(monkeypatch):
    """Make stdout and stderr terminals, `terminal(60)` wide."""

    def wide(columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "isatty", lambda: True)

    return wide


def test_a_terminal_gets_cases_as_headings_and_a_bar_while_it_works(small, terminal, capsys):
    terminal(200)
    assert main(["bench", *small, "--impl", "torch,aten_math"]) == 0
    printed = capsys.readouterr()
    lines = re.sub(r"\x1b\[[\d;]*m", "", printed.out).splitlines()
    assert lines[0].split()[:3] == ["implementation", "verdict", "ratio"] and lines[1] == "small"
    assert [line.split()[0] for line in lines[2:4]] == ["torch", "aten_math"]
    assert "\x1b[1;32m" in printed.out  # the fastest is green
    assert "small: 2 in turns" in printed.err and "3/4" in printed.err


@pytest.mark.parametrize("width", [50, 65])
def test_a_narrow_terminal_gets_every_column_that_fits_and_is_told_which_do_not(small, terminal, capsys, width):
    terminal(width)
    assert main(["bench", *small, "--impl", "torch"]) == 0
    printed = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    heading, *lines = printed.splitlines()
    assert all(len(line) <= width for line in (heading, *lines)), printed
    (said,) = re.findall(r"Not shown for want of width: (.*); --json", printed.replace("\n", " "))
    assert "bwd cold" not in said  # of what is not measured nothing is missed
    gap = width - max(map(len, (heading, *lines[:2])))
    assert all(len(name) + 2 > gap for name in said.split(", ")), "one more would have fitted"


def test_a_terminal_without_rich_gets_plain_text_and_no_bar(small, terminal, monkeypatch, capsys):
    terminal(200)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", *small, "--impl", "torch"]) == 0
    printed = capsys.readouterr()
    assert "small" in printed.out and "\x1b" not in printed.out and printed.err == ""


def test_the_sets_are_listed(capsys):
    assert main(["bench", "--sets"]) == 0
    printed = capsys.readouterr().out
    for name, make in bench.SETS.items():
        assert re.search(rf"^{re.escape(name)} +{len(list(make()))} +\w", printed, re.MULTILINE)
    assert main(["bench", "--sets", "--json"]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)["sets"]] == list(bench.SETS)


def test_tiny_runs_the_kinds_of_cases_of_a_set(capsys):
    arguments = ["--set", "llama-3-8b", "--tiny", "--device", "cpu", "--impl", "torch", *QUICK, "--json"]
    assert main(["bench", *arguments]) == 0
    cases = bench.Report.from_dict(json.loads(capsys.readouterr().out)).cases
    assert [case.keys for case in cases] == [8, 32, 128, 8, 32, 128, 128]
    assert {(case.heads, case.kv_heads, case.head_size) for case in cases} == {(8, 2, 128)}


def test_an_interruption_keeps_what_is_measured_and_makes_the_status_1(interrupted, tmp_path, capsys):
    cases = tmp_path / "cases.yaml"
    cases.write_text(
        "defaults: {heads: 2, head_size: 8, device: cpu}\ncases: [{queries: 8}, {name: later, queries: 9}]"
    )
    output = tmp_path / "kept.json"
    assert main(["bench", "--cases", str(cases), "--impl", f"torch,{interrupted}", *QUICK, "-o", str(output)]) == 1
    assert "Interrupted: not measured are later." in capsys.readouterr().out
    report = bench.Report.read(output)
    assert [(record.case.queries, record.impl) for record in report] == [(8, "torch"), (8, interrupted)]
    assert report.missing == ("later",)


def test_drawing_libraries_are_imported_only_when_something_is_drawn():
    program = "import sys, attnplug.bench; print(*{name.partition('.')[0] for name in sys.modules})"
    done = forked.run(program)
    assert "torch" in done.stdout.split()
    assert not {"matplotlib", "jinja2", "rich", "yaml"} & set(done.stdout.split())


def test_other_commands_import_nothing_of_benchmarks():
    program = "import sys; from attnplug.cli import main; main(['list']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    modules = done.stderr.split()
    assert "attnplug.cli.command_bench" in modules
    assert not {name for name in modules if name.startswith("attnplug.bench")} and "torch" not in modules


def test_right_is_right_in_half_precision_too(register):
    case = bench.Case(heads=2, queries=32, head_size=16, dtype="bfloat16")
    report = bench.run(case, [register("plain", plain), "torch"], seconds=0.002)
    assert [record.correct for record in report] == [True, True]
