"""What Hopper's kernels have in assembly, of which the emulator has twins: run one instruction after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import ptx
from attnplug_flash_triton.hopper import device
from gluon_emulator.language import Language
from gluon_emulator.launching import TWINS, Emulated


class Assembled(Language):
    """Gluon's language, with assembly, for one warp: what a thread has, first."""

    @staticmethod
    def inline_asm_elementwise(assembly: str, constraints: str, given: list[Any], pack: int, **_: Any) -> Tensor:
        columns = [torch.broadcast_to(each, (pack, ptx.THREADS)) for each in given]
        kinds = ["r" if each.dtype == torch.int32 else "f" for each in given]
        assert constraints.split(",") == ["=f"] * pack + [kind for kind in kinds for _ in range(pack)]
        return torch.stack(
            ptx.run(getattr(assembly, "value", assembly), pack, [row for each in columns for row in each])
        )


def assembled(name: str) -> Callable[..., Tensor]:
    """Return a function of `hopper/device.py` with its assembly."""
    twins = {other: twin for other, twin in TWINS.items() if other != name} | {"gl": Assembled}
    function: Callable[..., Tensor] = Emulated(twins).function(getattr(device, name))
    return function


@pytest.mark.parametrize("largest", [1e-6, 0.5, 5.0, 24.0, 60.0, 1e4, 1e30])
def test_a_shared_reciprocal_gives_a_tanh(largest: float) -> None:
    x = torch.linspace(-largest, largest, 4 * ptx.THREADS, dtype=torch.float64).view(ptx.THREADS, 4).T
    found = assembled("softcapped")(x.float())
    assert (found - (torch.tanh(x.float().double() * 0.5 * torch.tensor(2.0).log()) - 1) / 2).abs().max() < 3e-7


def test_of_four_that_share_one_each_is_right_whatever_the_others_are() -> None:
    x = torch.tensor([-1e30, 1e30, 0.0, -3.0]).view(4, 1).expand(4, ptx.THREADS)
    found = assembled("softcapped")(x)
    assert found[:, 0].tolist() == pytest.approx([-1.0, 0.0, -0.5, -1 / (1 + 2**-3)], abs=3e-7)


@pytest.mark.parametrize("place", range(4))
def test_of_four_that_share_one_a_nan_stays_one_and_reaches_no_other(place: int) -> None:
    """Four elements of a thread are of two rows, one of which may be of another sequence."""
    x = torch.tensor([-1e30, 1e30, 0.5, -3.0]).view(4, 1).repeat(1, ptx.THREADS)
    x[place, 3] = torch.nan
    found = assembled("softcapped")(x)
    assert torch.equal(found.isnan(), x.isnan())
    assert (found + 1 / (1 + torch.exp2(x))).abs().nan_to_num(0.0).max() < 3e-7


class Rows:
    """What a kernel broadcasts to rows or columns: an element for each that a thread has."""

    def __init__(self, elements: Tensor) -> None:
        self.elements = elements

    def __getitem__(self, _: Any) -> Tensor:
        return self.elements


@pytest.mark.parametrize("keys", [1, 2, 7, 8, 9, 40, 63, 64, 100])
def test_products_behind_the_last_key_are_hidden(keys: int) -> None:
    """A thread has pairs of columns, 8 apart, of two rows: 0 and 1 of the first, 2 and 3 of the second, and again."""
    element, thread = torch.arange(32)[:, None], torch.arange(ptx.THREADS)
    column = element // 4 * 8 + element % 2 + thread % 4 * 2
    x = torch.randn(32, ptx.THREADS)
    found = assembled("hidden_behind")(x, Rows((column - keys + 1).int()))
    assert torch.equal(found, torch.where(column < keys, x, -torch.inf))


@pytest.mark.parametrize("where", [None, 0, 2, 31])
def test_a_warp_multiplies_by_its_factors_unless_all_are_one(where: int | None) -> None:
    """Elements of a thread are of two rows, in pairs: 0 and 1 of the first, 2 and 3 of the second, and again."""
    x = torch.randn(32, ptx.THREADS)
    rows = torch.ones(2, ptx.THREADS)
    if where is not None:
        rows[where // 2 % 2, where % ptx.THREADS] = 0.25
    factors = rows.repeat_interleave(2, 0).repeat(8, 1)
    assert torch.equal(assembled("multiplied_where_needed")(x, Rows(factors)), x * factors)
