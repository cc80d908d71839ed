"""The conformance kit itself: its three ways in, what it asks, and its report."""

from __future__ import annotations

import itertools
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attnplug
import forked
import mutants
from attnplug import Capabilities, Feature
from attnplug.testing import Call, all_checks, check_impl, parametrize_with_checks
from mutants.kernel import Kernel
from mutants.running import DeclinesSoftcap, SharedWorkspace


def result_of(name, check, dtype="float32"):
    (result,) = check_impl(name, device="cpu", dtype=dtype, checks=[check]).results
    return result


def forward_only(params):
    logits = params.scale * params.query.float() @ params.key.float().mT
    return (torch.softmax(logits, -1) @ params.value.float()).to(params.query.dtype), None


def unscaled(params):
    return torch.softmax(params.query @ params.key.mT, -1) @ params.value, None


def test_importing_attnplug_does_not_import_the_kit():
    script = "import sys, attnplug, attnplug.cli; assert 'attnplug.testing' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_importing_the_kit_does_not_import_pytest():
    script = "import sys, attnplug.testing; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_check_says_what_it_proves():
    checks = all_checks()
    assert len({check.name for check in checks}) == len(checks)
    for check in checks:
        assert check.name.startswith("check_")
        assert check.claim.endswith((".", ":")), check.name


def test_every_declared_feature_is_checked():
    asked = {feature for check in all_checks() for feature in check.features}
    assert asked == set(Feature)


def test_what_is_not_declared_is_not_applicable(register):
    name = register(forward_only, Capabilities(dtypes=("float32", "bfloat16")))
    report = check_impl(name, device="cpu")
    assert report.passed, str(report)
    assert {result.dtype for result in report.results} == {"float32", "bfloat16"}
    assert [result.status for result in report["check_softcap"]] == ["not applicable"]
    assert [result.reason for result in report["check_gradients[float32]"]] == ["has no backward"]


def test_a_declared_feature_that_is_declined_is_a_failure(register):
    result = result_of(register(DeclinesSoftcap()), "check_softcap")
    assert result.status == "failed"
    assert "declares SOFTCAP" in result.reason
    assert "softcap is not there yet" in result.reason


def test_a_declared_pair_that_is_declined_is_reported_but_no_failure(register):
    class NoSinksUnderCausalMasks(Kernel):
        def supports(self, params):
            return "no sinks under causal masks" if params.is_causal and params.sinks is not None else None

    result = result_of(register(NoSinksUnderCausalMasks()), "check_feature_pairs")
    assert result.status == "passed"
    assert result.declined
    assert all("no sinks under causal masks" in text for text in result.declined)


@pytest.mark.parametrize("check", ["check_outputs_are_fully_written", "check_nothing_outside_is_written"])
def test_a_kernel_without_a_deterministic_mode_declines_checks_of_new_memory(register, check):
    class NotDeterministic(Kernel):
        def supports(self, params):
            return "no deterministic mode" if torch.are_deterministic_algorithms_enabled() else None

    result = result_of(register(NotDeterministic()), check)
    assert (result.status, result.reason.partition(" -- ")[0]) == ("declined", "no deterministic mode")


def test_windows_of_one_side_alone_pass_and_the_report_says_what_is_declined(register):
    class LeftWindows(Kernel):
        def supports(self, params):
            return "no windows to the right" if params.window_size[1] > 0 else None

    name = register(LeftWindows())
    for check in ("check_window", "check_varlen_window", "check_window_lower_right", "check_rows_before_the_window"):
        result = result_of(name, check)
        assert result.status == "passed", result.reason
        assert result.declined


def test_a_quick_run_asks_for_any_two_declared_features_in_one_call(register):
    asked = set()

    class Recording(Kernel):
        def forward(self, params):
            seen = {
                "softcap": params.softcap > 0,
                "sinks": params.sinks is not None,
                "alibi": params.alibi_slopes is not None,
                "window": params.window_size != (-1, -1),
                "causal": params.is_causal,
                "dropout": params.dropout > 0,
                "packed": params.cu_seq_q is not None,
                "paged": params.block_table is not None,
                "used": params.seqused_k is not None,
                "lse": params.return_lse,
                "grouped": params.enable_gqa,
            }
            asked.update(itertools.combinations(sorted(name for name, here in seen.items() if here), 2))
            return super().forward(params)

    assert result_of(register(Recording()), "check_feature_pairs").status == "passed"
    names = ("alibi", "causal", "dropout", "grouped", "lse", "packed", "paged", "sinks", "softcap", "used", "window")
    assert set(itertools.combinations(names, 2)) <= asked


def test_supports_that_raises_is_a_failure_though_attnplug_would_take_it_for_a_reason(register):
    class Careless(Kernel):
        def supports(self, params):
            return params.attn_mask.shape and None

    result = result_of(register(Careless()), "check_scale")
    assert result.status == "failed"
    assert "supports() raised AttributeError" in result.reason


def test_supports_that_says_yes_or_no_is_told_what_it_must_return(register):
    class YesOrNo(Kernel):
        def supports(self, params):
            return True

    reason = result_of(register(YesOrNo()), "check_scale").reason
    assert "supports() returned True; expected a reason, several, or None for none" in reason


def test_checks_leave_the_random_numbers_of_the_program_alone(register):
    name = register(Kernel())
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    result_of(name, "check_dropout_follows_the_seed")
    assert torch.equal(torch.rand(1), expected)


def test_the_report_is_a_table_with_failures_in_full(register):
    report = check_impl(register(unscaled), device="cpu", dtype="float32")
    assert not report.passed
    text = str(report)
    assert text.startswith("mine on cpu, quick: FAILED, first ")
    assert "check_scale[float32]: The scale of the call is used" in text
    assert ["check", "dtype", "result", "why"] in [line.split() for line in text.splitlines()]
    assert json.loads(json.dumps(report.as_dict()))["passed"] is False


def test_an_unknown_name_dtype_device_or_level_is_an_error():
    with pytest.raises(attnplug.UnknownImplementationError, match="did you mean 'torch'"):
        check_impl("torhc")
    with pytest.raises(ValueError, match="dtype: 'torch' declares"):
        check_impl("torch", dtype="int8")
    with pytest.raises(ValueError, match="device: 'nowhere'"):
        check_impl("torch", device="nowhere")
    with pytest.raises(ValueError, match="level: expected one of quick, full"):
        check_impl("torch", device="cpu", level="slow")


def test_expected_failures_must_name_checks():
    with pytest.raises(ValueError, match="did you mean 'check_values'"):
        parametrize_with_checks("torch", {"check_value": "a typing error"}, device="cpu")


def test_parametrized_tests_pass_fail_skip_and_hold_expected_failures_to_their_word(pytester_run):
    outcomes = pytester_run(
        {"check_softcap": "known", "check_scale": "passes by now"}, ("check_softcap", "check_scale", "check_values")
    )
    assert outcomes == {"check_softcap": "XFAIL", "check_scale": "FAILED", "check_values": "PASSED"}


@pytest.fixture
def pytester_run(tmp_path):
    """Run the kit in a test file of its own, for some checks, and return what became of each."""

    def run(expected, names):
        (tmp_path / "test_mine.py").write_text(_TEST.format(folder=str(_FOLDER), expected=expected))
        wanted = " or ".join(names)
        command = [forked.python(), "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-q", "-k", wanted, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        found = {}
        for line in done.stdout.splitlines():
            for name in names:
                if line.startswith(("PASSED", "FAILED", "XFAIL")) and f"[{name}[float32]]" in line:
                    found[name] = line.split()[0]
        return found

    return run


_FOLDER = Path(mutants.__file__).parents[1]
_TEST = """
import sys
sys.path.insert(0, {folder!r})
import attnplug
from attnplug.testing import parametrize_with_checks
from mutants.kernel import CAPABILITIES
from mutants.logits import SoftcapIgnored

attnplug.register_impl(attnplug.ImplSpec(
    name="mine", kernel=SoftcapIgnored(), backend=attnplug.SDPBackend.MATH, capabilities=CAPABILITIES))

@parametrize_with_checks("mine", expected_failures={expected!r}, dtype="float32")
def test_mine(check):
    check()
"""


def test_a_call_is_the_same_for_the_same_fields_and_prints_only_what_is_not_usual():
    call = Call(queries=3, mask="additive", gradients=("query",))
    assert repr(call) == "Call(queries=3, mask='additive', gradients=('query',))"
    first, second = call.make(), call.make()
    assert torch.equal(first.arguments["query"], second.arguments["query"])
    assert not torch.equal(first.arguments["query"], call.but(seed=1).make().arguments["query"])


def test_threads_that_fail_are_reported(register):
    result = result_of(register(SharedWorkspace()), "check_two_threads_at_once")
    assert result.status == "failed"
    assert "with two threads at once" in result.reason


def test_checks_stand_in_the_order_from_simple_to_involved():
    names = [check.name for check in all_checks()]
    assert names[0] == "check_kernel_loads"
    order = ("check_values", "check_causal", "check_gradients", "check_dropout_gradients", "check_feature_pairs")
    assert sorted(order, key=names.index) == list(order)


def test_every_module_of_checks_has_its_place():
    from attnplug.testing import checks

    found = {item.name for item in pkgutil.iter_modules(checks.__path__)}
    assert found == set(checks.SIMPLEST_FIRST)


def test_a_kernel_that_cannot_be_imported_is_one_failure(register):
    report = check_impl(register("no_such_package.kernel"), device="cpu")
    (failure,) = report.results
    assert (failure.check, failure.status) == ("check_kernel_loads", "failed")
    assert "no_such_package" in failure.reason


def test_supports_is_not_asked_about_empty_calls(register):
    class Asked(Kernel):
        def supports(self, params):
            tensors = (params.query, params.key, params.value, params.attn_mask)
            assert all(0 not in tensor.shape for tensor in tensors if tensor is not None), "an empty call"

    name = register(Asked())
    report = check_impl(name, device="cpu", dtype="float32", checks=PLAIN)
    assert report.passed, str(report)


PLAIN = ("check_values", "check_scale", "check_head_sizes", "check_varlen_empty_sequences", "check_seqused_k")
PACKED = {
    Feature.VARLEN,
    Feature.CAUSAL,
    Feature.LOWER_RIGHT,
    Feature.WINDOW,
    Feature.SOFTCAP,
    Feature.SINKS,
    Feature.ALIBI,
    Feature.DROPOUT,
    Feature.GQA,
    Feature.LSE,
    Feature.SEQUSED_K,
    Feature.PAGED,
}


class Packed(Kernel):
    """Takes packed sequences alone, and would fail on anything else."""

    def forward(self, params):
        assert params.is_varlen
        return super().forward(params)


def test_a_kernel_for_variable_length_alone_passes(register):
    name = register(Packed(), Capabilities(features=PACKED, dense=False))
    report = check_impl(name, device="cpu", dtype="float32")
    assert report.passed, str(report)
    passed = {result.check for result in report.results if result.status == "passed"}
    dense_too = {"check_values", "check_gradients", "check_softcap", "check_growing_logits", "check_feature_pairs"}
    assert dense_too | {"check_varlen", "check_varlen_gradients", "check_paged"} <= passed
    assert {result.status for result in report["check_boolean_mask"]} == {"not applicable"}


def test_a_wrong_kernel_for_variable_length_alone_is_caught_by_checks_of_dense_calls(register):
    class Wrong(Packed):
        def scale(self, params):
            return 1.0

    report = check_impl(
        register(Wrong(), Capabilities(features=PACKED, dense=False)), device="cpu", dtype="float32", checks=PLAIN
    )
    assert "check_values" in {failure.check for failure in report.failures}
    assert "lengths_q" in report.failures[0].reason


def test_dense_calls_are_declined_for_a_kernel_of_variable_length_alone(register):
    name = register(Packed(), Capabilities(features=PACKED, dense=False))
    query = torch.randn(1, 2, 4, 8)
    with pytest.raises(attnplug.NoImplementationError, match=r"takes variable-length calls alone \(varlen_attn\)"):
        attnplug.scaled_dot_product_attention(query, query, query, impl=name)


def test_capabilities_for_nothing_are_refused():
    with pytest.raises(attnplug.SpecError, match="features must hold Feature.VARLEN"):
        Capabilities(dense=False)
    assert (Capabilities(features=PACKED, dense=False) | Capabilities(devices=("cuda",))).dense


def test_dropout_is_checked_at_a_smaller_head_size_where_the_backward_of_the_largest_is_declined(register):
    class Small(Kernel):
        largest = 128

        def supports(self, params):
            size = params.query.shape[-1]
            return "no room" if size > self.largest and params.dropout > 0 and params.needs_grad else None

    def status(name):
        made = check_impl(name, device="cpu", dtype="float32", level="full", checks=["check_dropout_mask_of_backward"])
        return made.results[0].status

    assert status(register(Small())) == "passed"
    Small.largest = 0
    assert status("mine") == "failed"


def test_a_feature_that_this_machine_lacks_is_declined_with_the_reason_and_no_failure(register):
    class Lacks(DeclinesSoftcap):
        def lacks(self, device, dtype):
            return {Feature.SOFTCAP: "softcap needs a later library"} if dtype is torch.float32 else {}

    assert result_of(register(DeclinesSoftcap()), "check_softcap").status == "failed"
    result = result_of(register(Lacks(), name="other"), "check_softcap")
    assert (result.status, result.reason) == ("declined", "softcap needs a later library")
    assert result_of("other", "check_softcap", dtype="float64").status == "failed"
