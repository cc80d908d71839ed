"""What holds for every command: exit status, streams, and what a process imports."""

from __future__ import annotations

import warnings

import pytest

import attnplug

KERNELS = ("torch_sdpa", "aten_flash", "aten_math")
COMMANDS = {"list": (), "explain": ("--query", "1,8,128,64"), "info": ()}


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
    for option in ("--help", "--version"):
        done = shell(option, options=("-X", "importtime"))
        assert done.status == 0 and "torch" not in imported(done.err)
    assert done.out == f"attnplug {attnplug.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(cli, name):
    assert "--json" in cli(name, "--help").out
    assert cli(name, *COMMANDS[name], "--json").data


@pytest.mark.parametrize("name", COMMANDS)
def test_data_goes_to_stdout_and_nothing_else_does(cli, name):
    done = cli(name, *COMMANDS[name])
    assert done.status == 0 and done.out.endswith("\n") and not done.err


@pytest.mark.parametrize("arguments", [(), ("lst",), ("list", "--colour"), ("list", "--stat", "broken"), ("explain",)])
def test_a_usage_error_is_status_2_and_says_so_on_stderr(cli, arguments):
    done = cli(*arguments)
    assert (done.status, done.out) == (2, "")
    assert "error: " in done.err and "Traceback" not in done.err


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
    assert done.status == 0 and done.out.startswith("[")
    assert done.err == "attnplug: warning: ATTNPLUG_DISABLE: no installed plugin is named 'nosuch'\n"


def test_main_leaves_the_handling_of_warnings_as_it_was(cli):
    before = warnings.showwarning
    cli("list")
    assert warnings.showwarning is before
