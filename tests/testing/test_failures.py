"""What a failed check tells an author: what is wrong, where, how to see it again, and a hint for a known mistake."""

from __future__ import annotations

import inspect

import pytest
import torch

import attnplug
from attnplug import Capabilities, Feature
from attnplug.testing import Call, CheckFailure, check_impl
from mutants.kernel import CAPABILITIES, Kernel
from mutants.logits import SoftcapIgnored
from mutants.masks import AlwaysUpperLeft, DiagonalHidden, MaskOfTheFirstHead, OneKeyTooMany
from mutants.softmax import LseInBaseTwo, LseOfBlindRowsIsZero, MissingScale


def result_of(name, check, dtype="float32"):
    (result,) = check_impl(name, device="cpu", dtype=dtype, checks=[check]).results
    return result


def test_a_failure_names_size_place_and_tolerance(register):
    reason = result_of(register(MissingScale()), "check_values").reason
    for part in ("largest error", " at [", "allowed", "expected", "are too far off"):
        assert part in reason


def test_a_failure_can_be_seen_again_by_the_line_that_it_prints(register):
    name = register(MissingScale())
    reason = result_of(name, "check_values").reason
    line = reason.rpartition("again: ")[2]
    with pytest.raises(CheckFailure, match="largest error"):
        exec(line)


@pytest.mark.parametrize(
    ("kernel", "check", "hint"),
    [
        (MissingScale, "check_values", "no scale"),
        (LseInBaseTwo, "check_lse", "base 2"),
        (AlwaysUpperLeft, "check_causal_lower_right", "other corner"),
        (DiagonalHidden, "check_causal", "a causal mask that hides the last key of each query"),
        (OneKeyTooMany, "check_causal", "a causal mask that shows one key too many"),
        (SoftcapIgnored, "check_softcap", "softcap ignored"),
    ],
)
def test_a_known_mistake_gets_a_hint(register, kernel, check, hint):
    reason = result_of(register(kernel()), check).reason
    assert "hint: " in reason
    assert hint in reason


def test_what_fails_in_the_same_way_is_said_once(register):
    def forward(params):
        raise RuntimeError("nothing works")

    report = check_impl(register(forward), device="cpu", dtype="float32", checks=["check_values", "check_head_sizes"])
    assert str(report).count("raised RuntimeError: nothing works") == 3  # in full, and in each row of the table
    assert "\nThe same: check_head_sizes[float32]\n" in str(report)


class UnscaledKeyGradient(Kernel):
    def attend_backward(self, params, *given):
        found = super().attend_backward(params, *given)
        return {**found, "key": found["key"] / params.scale}


class FirstSequenceOfMasks(Kernel):
    def mask_of(self, params, b, keys):
        return super().mask_of(params, 0, keys)


class HalvedGradientOfSinks(Kernel):
    def joined_sinks(self, parts):
        return super().joined_sinks(parts) / 2


class LseOfVisibleRowsIsShifted(Kernel):
    def lse(self, params, top, total):
        return super().lse(params, top, total) + 0.01


class DoublesTheQueryInPlace(Kernel):
    def forward(self, params):
        returned = super().forward(params)
        params.query.detach().mul_(2)
        return returned


class SummedOverOtherGroups(Kernel):
    def summed_over_group(self, gradient, kv_heads):
        return gradient.unflatten(0, (-1, kv_heads)).sum(0)


class AsksForWhatIsNotThere(Kernel):
    def kv_heads(self, heads, kv_heads):
        return torch.arange(heads) // torch.tensor(kv_heads).nonsense


@pytest.mark.parametrize(
    ("kernel", "check", "hint"),
    [
        (DoublesTheQueryInPlace, "check_values", "the kernel changed query in place"),
        (SummedOverOtherGroups, "check_gqa_gradients", "this adds the query heads h of one h % Hkv"),
        (UnscaledKeyGradient, "check_gradients", "the scale is missing: multiply this gradient by params.scale"),
        (MaskOfTheFirstHead, "check_boolean_mask", "the mask of the first head for all"),
        (FirstSequenceOfMasks, "check_boolean_mask", "the mask of the first sequence for all"),
        (LseOfBlindRowsIsZero, "check_rows_hidden_by_a_boolean_mask", "must have lse = -inf"),
    ],
)
def test_a_known_mistake_of_gradients_masks_and_blind_rows_gets_a_hint(register, kernel, check, hint):
    assert hint in result_of(register(kernel()), check).reason


def test_a_wrong_gradient_of_sinks_is_compared_with_no_call_that_has_none(register):
    reason = result_of(register(HalvedGradientOfSinks()), "check_lse_gradient_of_sinks").reason
    assert "gradient of sinks: largest error" in reason


@pytest.mark.parametrize(
    "fields",
    [
        {"used": (3, 9), "poison": True},
        {"mask": "additive blind -inf", "mask_layout": "framed"},
        {"layout": "expanded"},
        {"layout": "misaligned", "heads": 4, "kv_heads": 2},
        {"lengths_q": (5, 3), "lengths_k": (5, 20), "page_size": 16, "poison": True, "numbers_layout": "guarded"},
    ],
    ids=str,
)
def test_a_kernel_that_leaves_its_inputs_as_they_are_is_not_said_to_change_them(register, fields):
    call = Call(**{"queries": 12, "keys": 12, "scale": 0.7} | fields)
    with pytest.raises(CheckFailure, match="largest error") as raised:
        call.check(register(MissingScale()))
    assert "in place" not in str(raised.value)


def test_a_result_that_no_known_mistake_gives_gets_no_hint_where_a_mistake_would_give_nan(register):
    class Enlarged(Kernel):
        def forward(self, params):
            out, *others = super().forward(params)
            return out * 1.01, *others

    with pytest.raises(CheckFailure, match="out: largest error") as raised:
        Call(queries=12, keys=12, used=(3, 9), poison=True).check(register(Enlarged()))
    assert "hint" not in str(raised.value)


def test_an_lse_that_is_wrong_where_keys_are_seen_gets_no_hint_about_rows_that_see_none(register):
    for check in ("check_lse", "check_rows_hidden_by_a_boolean_mask"):
        reason = result_of(register(LseOfVisibleRowsIsShifted(), name=check), check).reason
        assert "lse: largest error" in reason
        assert "rows that see no key" not in reason


def test_an_exception_of_a_kernel_is_told_with_the_line_of_the_kernel_that_raised_it(register):
    source, first = inspect.getsourcelines(AsksForWhatIsNotThere)
    line = first + next(number for number, text in enumerate(source) if "nonsense" in text)
    reason = result_of(register(AsksForWhatIsNotThere()), "check_values").reason
    assert reason.startswith("raised AttributeError: ")
    assert f"(in {inspect.getfile(AsksForWhatIsNotThere)}, line {line})" in reason


class AsksPyTorch(Kernel):
    @torch.no_grad()
    def forward(self, params):
        return params.query @ params.query


class AsksAttnplug(Kernel):
    def forward(self, params):
        return attnplug.scaled_dot_product_attention(params.query, params.key, "value")


class AsksTriton(Kernel):
    def forward(self, params):
        return imitated_library("triton")(params)


def imitated_library(name):
    """Return a function that raises, as one of a module of this name."""
    module = {"__name__": f"{name}.compiler"}
    exec(compile("def launch(*given): raise ValueError('too many resources')", "compiler.py", "exec"), module)
    return module["launch"]


@pytest.mark.parametrize("kernel", [AsksPyTorch, AsksAttnplug, AsksTriton])
def test_an_exception_of_what_a_kernel_calls_is_told_with_the_line_of_the_kernel(register, kernel):
    source, first = inspect.getsourcelines(kernel)
    reason = result_of(register(kernel()), "check_values").reason
    assert f"(in {inspect.getfile(kernel)}, line {first + len(source) - 1})" in reason


def test_what_attnplug_raises_about_a_kernel_is_told_without_a_line_of_the_program(register):
    class NothingReturned(Kernel):
        def forward(self, params):
            return None

    reason = result_of(register(NothingReturned()), "check_values").reason
    assert "lse None where it computes none; got None\n" in reason


def test_an_lse_that_is_returned_and_not_declared_is_told_as_such(register):
    class Undescribed(Kernel):
        fake = None

    declared = Capabilities(dtypes=CAPABILITIES.dtypes, features={Feature.CAUSAL, Feature.UPPER_LEFT})
    reason = result_of(register(Undescribed(), capabilities=declared), "check_operator").reason
    assert "forward returns an lse that is not declared" in reason
    assert "declare Feature.LSE, or return None" in reason


def test_a_check_for_another_dtype_than_the_one_asked_for_is_not_said_to_be_undeclared(register):
    name = register(Kernel())
    assert result_of(name, "check_gradcheck").reason == "is made for float64 alone"
    narrow = Capabilities(dtypes=("float32",), features=CAPABILITIES.features)
    assert result_of(register(Kernel(), narrow, "narrow"), "check_gradcheck").reason == "does not declare float64"
