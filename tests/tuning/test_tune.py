"""`attnplug.tune`: what is measured, and what is chosen of it."""

from __future__ import annotations

import pytest
import torch

import attnplug
from attnplug import Capabilities, ChoicesWarning, UnknownImplementationError, bench
from attnplug.bench import BenchError, Case, Cases
from attnplug.tuning import choices_from
from bench_kernels import zeros
from measured import records

CASE = Case(heads=2, queries=8, head_size=8)
COMPILES = "flex"  # for each kind of call, which takes longer than all the rest
QUICK = {"seconds": 1e-6}


def others_than(name: str) -> list[str]:
    return [record.name for record in attnplug.list_impls() if record.status == "available" and record.name != name]


def chosen(choices: attnplug.Choices) -> list[tuple[str, str]]:
    return [(choice.default, choice.impl) for choice in choices]


def test_the_fastest_that_is_right_is_chosen(ticking, register, monkeypatch):
    known = bench.Ceiling("cpu", "float32", 1e11, 1e10)
    monkeypatch.setattr("attnplug.bench._run.measure_ceiling", lambda *_: known)
    register("slow", ticking.taking(3.0))
    register("fast", ticking.taking(1.0))
    register("wrong", ticking.taking(0.1, compute=zeros))
    # torch takes no time of the test's own, so it cannot take part: these are compared among themselves.
    found = bench.run(CASE, ["slow", "fast", "wrong"], baseline="slow", **QUICK)
    (choice,) = choices_from(found)
    assert choice.impl == "fast" and choice.seconds == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("seconds", "spread", "impl"),
    [
        ({"torch": 1.0, "aten_flash": 0.9}, 0.05, "aten_flash"),
        ({"torch": 1.0, "aten_flash": 0.9}, 0.2, "torch"),  # the ranges meet
        ({"torch": 1.0, "aten_flash": 1.0}, 0.0, "torch"),
        ({"aten_flash": 1.0, "torch": 1.01}, 0.1, "torch"),  # whatever the order of the records
        ({"torch": 9.0, "aten_math": 1.0, "aten_flash": 1.05}, 0.1, "aten_flash"),  # the earlier of two that are level
        ({"torch": 9.0, "aten_math": 1.0, "aten_flash": 1.5}, 0.1, "aten_math"),
    ],
)
def test_within_the_noise_the_earlier_in_the_default_order_stays(seconds, spread, impl):
    assert chosen(choices_from(records(CASE, seconds, spread))) == [("torch", impl)]


def test_what_is_wrong_is_never_chosen_and_said():
    choices = choices_from(records(CASE, {"torch": 2.0, "aten_flash": 1.0}, wrong=("aten_flash",)))
    assert chosen(choices) == [("torch", "torch")]
    assert any(note.startswith("WRONG, so not chosen: aten_flash for B1 H2 S8") for note in choices.notes)
    nothing = choices_from(records(CASE, {"torch": 2.0}, wrong=("torch",)))
    assert len(nothing) == 0 and "Nothing was right for B1 H2 S8 D8 float32" in str(nothing)


def test_forward_and_backward_count_together_where_gradients_are_needed():
    case = CASE.but(backward=True)
    one, other = records(case, {"torch": 2.0, "aten_math": 1.5})
    slow_backward = bench.Timing(9.0, 9.0, 9.0, 9)
    choices = choices_from([one, bench.Record(**{**vars(other), "backward": slow_backward})])
    assert chosen(choices) == [("torch", "torch")]
    (choice,) = choices
    assert choice.kind.gradients and choice.default_seconds == 4.0
    cells = str(choices).splitlines()[2].split()
    assert cells[2] == "gradients," and cells[-3:] == ["torch", "torch", "-"]


def test_the_gain_is_over_what_runs_without_choices():
    choices = choices_from(records(CASE, {"torch": 3.0, "aten_math": 2.0}))
    (choice,) = choices
    assert choice.gain == pytest.approx(1.5)
    table = str(choices).splitlines()
    assert "None" not in table[0]  # of what is not there
    assert table[1].split() == ["kind", "of", "call", "was", "is", "now", "gain"]
    assert table[2].split() == ["float32", "D8,", "B·H", "≤2,", "S", "≤8", "torch", "aten_math", "1.50"]


def test_a_kind_of_call_says_what_is_in_its_sizes_once():
    (choice,) = choices_from(records(CASE.but(kv_heads=1, value_head_size=16, causal=True), {"torch": 1.0}))
    assert {"GQA", "VALUE_HEAD_SIZE"} < {*choice.kind.features}
    assert str(choice.kind).startswith("float32 D8/16 groups-of-2 causal, ")


def test_one_case_of_each_kind_is_measured_the_one_that_is_called_most():
    steps = [Case(heads=2, queries=1, keys=length, head_size=8) for length in range(9, 20)]
    measured = []
    counts = Cases(steps)
    counts[steps[2]] += 5
    choices = attnplug.tune(
        counts, ["torch"], progress=lambda step, done, total: measured.append(step.partition(":")[0]), **QUICK
    )
    assert [choice.kind.keys for choice in choices] == [16, 32]
    assert list(dict.fromkeys(measured)) == ["B1 H2 S1x11 D8 float32", "B1 H2 S1x19 D8 float32"]


def test_progress_counts_to_its_end():
    seen = []
    attnplug.tune([CASE], ["aten_math"], progress=lambda *step: seen.append(step), **QUICK)
    assert [done for _, done, _ in seen] == [0, 1, 2] and {total for *_, total in seen} == {3}


def test_torch_is_always_measured_and_others_only_if_they_are_named(register):
    def never(params):
        raise AssertionError("a kernel was run")

    register("mine", never)
    assert chosen(attnplug.tune([CASE], ["aten_math"], **QUICK))[0][0] == "torch"
    with pytest.raises(UnknownImplementationError, match="impls: unknown implementation 'torhc'"):
        attnplug.tune([CASE], ["torhc"])


def test_a_kernel_that_quantizes_is_a_candidate_only_if_it_is_named(register):
    def steps(impls):
        """Return how many there are to be, of which the first is interrupted."""
        found = []

        def interrupt(step, done, total):
            found.append(total)
            raise KeyboardInterrupt

        attnplug.tune([CASE], impls, progress=interrupt, **QUICK)
        return found[0]

    before = steps(None)
    rounded = register("rounded", zeros, capabilities=Capabilities(quantized=True, devices=("cpu",)))
    assert steps(None) == before
    assert steps([rounded]) == steps(["aten_math"])
    register("exact", zeros)
    assert steps(None) == before + 1


def test_an_interruption_keeps_the_kinds_that_are_complete():
    cases = [CASE, CASE.but(queries=64), CASE.but(queries=256)]

    def interrupt(step, done, total):
        if step.startswith(cases[1].name):
            raise KeyboardInterrupt

    choices = attnplug.tune(cases, ["torch"], progress=interrupt, **QUICK)
    assert [choice.kind.queries for choice in choices] == [8]
    assert choices.notes[-1] == f"Interrupted: not measured are {cases[1].name}, {cases[2].name}."


def test_a_busy_machine_is_said_to_be_busy(share):
    share["share"] = 0.4
    with pytest.warns(
        ChoicesWarning, match=r"this machine is busy: this program got 40% of the time of the \d+ threads?"
    ):
        attnplug.tune([CASE], ["torch"], **QUICK)


def test_what_disturbed_the_measurement_is_said(monkeypatch):
    found = bench.Noise(others=1.5, cores=2)
    monkeypatch.setattr("attnplug.bench._noise.Watch.found", lambda watch: found)
    choices = attnplug.tune([CASE], ["torch"], **QUICK)
    assert choices.notes == (
        "While it was measured, other programs kept 1.5 of 2 cores busy. Small differences mean little: repeat this "
        "on a quiet machine.",
    )


def test_what_all_calls_of_a_program_take_is_summed_up():
    found = records(CASE, {"torch": 2.0, "aten_math": 1.0})
    choices = choices_from(found, {CASE: 10})
    assert choices.notes == ("All these calls together: 2e+04 ms by default, 1e+04 ms so chosen.",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "cases: there are none; capture"),
        (("nope",), "set: there is no 'nope'"),
        (([3],), "cases: expected cases or the name of a set, got 3"),
        (([CASE.but(device="cuda:99")],), "'cuda:99' is not on this machine"),
    ],
)
def test_what_cannot_be_measured_is_an_error(arguments, message):
    with pytest.raises(BenchError, match=message):
        attnplug.tune(*arguments, **QUICK)
    with pytest.raises(BenchError, match="seconds: expected a time above 0, got 0"):
        attnplug.tune([CASE], seconds=0)


def test_what_was_measured_holds_here():
    choices = attnplug.tune([CASE.but(dtype="bfloat16", causal=True)], ["torch", "aten_math"], **QUICK)
    attnplug.use_choices(choices)
    query = torch.randn(1, 2, 8, 8, dtype=torch.bfloat16)
    explained = attnplug.explain(query, query, query, is_causal=True)
    attnplug.restore_choices()
    (choice,) = choices
    assert explained.chosen == choice.impl and explained.measured.startswith(f"measured choice: {choice.impl}")


@pytest.mark.gpu
def test_choices_of_a_gpu_are_of_its_name_and_capability():
    choices = attnplug.tune([CASE.but(device="cuda", dtype="bfloat16")], others_than(COMPILES), seconds=0.01)
    (table,) = choices.tables
    assert table.device == torch.cuda.get_device_name() and table.versions["cuda"] == torch.version.cuda
    attnplug.use_choices(choices)
    query = torch.randn(1, 2, 8, 8, dtype=torch.bfloat16, device="cuda")
    explained = attnplug.explain(query, query, query).measured
    attnplug.restore_choices()
    assert explained.startswith("measured choice: ")


@pytest.mark.gpu
def test_on_a_gpu_every_form_of_call_is_captured_measured_and_runs_what_was_chosen():
    device = {"device": "cuda", "dtype": torch.bfloat16}
    query, packed = (torch.randn(*shape, **device, requires_grad=True) for shape in ((2, 4, 40, 64), (50, 4, 64)))
    starts = torch.tensor([0, 20, 50], dtype=torch.int32, device="cuda")
    bias = torch.randn(4, 40, 40, **device, requires_grad=True)
    used = torch.tensor([7, 40], dtype=torch.int32, device="cuda")

    def program() -> None:
        attnplug.scaled_dot_product_attention(query, query, query, is_causal=True)
        attnplug.scaled_dot_product_attention(query, query, query, bias)
        attnplug.scaled_dot_product_attention(query, query, query, seqused_k=used)
        attnplug.varlen_attn(packed, packed, packed, starts, starts, 30, 30, is_causal=True)

    with attnplug.capture() as cases:
        program()
    assert not cases.left_out and [case.lengths_q for case in cases][-1] == (20, 30)
    choices = attnplug.tune(cases, others_than(COMPILES), seconds=0.01)
    assert len(choices) == 4, choices
    attnplug.use_choices(choices)
    try:
        with attnplug.record() as calls:
            program()
    finally:
        attnplug.restore_choices()
    assert [call.impl for call in calls] == [choice.impl for choice in choices]


@pytest.mark.gpu
def test_lengths_on_a_gpu_that_captures_a_graph_are_not_read():
    packed = torch.randn(8, 2, 64, device="cuda", dtype=torch.bfloat16)
    starts = torch.tensor([0, 3, 8], dtype=torch.int32, device="cuda")
    attnplug.varlen_attn(packed, packed, packed, starts, starts, 5, 5)  # decided, and compiled where that is needed
    with attnplug.capture() as cases, torch.cuda.graph(torch.cuda.CUDAGraph()):
        attnplug.varlen_attn(packed, packed, packed, starts, starts, 5, 5)
    assert not cases and list(cases.left_out) == ["whose lengths are on a GPU that captures a graph"]
