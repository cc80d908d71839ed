"""`attnplug check`: exit status, JSON, and errors."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch


def test_an_implementation_that_keeps_its_promises_is_status_0(cli):
    done = cli("check", "torch", "--device", "cpu", "--dtype", "float32")
    assert done.status == 0
    assert done.out.startswith("torch on cpu, quick: PASSED; ")
    assert ["check", "dtype", "result", "why"] in [line.split() for line in done.out.splitlines()]


def test_one_that_does_not_is_status_1_and_the_failure_is_shown(cli, register):
    def forward(params):
        return (params.query @ params.key.mT).softmax(-1) @ params.value, None

    register(name="unscaled", kernel=forward)
    done = cli("check", "unscaled", "--device", "cpu", "--dtype", "float32")
    assert done.status == 1
    assert done.out.startswith("unscaled on cpu, quick: FAILED, first check_values[float32]; ")
    assert "hint: this is what comes out with no scale" in done.out
    assert ".check('unscaled')" in done.out


def test_failed_shows_failures_only_the_simplest_first(cli, register):
    def forward(params):
        return (params.query @ params.key.mT).softmax(-1) @ params.value, None

    register(name="unscaled", kernel=forward)
    lines = cli("check", "unscaled", "--device", "cpu", "--dtype", "f32", "--failed").out.splitlines()
    failed = [line.partition(":")[0] for line in lines[1:] if line.startswith("check_")]
    assert failed[0] == "check_values[float32]" and len(failed) > 1
    assert not any(" passed " in line or " not applicable " in line for line in lines[1:])


def test_failed_of_one_that_passes_is_one_line(cli):
    done = cli("check", "torch", "--device", "cpu", "--dtype", "fp32", "--only", "check_scale", "--failed")
    assert done.status == 0 and len(done.out.splitlines()) == 1


@pytest.mark.parametrize(("terminal", "is_shown"), [("xterm", True), ("dumb", False), (None, False)])
def test_a_terminal_that_can_shows_what_was_checked_last(terminal, is_shown, cli, monkeypatch):
    if terminal is not None:
        monkeypatch.setattr(type(sys.stderr), "isatty", lambda stream: stream is sys.stderr)
        monkeypatch.setenv("TERM", terminal)
    done = cli("check", "torch", "--device", "cpu", "--dtype", "fp32", "--only", "check_scale", "--failed")
    shown = "\r\x1b[Ktorch check_scale[float32]: passed\r\x1b[K" if is_shown else ""
    assert done.err == shown and "\x1b" not in done.out


def test_jacobians_that_differ_are_not_printed(cli, register):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(context, out):
            return out.clone()

        @staticmethod
        def backward(context, gradient):
            return 2 * gradient

    def forward(params):
        out = (params.scale * params.query @ params.key.mT).softmax(-1) @ params.value
        return Doubled.apply(out), None

    register(name="doubled", kernel=SimpleNamespace(forward=forward, composite=True))
    done = cli("check", "doubled", "--device", "cpu", "--dtype", "float64", "--only", "check_gradcheck", "--failed")
    assert done.status == 1 and "max per-element difference" in done.out
    assert "tensor([" not in done.out


def test_json_holds_every_result(cli):
    done = cli("check", "aten_math", "--device", "cpu", "--dtype", "float32", "--json")
    assert (done.status, done.err) == (0, "")
    (report,) = done.data["reports"]
    assert report["name"] == "aten_math"
    assert {"check", "dtype", "status", "reason"} <= report["results"][0].keys()


def test_only_names_the_checks_to_make(cli):
    done = cli("check", "torch", "--device", "cpu", "--only", "check_scale", "--only", "check_values", "--json")
    assert done.status == 0
    (report,) = done.data["reports"]
    assert {result["check"] for result in report["results"]} == {"check_scale", "check_values"}
    assert report["seconds"] > 0


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
        (("torch", "--dtype", "int8"), "argument --dtype: expected float16"),
        (("torch", "--device", "cpu", "--workers", "-2"), "--workers: expected a number from 0 on"),
        (("torch", "--device", "cpu", "--timeout", "0"), "--timeout: expected seconds above 0"),
        (("torch", "--device", "meta:x"), "device"),
        (("torch", "--device", "meta"), "'meta' cannot be used here"),
        (("torch", "--device", "cpu", "--only", "check_vales"), "did you mean 'check_values'"),
        (("torch", "--device", "cpu", "--only", "nope"), "attnplug check torch lists them"),
    ],
)
def test_what_cannot_be_asked_is_status_2(cli, arguments, said):
    done = cli("check", *arguments)
    assert (done.status, done.out) == (2, "")
    assert said in done.err


def test_several_implementations_are_checked_in_workers_and_results_written_as_they_come(cli, tmp_path):
    written = tmp_path / "found.jsonl"
    checks = ("--only", "check_scale", "--only", "check_values")
    asked = ("--device", "cpu", "--dtype", "float32", *checks, "--workers", "1", "--output", str(written))
    done = cli("check", "torch", "math_ref", *asked, "--json")
    assert done.status == 0
    assert [report["name"] for report in done.data["reports"]] == ["torch", "math_ref"]
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert sorted((line["impl"], line["check"], line["status"]) for line in lines) == [
        (name, check, "passed") for name in ("math_ref", "torch") for check in ("check_scale", "check_values")
    ]


def test_results_can_be_read_while_checks_are_still_made(cli, register, tmp_path):
    written, read = tmp_path / "found.jsonl", [""]

    def forward(params):
        read.append(written.read_text())
        return torch.softmax(params.scale * params.query @ params.key.mT, -1) @ params.value, None

    register(name="reader", kernel=forward)
    asked = ("--device", "cpu", "--dtype", "float32", "--only", "check_scale", "--only", "check_values")
    assert cli("check", "reader", *asked, "--output", str(written)).status == 0
    assert len(read[-1].splitlines()) == 1 and len(written.read_text().splitlines()) == 2


def test_output_into_a_folder_that_does_not_exist_is_an_error_before_work_begins(cli, tmp_path):
    done = cli("check", "torch", "--output", str(tmp_path / "nowhere" / "found.jsonl"))
    assert (done.status, done.out) == (2, "")
    assert "nowhere' is not a folder" in done.err and list(tmp_path.iterdir()) == []


def test_one_of_several_that_is_not_available_is_said_and_the_others_are_checked(cli, register, tmp_path, monkeypatch):
    kernel = "def forward(params): ...\ndef unavailable(): return 'needs another compiler'\n"
    (tmp_path / "kernel_without_compiler.py").write_text(kernel)
    monkeypatch.syspath_prepend(tmp_path)
    register(name="lacking", requires=("a_module_that_is_nowhere",))
    register(name="once_loaded", kernel="kernel_without_compiler")
    done = cli("check", "lacking", "once_loaded", "torch", "--device", "cpu", "--only", "check_scale")
    assert done.status == 1
    assert "implementation 'once_loaded' is unavailable: needs another compiler" in done.err
    assert "implementation 'lacking' is unavailable" in done.err
    assert "torch on cpu, quick: " in done.out
