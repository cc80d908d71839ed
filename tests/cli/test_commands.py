"""What holds for every command: exit status, streams, and what a process imports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import attnplug
import attnplug.bench

KERNELS = ("torch_sdpa", "aten_flash", "aten_math")
COMMANDS = {
    "list": (),
    "show": ("math_ref",),
    "explain": ("--query", "1,8,128,64"),
    "doctor": (),
    "info": (),
    "check": ("torch", "--device", "cpu", "--dtype", "float32", "--only", "check_scale"),
    "bench": ("--sets",),
}


def imported(stderr: str) -> set[str]:
    """Return the modules that `python -X importtime` saw."""
    return {line.rpartition("|")[2].strip() for line in stderr.splitlines() if line.startswith("import time:")}


def test_listing_imports_neither_torch_nor_a_kernel(shell):
    done = shell("list", options=("-X", "importtime"))
    modules = imported(done.err)
    assert done.status == 0 and "attnplug.cli" in modules
    heavy = {"torch", "numpy", "triton", "rich.console"} | {f"attnplug.builtin.{kernel}" for kernel in KERNELS}
    assert not modules & heavy


def test_explaining_is_seen_to_import_torch_and_the_kernels(shell):
    """The test above can fail."""
    modules = imported(shell("explain", "--query", "1,8,128,64", options=("-X", "importtime")).err)
    assert {"torch", "attnplug.builtin.masks"} <= modules


def test_help_and_version_import_no_torch(shell):
    for option in ("--help", "-V", "--version"):
        done = shell(option, options=("-X", "importtime"))
        assert done.status == 0 and "torch" not in imported(done.err)
    assert done.out == f"attnplug {attnplug.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(cli, name):
    assert "--json" in cli(name, "--help").out
    assert cli(name, *COMMANDS[name], "--json").data["format"] == 1


def keys(value) -> set[str]:
    """Return the names of all fields, but those of objects whose names are data."""
    if isinstance(value, list):
        return {name for item in value for name in keys(item)}
    if not isinstance(value, dict):
        return set()
    below = {key: item for key, item in value.items() if key not in ("versions", "environment", "gpus")}
    return {*value} | {name for item in below.values() for name in keys(item)}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_of_json_is_in_the_reference(cli, name):
    page = (Path(__file__).parents[2] / "docs/reference/command-line.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
    given = keys(cli(name, *COMMANDS[name], "--json").data)
    assert {key for key in given if f"`{key}`" not in page} == set()
    assert all(f"`{key}`" in page.partition("## JSON")[2] for key in given) and row


@pytest.mark.parametrize("name", COMMANDS)
def test_data_goes_to_stdout_and_nothing_else_does(cli, name):
    done = cli(name, *COMMANDS[name])
    assert done.status == 0 and done.out.endswith("\n") and not done.err


@pytest.mark.parametrize("arguments", [("lst",), ("list", "--colour"), ("list", "--stat", "broken"), ("explain",)])
def test_a_usage_error_is_status_2_and_says_so_on_stderr(cli, arguments):
    done = cli(*arguments)
    assert (done.status, done.out) == (2, "")
    assert "error: " in done.err and "Traceback" not in done.err


def test_without_a_command_there_is_help(cli):
    done = cli()
    assert (done.status, done.err) == (0, "") and "commands:" in done.out


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("lst",), "'list'"),
        (("explian", "--query", "1,2"), "'explain'"),
        (("list", "--verbse"), "'--verbose'"),
        (("explain", "--qery", "1,2"), "'--query'"),
        (("explain", "--query=1,2", "--softcp=3"), "'--softcap'"),
        (("list", "--status", "brokn"), "'broken'"),
        (("bench", "compare", "a", "b", "--treshold", "1"), "'--threshold'"),
        (("explain", "--query", "1,2", "--dtype", "bf61"), "'bf16'"),
    ],
)
def test_a_typing_error_is_told_what_was_meant(cli, arguments, meant):
    done = cli(*arguments)
    assert (done.status, done.out) == (2, "")
    assert f"did you mean {meant}?" in done.err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "--impl", "nosuch"),
        ("bench", "--set", "nosuch"),
        ("bench", "-o", "results.txt"),
        ("bench", "-o", "a_folder_that_is_nowhere/results.json"),
        ("bench", "compare", "absent.json", "absent.json"),
        ("check", "nosuch"),
        ("check", "torch", "--only", "check_nothing"),
        ("explain", "--query", "1,8,128,64", "--scope", "nosuch"),
        ("show", "nosuch"),
        ("doctor", "nosuch"),
        ("list", "--json", "nosuch"),
    ],
)
def test_a_usage_error_does_not_wait_for_torch(shell, arguments):
    done = shell(*arguments, options=("-X", "importtime"))
    assert done.status == 2 and "torch" not in imported(done.err)


def test_comparing_two_benchmarks_imports_no_torch(shell):
    results = str(Path(__file__).parents[2] / "benchmarks/results/cpu/bench.json")
    done = shell("bench", "compare", results, results, options=("-X", "importtime"))
    assert done.status == 0 and "torch" not in imported(done.err)


def piped(*arguments: str, into: str) -> tuple[int, str]:
    """Return the status of a command whose output goes `into` something, and what is on stderr."""
    script = f"{sys.executable} -m attnplug {' '.join(arguments)} {into}; echo ${{PIPESTATUS[0]}} >&2"
    done = subprocess.run(["bash", "-c", script], check=False, capture_output=True, text=True, timeout=600)
    *said, status = done.stderr.splitlines()
    return int(status), "\n".join(said)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("arguments", [("list",), ("--help",), ("-V",), ("list", "--json")])
def test_a_full_or_closed_stdout_is_one_line_and_status_2(arguments):
    assert piped(*arguments, into=">/dev/full") == (
        2,
        "attnplug: error: stdout cannot be written: No space left on device",
    )
    assert piped(*arguments, into=">&-") == (2, "attnplug: error: stdout is closed")


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "m?glich.json"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "möglich.json"),  # whose bytes are no text
    ],
    ids=["ascii", "locale C"],
)
def test_a_stdout_that_lacks_signs_of_a_report_gets_plain_ones(shell, tmp_path, environment, name):
    choices = attnplug.tune(attnplug.bench.Case(heads=1, queries=4, head_size=8), ["torch"], seconds=0.001)
    file = choices.save(tmp_path / "möglich.json")
    done = shell("list", "--choices", str(file), options=(), **environment)
    assert done.status == 0 and not done.err, done.err
    assert "B*H <=1, S <=4" in done.out and name in done.out


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs a shell with pipes")
@pytest.mark.parametrize(
    ("arguments", "status"),
    [(("list", "--verbose"), 0), (("--help",), 0), (("list", "--status", "broken", "--json"), 1)],
)
def test_a_reader_that_leaves_changes_neither_status_nor_stderr(arguments, status):
    assert piped(*arguments, into="| true") == (status, "")


def test_an_interrupt_ends_with_the_status_of_one(cli, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(attnplug, "list_impls", interrupted)
    done = cli("list")
    assert (done.status, done.out, done.err) == (130, "", "")


def test_a_shell_completes_commands_options_and_names(shell, tmp_path):
    pytest.importorskip("argcomplete")

    def completed(line: str) -> set[str]:
        script = f"exec 8>{tmp_path / 'answer'}; {sys.executable} -m attnplug"
        given = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
        subprocess.run(["bash", "-c", script], check=True, env=os.environ | given, timeout=600)
        return set((tmp_path / "answer").read_text().split())

    assert "explain" in completed("attnplug e")
    assert "--softcap" in completed("attnplug explain --so")
    assert "aten_flash" in completed("attnplug show aten_")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [("ATTNPLUG_STRIC", "1", "did you mean 'ATTNPLUG_STRICT'?"), ("ATTNPLUG_LOAD", "nosuch", "'nosuch'")],
)
def test_a_meaningless_variable_is_a_usage_error(shell, variable, value, said):
    done = shell("list", **{variable: value})
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(f"attnplug: error: {variable}: ") and said in done.err


def test_a_plugin_warning_is_one_line_on_stderr_and_data_stay_clean(shell):
    done = shell("list", "--json", ATTNPLUG_DISABLE="nosuch")
    assert done.status == 0 and done.out.startswith("{")
    assert done.err == "attnplug: warning: ATTNPLUG_DISABLE: no installed plugin is named 'nosuch'\n"


def test_what_is_built_in_is_no_plugin(shell):
    said = "no installed plugin is named 'torch'; that implementation is built in, and always there."
    done = shell("list", ATTNPLUG_DISABLE="torch")
    assert (done.status, done.err) == (0, f"attnplug: warning: ATTNPLUG_DISABLE: {said}\n")
    done = shell("list", ATTNPLUG_LOAD="torch")
    assert done.status == 2 and done.err.startswith(f"attnplug: error: ATTNPLUG_LOAD: {said} installed: ")


def test_main_leaves_the_handling_of_warnings_as_it_was(cli):
    before = warnings.showwarning
    cli("list")
    assert warnings.showwarning is before


def test_a_report_is_written_where_stdout_became_a_pipe_that_was_a_file(tmp_path: Path) -> None:
    program = """if True:
        import os, sys
        from attnplug.cli import main
        reading, writing = os.pipe()
        os.dup2(writing, 1)
        status = main(["list"])
        print(status, os.read(reading, 10_000).decode(), file=sys.stderr)
    """
    with open(tmp_path / "stdout", "w") as file:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=file, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert done.stderr.startswith("0 ") and "aten_math" in done.stderr


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS), ("bench", "compare")], ids=" ".join)
def test_the_description_of_a_command_is_as_wide_as_the_terminal(command, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    paragraphs = cli(*command, "--help").out.split("options:")[0].split("examples:")[0].split("\n\n")
    lines = [line for paragraph in paragraphs if not paragraph.startswith("usage") for line in paragraph.splitlines()]
    assert lines and max(map(len, lines)) <= 60
