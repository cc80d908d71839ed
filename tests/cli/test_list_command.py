"""`attnplug list` says what the registry knows, once as text and once as JSON."""

from __future__ import annotations

import json
import re
import sys

import pytest

import attnplug
from attnplug import Capabilities, Feature, SDPBackend


@pytest.fixture
def unavailable(register):
    register(
        name="rocket",
        backend=SDPBackend.MATH,
        requires=("absent_module",),
        capabilities=Capabilities(devices=("cpu",), dtypes=("float32",), head_sizes=(64, 32), features={Feature.CAUSAL})
        | Capabilities(
            devices=("cuda",),
            dtypes=("bfloat16",),
            compute_capability=(9, 0),
            architectures=("gfx942",),
            head_sizes=range(8, 129, 8),
            features={Feature.WINDOW},
        ),
    )


@pytest.fixture
def broken(register):
    register(name="wreck", kernel="absent_module.kernel")
    with pytest.warns(attnplug.PluginWarning):
        attnplug.can_use_impl("wreck", _params())


def _params():
    import torch

    return attnplug.SDPAParams(*torch.empty(3, 1, 1, 4, 8))


def listed(cli, *options: str) -> list[dict]:
    return cli("list", "--json", *options).data["implementations"]


def rows(text: str) -> dict[str, str]:
    return {line.split()[0]: line for line in text.splitlines()[1:]}


def test_rows_stand_in_the_order_of_preference(cli):
    names = [record.name for record in attnplug.list_impls()]
    assert list(rows(cli("list").out)) == names
    assert [record["name"] for record in listed(cli)] == names


def test_a_row_holds_what_the_record_holds(cli, unavailable):
    row = rows(cli("list").out)["rocket"]
    assert row.split() == [
        *("rocket", "MATH", "-900", "this", "program", "-", "unavailable", "cpu,", "cuda", "bf16", "f32"),
        *("2", "of", str(len(Feature)), "needs", "absent_module,", "not", "installed"),
    ]


def test_json_holds_each_alternative_with_null_for_no_limit(cli, unavailable):
    record = next(record for record in listed(cli) if record["name"] == "rocket")
    assert record["family"] == "MATH"
    assert record["priority"] == -900
    assert (record["distribution"], record["version"]) == ("this program", "")
    assert (record["status"], record["reason"]) == ("unavailable", "needs absent_module, not installed")
    assert record["capabilities"] == [
        {
            "devices": ["cpu"],
            "dtypes": ["float32"],
            "compute_capability": None,
            "architectures": None,
            "head_sizes": [32, 64],
            "features": ["CAUSAL"],
        },
        {
            "devices": ["cuda"],
            "dtypes": ["bfloat16"],
            "compute_capability": "9.0",
            "architectures": ["gfx942"],
            "head_sizes": {"start": 8, "stop": 129, "step": 8},
            "features": ["WINDOW"],
        },
    ]


def test_verbose_says_all_that_json_says(cli, unavailable):
    text = cli("list", "--verbose").out
    block = text[text.index("rocket\n") :].split("\n\n")[0]
    facts = [line.strip() for line in block.splitlines()]
    assert facts == [
        "rocket",
        "family        MATH",
        "priority      -900",
        "distribution  this program",
        "status        unavailable: needs absent_module, not installed",
        "supports on   cpu",
        "dtypes      float32",
        "head sizes  32, 64",
        "features    CAUSAL",
        "supports on   cuda, compute capability 9.0 or later, AMD architectures gfx942",
        "dtypes      bfloat16",
        "head sizes  8 to 128 in steps of 8",
        "features    WINDOW",
    ]


def test_no_limit_reads_as_any(cli, register):
    register(name="anything")
    assert " any " in rows(cli("list").out)["anything"]
    text = cli("list", "--verbose").out
    assert "any device" in text[text.index("anything\n") :]


def test_what_is_broken_claims_no_capabilities(cli, broken):
    row = rows(cli("list").out)["wreck"]
    assert "broken" in row and "ModuleNotFoundError" in row and "any" not in row
    assert listed(cli, "--status", "broken")[0]["capabilities"] == []


def test_status_lists_only_those(cli, unavailable):
    for status in ("available", "unavailable"):
        names = {record.name for record in attnplug.list_impls() if record.status == status}
        assert set(rows(cli("list", "--status", status).out)) == names
        assert {record["name"] for record in listed(cli, "--status", status)} == names


def test_status_1_where_none_is_of_the_status(cli):
    present = {record.status for record in attnplug.list_impls()}
    absent = next(status for status in ("broken", "unavailable", "available") if status not in present)
    done = cli("list", "--status", absent)
    assert (done.status, done.out) == (1, "") and absent in done.err
    assert listed(cli, "--status", absent) == []


@pytest.fixture
def terminal(monkeypatch, cli):
    """Run a command on a terminal of so many columns."""
    pytest.importorskip("rich")

    def run(columns: int, *arguments: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(type(sys.stdout), "isatty", lambda stream: True)
            patch.setenv("COLUMNS", str(columns))
            patch.setenv("TERM", "xterm")
            return cli(*arguments).out

    return run


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def test_a_terminal_wraps_reasons_to_its_width(broken, terminal):
    lines = plain(terminal(80, "list")).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) > len(attnplug.list_impls()) + 1


@pytest.mark.parametrize("command", [("doctor",), ("show", "math_ref"), ("list", "--verbose")], ids=" ".join)
def test_text_fits_into_a_narrow_terminal(command, unavailable, terminal):
    assert max(map(len, plain(terminal(60, *command)).splitlines())) <= 60


def test_a_narrow_terminal_names_the_columns_that_it_leaves_out(unavailable, terminal):
    assert "Not shown for want of width: priority" in plain(terminal(80, "list"))
    wide = plain(terminal(300, "list"))
    assert "Not shown" not in wide and "priority" in wide


def test_a_wide_terminal_shows_the_words_of_a_pipe(cli, unavailable, terminal):
    assert plain(terminal(300, "list")).split() == cli("list").out.split()


def test_colours_tell_the_status_on_a_terminal_and_never_in_a_pipe(cli, unavailable, terminal):
    shown = terminal(300, "list")
    green, yellow = "\x1b[32mavailable", "\x1b[33munavailable"
    assert green in shown and yellow in shown
    assert "\x1b" not in cli("list").out


def test_a_cell_is_not_read_as_markup(register, terminal):
    register(name="odd", requires=("[red]", "[/]"))
    assert "needs [/], [red], not installed" in plain(terminal(300, "list"))


@pytest.mark.parametrize("columns", [300, 120, 80, 60, 40, 20])
def test_no_width_cuts_a_word_with_rich_or_without(cli, unavailable, terminal, monkeypatch, columns):
    whole = set(cli("list").out.split())
    with_rich = plain(terminal(columns, "list"))
    monkeypatch.setitem(sys.modules, "rich", None)
    without = terminal(columns, "list")
    assert without == with_rich
    words = set(without.partition("Not shown")[0].split())
    assert {word for word in words if word not in whole and not word.endswith(":")} == set()
    assert all(len(line) <= columns or len(line.split()) == 1 for line in without.splitlines())


def test_without_rich_there_is_no_colour(terminal, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert "\x1b" not in terminal(80, "list")


def test_entry_points_are_named_as_the_environment_takes_them(cli):
    (record,) = (record for record in listed(cli) if record["name"] == "math_ref")
    assert (record["entry_point"], record["module"]) == ("math_ref", "attnplug_math_ref")
    assert rows(cli("list").out)["math_ref"].split()[5] == "math_ref"


def test_a_disabled_plugin_is_listed_with_what_lets_it_load(shell):
    done = shell("list", "--json", "--status", "unavailable", ATTNPLUG_DISABLE="math_ref,adapters")
    records = {record["name"]: record for record in json.loads(done.out)["implementations"]}
    assert records["math_ref"]["reason"] == "disabled by ATTNPLUG_DISABLE"
    assert records["math_ref"]["remedy"] == "export ATTNPLUG_DISABLE=adapters"
    assert records["adapters"]["entry_point"] == "adapters"
