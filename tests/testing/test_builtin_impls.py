"""The built-in implementations and the reference keep the contract, as far as the checks can see."""

from __future__ import annotations

from attnplug.testing import parametrize_with_checks


@parametrize_with_checks("torch", device="cpu")
def test_torch_keeps_the_contract(check):
    check()


@parametrize_with_checks("aten_flash", device="cpu")
def test_aten_flash_keeps_the_contract(check):
    check()


@parametrize_with_checks("aten_math", device="cpu")
def test_aten_math_keeps_the_contract(check):
    check()


@parametrize_with_checks("math_ref", device="cpu")
def test_math_ref_keeps_the_contract(check):
    check()
