"""What `run` finds out: times, memory, who is right, who is fastest, and why the others did not run.

Which results are too large to be compared whole is a private number, lowered here so that small ones are.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import attnplug
from attnplug import Capabilities, bench
from attnplug.bench import BenchError, Case, Record, Timing
from bench_kernels import plain, zeros

TINY = Case(heads=2, queries=8, head_size=8)


TIMINGS = ("forward", "forward_cold", "backward", "backward_cold")


def only(impl: str, *cases: Case, **settings) -> list[Record]:
    """Return the records of one implementation beside the baseline."""
    report = bench.run(cases or [TINY], [impl], seconds=0.002, **settings)
    return [record for record in report if record.impl == impl]


def test_there_is_a_record_for_each_case_and_implementation_in_order(report, cases):
    assert [(record.case, record.impl) for record in report] == [
        (case, impl) for case in cases for impl in ("torch", "aten_math", "all_zeros", "on_gpus")
    ]


def test_what_ran_has_times_work_memory_and_a_share_of_the_ceiling(report):
    for record in report:
        if record.status != "ran":
            continue
        measured = TIMINGS if record.case.backward else TIMINGS[:2]
        for name in measured:
            timing = getattr(record, name)
            assert 0 < timing.p20 <= timing.median <= timing.p80 < 10
            assert timing.samples >= 3
        assert (record.backward is not None) == record.case.backward
        assert record.forward_tflops == record.case.forward_flops / record.forward.median / 1e12
        assert 0 < record.forward_share < 10
        assert record.memory > 0
    assert {(ceiling.device, ceiling.dtype) for ceiling in report.ceilings} == {("cpu", "float32")}


def test_ratios_are_to_the_baseline_of_forward_and_backward_together(report, cases):
    for case in cases:
        records = {record.impl: record for record in report.of(case) if record.status == "ran"}
        total = {
            impl: sum(getattr(record, name).median for name in ("forward", "backward") if getattr(record, name))
            for impl, record in records.items()
        }
        for impl, record in records.items():
            assert record.ratio == pytest.approx(total[impl] / total["torch"])


def test_memory_is_what_the_call_allocates_beyond_its_inputs():
    case = Case(batch=2, heads=2, queries=256, head_size=32)
    records = {record.impl: record for record in bench.run(case, ["aten_flash", "aten_math"], seconds=0.002)}
    out, scores = 2 * 2 * 256 * 32 * 4, 2 * 2 * 256 * 256 * 4
    assert scores + out <= records["aten_math"].memory < 5 * scores
    assert out <= records["aten_flash"].memory < scores


def test_memory_counts_each_allocation_that_is_held(register):
    def greedy(params):
        held = torch.empty(3 * 2**20, dtype=torch.uint8)
        torch.empty(2**20, dtype=torch.uint8)
        out, lse = plain(params)
        return out + held[0] * 0, lse

    (record,) = only(register("greedy", greedy))
    # 3 MiB are held until the end, 1 MiB for a moment, and the formula itself needs a few KiB.
    assert 4 * 2**20 <= record.memory < 4 * 2**20 + 2**16


@pytest.mark.parametrize("case", [TINY, TINY.but(backward=True)])
def test_a_wrong_kernel_is_marked_wrong_and_is_never_the_fastest(register, case):
    (record,) = only(register("wrong", zeros), case)
    assert record.status == "ran" and record.correct is False and not record.fastest
    assert "out: largest error" in record.reason


def test_a_wrong_gradient_is_marked_wrong_with_its_name(register):
    def backward(params, grad_out, grad_lse, out, lse):
        return (torch.zeros_like(params.query), torch.zeros_like(params.key), torch.zeros_like(params.value))

    (record,) = only(register("no_gradient", plain, backward=backward), TINY.but(backward=True))
    assert record.correct is False and "gradient of query: largest error" in record.reason


def test_a_known_mistake_is_named(register):
    def unscaled(params):
        return plain(replace(params, scale=1.0))

    (record,) = only(register("unscaled", unscaled))
    assert "no scale" in record.reason


LARGE = Case(heads=2, kv_heads=1, queries=1100, keys=1100, head_size=8)
"""A reference of all its scores would take too much memory: results are held against samples of it."""


@pytest.mark.parametrize(
    ("causal", "lengths"), [(True, (1100, 1100)), (True, (900, 1300)), (True, (1300, 900)), (False, (900, 1300))]
)
def test_a_right_kernel_agrees_with_the_samples_of_a_large_case(causal, lengths):
    queries, keys = lengths
    large = LARGE.but(queries=queries, keys=keys, causal=causal, window=(900, -1), backward=True)
    cases = [
        large.but(causal_variant=variant, mask=mask)
        for variant, mask in (("UPPER_LEFT", "boolean"), ("LOWER_RIGHT", ""))
    ]
    records = bench.run(iter(cases), iter(["math_ref"]), baseline="math_ref", caches=iter(["warm"]), seconds=1e-9)
    assert [(record.correct, record.reason) for record in records] == [(True, "")] * 2


@pytest.mark.parametrize("place", [(0, 0, -1), (-1, -1, -1)])
def test_samples_of_a_large_case_find_a_wrong_last_row_of_the_first_and_the_last_head(register, place):
    def wrong_row(params):
        out, lse = plain(params)
        spoilt = torch.zeros_like(out)
        spoilt[place] = 1.0
        return out + spoilt, lse

    name = register("wrong_row", wrong_row)
    (record,) = bench.run(LARGE.but(kv_heads=2, batch=2), [name], baseline=name, caches=["warm"], seconds=1e-9)
    assert record.correct is False


SAMPLED = [
    Case(heads=4, kv_heads=2, head_size=8, lengths_q=(5, 0, 8), causal=True, backward=True, lse=True),
    Case(heads=4, kv_heads=2, head_size=8, lengths_q=(5, 3), lengths_k=(9, 7), window=(3, -1), alibi=True),
    Case(heads=2, head_size=8, lengths_q=(1, 1), lengths_k=(9, 7), used=(9, 2), page_size=4, backward=True),
    Case(
        heads=2, kv_heads=1, head_size=8, lengths_q=(4, 6), sinks=True, backward=True, sinks_gradient=True, dropout=0.5
    ),
    Case(batch=2, heads=2, queries=7, keys=7, head_size=8, causal=True, used=(3, 7)),
    Case(batch=2, heads=2, queries=5, keys=7, head_size=8, causal=True, causal_variant="LOWER_RIGHT", used=(3, 7)),
    Case(
        batch=2, heads=2, queries=5, head_size=8, mask="additive", mask_dims="1hqk", backward=True, mask_gradient=True
    ),
    Case(batch=2, heads=2, queries=5, head_size=8, mask="boolean", mask_dims="b11k"),
]
"""Everything that a case may say of lengths, masks and gradients."""


@pytest.mark.parametrize("most", [2**21, 16])
def test_lengths_pages_and_gradients_of_masks_are_held_against_what_they_should_give(monkeypatch, most):
    monkeypatch.setitem(bench._correct.SCORES, "cpu", most)  # with few, parts of a case are
    records = bench.run(SAMPLED, ["math_ref"], baseline="math_ref", caches=["warm"], seconds=1e-9)
    assert [(record.status, record.correct, record.reason) for record in records] == [("ran", True, "")] * len(SAMPLED)


@pytest.mark.parametrize("most", [2**21, 16])
@pytest.mark.parametrize(
    "case", [SAMPLED[0], SAMPLED[2], SAMPLED[3], SAMPLED[4], SAMPLED[6]], ids=lambda case: case.name
)
def test_a_mistake_in_them_is_found(register, monkeypatch, case, most):
    monkeypatch.setitem(bench._correct.SCORES, "cpu", most)

    def off(params):
        foreign = ("attn_mask", "causal_variant") if params.is_varlen else PACKED
        given = {name: value for name, value in vars(params).items() if name not in ("dropout", *foreign)}
        function = attnplug.varlen_attn if params.is_varlen else attnplug.scaled_dot_product_attention
        found = function(**given, dropout_p=params.dropout, impl="math_ref")
        out, lse = found if params.return_lse else (found, None)
        return out * 1.001, lse

    features = frozenset(attnplug.Feature) - {attnplug.Feature.NESTED}
    name = register("off", off, capabilities=attnplug.Capabilities(features=features))
    (record,) = bench.run(case, [name], baseline=name, caches=["warm"], seconds=1e-9)
    assert record.correct is False, record


def test_a_mistake_that_only_dropout_shows_is_found(register):
    def unscaled(params):
        given = (params.query, params.key, params.value)
        out = attnplug.scaled_dot_product_attention(*given, dropout_p=params.dropout, impl="math_ref")
        return out * (1 - params.dropout), None

    name = register("unscaled", unscaled, capabilities=attnplug.Capabilities(features={attnplug.Feature.DROPOUT}))
    for case, correct in ((TINY, True), (TINY.but(dropout=0.5), False)):
        (record,) = bench.run(case, [name], baseline=name, caches=["warm"], seconds=1e-9)
        assert record.correct is correct, record


PACKED = ("cu_seq_q", "cu_seq_k", "max_q", "max_k", "block_table")


def test_who_declines_is_a_record_with_each_reason(report):
    declined = [record for record in report if record.impl == "on_gpus"]
    assert {record.status for record in declined} == {"declined"}
    assert {record.reason for record in declined} == {"runs on cuda; the call is on cpu"}


def test_who_raises_is_a_record_and_the_others_go_on(register):
    def broken(params):
        raise ValueError("tile of\n 3 bytes")

    report = bench.run([TINY, TINY.but(queries=9)], ["torch", register("broken", broken)], seconds=0.002)
    assert [record.status for record in report] == ["ran", "failed"] * 2
    assert report.records[1].reason == "ValueError: tile of 3 bytes"
    assert report.records[1].correct is None and report.records[1].forward is None


def test_who_raises_while_being_timed_is_a_record_and_the_others_go_on(register):
    left = iter(range(3))

    def tired(params):
        if next(left, None) is None:
            raise RuntimeError("no more")
        return plain(params)

    report = bench.run(TINY, ["torch", register("tired", tired)], seconds=0.002)
    assert [record.status for record in report] == ["ran", "failed"]
    assert "no more" in report.records[1].reason
    assert report.records[1].correct is None and report.records[1].memory is None


def test_who_runs_out_of_memory_is_a_record_and_the_others_go_on(register):
    def hungry(params):
        return torch.zeros(2**44, dtype=torch.uint8), None

    report = bench.run(TINY, ["torch", register("hungry", hungry)], seconds=0.002)
    assert [record.status for record in report] == ["ran", "failed"]
    assert report.records[1].reason.startswith("out of memory: ")


def test_inputs_that_do_not_fit_are_rows_and_the_other_cases_go_on():
    huge = Case(batch=2**20, heads=2**10, queries=2**10, name="huge")
    report = bench.run([huge, TINY], ["torch"], seconds=0.002)
    assert [record.status for record in report] == ["failed", "ran"]
    assert "out of memory" in report.records[0].reason


def test_memory_that_the_system_promises_but_does_not_have_is_out_of_memory(register, monkeypatch):
    read = Path.read_text

    def little(path, *arguments, **named):
        return "MemAvailable: 1048576 kB" if path == Path("/proc/meminfo") else read(path, *arguments, **named)

    monkeypatch.setattr(Path, "read_text", little)

    def hungry(params):
        return torch.empty(2**33, dtype=torch.uint8), None

    (record,) = only(register("hungry", hungry))
    assert record.status == "failed" and record.reason.startswith("out of memory: ")
    torch.empty(2**31, dtype=torch.uint8)  # the limit has gone with the run


def test_candidates_take_turns_so_that_drift_hits_all_alike(register):
    calls = []

    def logging(name):
        def forward(params):
            calls.append(name)
            return plain(params)

        return forward

    names = [register(name, logging(name)) for name in ("one", "two")]
    report = bench.run(TINY, names, baseline="one", caches=["cold"], seconds=1e-9)
    assert [record.forward_cold.samples for record in report] == [3, 3]
    # Before them each runs once for its result, once for its memory and once for its time.
    assert calls[-6:] in (["one", "two", "two", "one", "one", "two"], ["two", "one", "one", "two", "two", "one"])


def test_an_interruption_keeps_the_cases_that_are_complete(register):
    def interrupted(params):
        if params.query.shape[2] == 9:
            raise KeyboardInterrupt
        return plain(params)

    cases = [TINY, TINY.but(queries=9), TINY.but(queries=10)]
    report = bench.run(cases, ["torch", register("interrupted", interrupted)], seconds=0.002)
    assert [(record.case, record.status) for record in report] == [(TINY, "ran")] * 2
    assert report.missing == (cases[1].name, cases[2].name)


def test_warm_or_cold_caches_alone_can_be_asked_for():
    (warm,) = only("aten_math", caches=["warm"])
    (cold,) = only("aten_math", caches=["cold"])
    assert (warm.forward is None, warm.forward_cold is None) == (False, True)
    assert (cold.forward is None, cold.forward_cold is None) == (True, False)
    assert cold.forward_tflops is not None and cold.ratio is not None


def test_progress_counts_up_to_its_total():
    steps = []
    bench.run(
        [TINY, TINY.but(queries=9)], ["torch", "aten_math"], seconds=0.001, progress=lambda *step: steps.append(step)
    )
    assert [done for _, done, _ in steps] == list(range(len(steps)))
    assert {total for _, _, total in steps} == {len(steps)}
    assert any("aten_math" in step for step, _, _ in steps)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(cases=[]), BenchError, "cases: there are none"),
        (dict(cases=[3]), BenchError, "cases: expected cases or the name of a set, got 3"),
        (dict(cases="nope"), BenchError, "set: there is no 'nope'"),
        (dict(impls=["torhc"]), attnplug.UnknownImplementationError, "did you mean 'torch'"),
        (dict(baseline="torhc"), attnplug.UnknownImplementationError, "baseline: unknown implementation"),
        (dict(caches=["tepid"]), BenchError, "caches: expected some of ('warm', 'cold'), got ['tepid']"),
        (dict(caches=[]), BenchError, "caches: expected some of ('warm', 'cold'), got []"),
        (dict(caches="warm"), TypeError, "caches: expected some of ('warm', 'cold'), got 'warm'"),
        (dict(seconds=0), BenchError, "seconds: expected a time above 0, got 0"),
        (dict(cases=TINY.but(device="meta")), BenchError, "device: expected cpu or cuda, got 'meta'"),
        (dict(cases=TINY.but(device="cuda:99")), BenchError, "device: 'cuda:99' is not on this machine"),
    ],
)
def test_wrong_arguments_are_errors_that_name_them(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        bench.run(**{"cases": TINY, **arguments})


def test_percentiles_are_those_of_the_samples():
    timing = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0], calls=7)
    assert (timing.median, timing.p20, timing.p80, timing.samples, timing.calls) == (3.5, 2.0, 5.0, 6, 7)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 1)


def test_times_are_level_within_what_either_would_differ_by_if_measured_again():
    first, second = Timing(1.0, 1.0, 1.0, 9), Timing(1.05, 1.05, 1.05, 9)
    assert not second.level(first)
    assert second.level(first, noise=0.1)
    assert second.level(replace(first, again=0.1)) and replace(second, again=0.1).level(first)


def test_a_time_is_that_of_one_call_however_many_a_sample_has(ticking, register):
    (record,) = only(register("mine", ticking.taking(1e-5)), baseline="mine")
    assert record.forward.calls > 1
    for timing in (record.forward, record.forward_cold):
        assert (timing.p20, timing.median, timing.p80) == pytest.approx((1e-5, 1e-5, 1e-5))


def test_the_fastest_are_those_that_noise_does_not_tell_from_the_first(ticking, register):
    kernels = {
        "base": ticking.taking(2.0),
        "first": ticking.taking(1.0),
        "level": ticking.taking(0.95, 1.05, 1.15),
        "slower": ticking.taking(1.1, 1.2, 1.3),
        "wrong": lambda params: zeros(params),
    }
    for name, forward in kernels.items():
        register(name, forward)
    report = bench.run(TINY, list(kernels), baseline="base", caches=["warm"], seconds=1e-9)
    assert [record.impl for record in report if record.fastest] == ["first", "level"]
    ratios = {record.impl: record.ratio for record in report if record.correct}
    assert ratios == pytest.approx({"base": 1.0, "first": 0.5, "level": 0.525, "slower": 0.6})


def test_where_the_baseline_does_not_run_there_are_no_ratios_but_a_fastest(register):
    register("only_small", plain, capabilities=Capabilities(head_sizes=(4,)))
    report = bench.run(TINY, ["torch"], baseline="only_small", seconds=0.002)
    (base, torch_record) = sorted(report, key=lambda one: one.impl)
    assert base.status == "declined" and torch_record.ratio is None and torch_record.fastest


def test_a_share_is_the_least_possible_time_over_the_time_taken():
    ceiling = bench.Ceiling("cpu", "float32", flops=1e9, bandwidth=1e9)
    case = Case(heads=1, queries=100, head_size=10)
    bound = case.forward_flops / 1e9
    assert bound > case.forward_bytes / 1e9
    cold = Timing(4 * bound, 4 * bound, 4 * bound, 1)
    made = Record(case, "x", "ran", forward=Timing(bound, bound, bound, 1), forward_cold=cold, ceiling=ceiling)
    assert made.forward_share == pytest.approx(0.25)  # main memory is the ceiling: the caches are cold
    decode = case.but(queries=1, keys=100)
    made = Record(decode, "x", "ran", forward=Timing(1e-5, 1e-5, 1e-5, 1), ceiling=ceiling)
    assert made.forward_share == pytest.approx(max(decode.forward_bytes, decode.forward_flops) / 1e9 / 1e-5)
