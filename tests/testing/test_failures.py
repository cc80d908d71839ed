"""What a failed check tells an author: what is wrong, where, how to see it again, and a hint for a known mistake."""

from __future__ import annotations

import pytest

from attnplug.testing import CheckFailure, check_impl
from mutants.kernel import Kernel
from mutants.logits import SoftcapIgnored
from mutants.masks import AlwaysUpperLeft, MaskOfTheFirstHead
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
        (SoftcapIgnored, "check_softcap", "softcap ignored"),
    ],
)
def test_a_known_mistake_gets_a_hint(register, kernel, check, hint):
    reason = result_of(register(kernel()), check).reason
    assert "hint: " in reason
    assert hint in reason


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


@pytest.mark.parametrize(
    ("kernel", "check", "hint"),
    [
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


def test_an_lse_that_is_wrong_where_keys_are_seen_gets_no_hint_about_rows_that_see_none(register):
    for check in ("check_lse", "check_rows_hidden_by_a_boolean_mask"):
        reason = result_of(register(LseOfVisibleRowsIsShifted(), name=check), check).reason
        assert "lse: largest error" in reason
        assert "rows that see no key" not in reason
