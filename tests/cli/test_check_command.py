"""`attnplug check`: exit status, JSON, and errors."""

from __future__ import annotations

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
        (("torch", "--device", "meta:x"), "device"),
        (("torch", "--device", "meta"), "'meta' cannot be used here"),
        (("torch", "--device", "cpu", "--only", "check_vales"), "did you mean 'check_values'"),
    ],
)
def test_what_cannot_be_asked_is_status_2(cli, arguments, said):
    done = cli("check", *arguments)
    assert (done.status, done.out) == (2, "")
    assert said in done.err
