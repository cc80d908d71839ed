"""`attnplug check`: exit status, JSON, and errors."""

from __future__ import annotations

import json

import pytest


def test_an_implementation_that_keeps_its_promises_is_status_0(cli):
    done = cli("check", "torch", "--device", "cpu", "--dtype", "float32")
    assert done.status == 0
    assert done.out.splitlines()[0].split() == ["check", "dtype", "result", "why"]
    assert done.out.splitlines()[-1].startswith("torch on cpu, quick: ")


def test_one_that_does_not_is_status_1_and_the_failure_is_shown(cli, register):
    def forward(params):
        return (params.query @ params.key.mT).softmax(-1) @ params.value, None

    register(name="unscaled", kernel=forward)
    done = cli("check", "unscaled", "--device", "cpu", "--dtype", "float32")
    assert done.status == 1
    assert "hint: this is what comes out with no scale" in done.out
    assert ".check('unscaled')" in done.out


def test_json_holds_every_result(cli):
    done = cli("check", "aten_math", "--device", "cpu", "--dtype", "float32", "--json")
    assert (done.status, done.err) == (0, "")
    assert done.data["name"] == "aten_math"
    assert {"check", "dtype", "status", "reason"} <= done.data["results"][0].keys()


def test_only_names_the_checks_to_make(cli):
    done = cli("check", "torch", "--device", "cpu", "--only", "check_scale", "--only", "check_values", "--json")
    assert done.status == 0
    assert {result["check"] for result in done.data["results"]} == {"check_scale", "check_values"}
    assert done.data["seconds"] > 0


def test_one_that_is_not_available_is_status_1_with_the_reason(cli, register):
    register(name="lacking", requires=("a_module_that_is_nowhere",))
    done = cli("check", "lacking")
    assert (done.status, done.out) == (1, "")
    assert "a_module_that_is_nowhere" in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nosuch",), "unknown implementation 'nosuch'"),
        (("torch", "--device", "nowhere"), "'nowhere'"),
        (("torch", "--quick", "--full"), "not allowed with"),
        (("torch", "--dtype", "int8"), "invalid choice"),
        (("torch", "--device", "cpu", "--workers", "-2"), "workers: expected a number from 0 on"),
        (("torch", "--device", "cpu", "--timeout", "0"), "timeout: expected seconds above 0"),
        (("torch", "--device", "meta:x"), "device"),
        (("torch", "--device", "meta"), "'meta' cannot be used here"),
        (("torch", "--device", "cpu", "--only", "check_vales"), "did you mean 'check_values'"),
    ],
)
def test_what_cannot_be_asked_is_status_2(cli, arguments, said):
    done = cli("check", *arguments)
    assert (done.status, done.out) == (2, "")
    assert said in done.err


def test_several_implementations_are_checked_in_workers_and_results_written_as_they_come(cli, tmp_path):
    written = tmp_path / "results" / "found.jsonl"
    checks = ("--only", "check_scale", "--only", "check_values")
    asked = ("--device", "cpu", "--dtype", "float32", *checks, "--workers", "1", "--output", str(written))
    done = cli("check", "torch", "math_ref", *asked, "--json")
    assert done.status == 0
    assert [report["name"] for report in done.data] == ["torch", "math_ref"]
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert sorted((line["impl"], line["check"], line["status"]) for line in lines) == [
        (name, check, "passed") for name in ("math_ref", "torch") for check in ("check_scale", "check_values")
    ]


def test_one_of_several_that_is_not_available_is_said_and_the_others_are_checked(cli, register):
    register(name="lacking", requires=("a_module_that_is_nowhere",))
    done = cli("check", "lacking", "torch", "--device", "cpu", "--only", "check_scale")
    assert done.status == 1
    assert "lacking cannot be checked: it is unavailable" in done.err
    assert "torch on cpu, quick: " in done.out
