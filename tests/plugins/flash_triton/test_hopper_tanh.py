"""The tanh of Hopper's forward kernel, of which the emulator has a twin: its assembly, one instruction after another."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import ptx
from attnplug_flash_triton.hopper import device
from gluon_emulator.language import Language
from gluon_emulator.launching import TWINS, Emulated

TOGETHER = device.TOGETHER.value


class Assembled(Language):
    """Gluon's language, with assembly."""

    abs = staticmethod(torch.abs)
    where = staticmethod(torch.where)

    @staticmethod
    def inline_asm_elementwise(assembly: str, constraints: str, given: list[Any], **_: Any) -> Tensor:
        columns = [torch.broadcast_to(each, (TOGETHER, ptx.THREADS)) for each in given]
        assert constraints.split(",").count("f") == len(given) * TOGETHER
        return torch.stack(ptx.run(assembly, TOGETHER, [row for each in columns for row in each]))


def tanh(x: Tensor, unit: float) -> Tensor:
    """Return the kernel's tanh of x * unit, for what one warp computes together."""
    function = Emulated({name: twin for name, twin in TWINS.items() if name != "tanh"} | {"gl": Assembled})
    scale = torch.tensor(2 * math.log2(math.e) * unit, dtype=torch.float32)
    return function.function(device.tanh)(x, scale)


def spread(largest: float) -> Tensor:
    return torch.linspace(-largest, largest, TOGETHER * ptx.THREADS, dtype=torch.float64).view(TOGETHER, ptx.THREADS)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("largest", [0.0, 0.01, 0.7, 0.8, 3.0, 100.0])
@pytest.mark.parametrize("unit", [1e-30, 1e-20, 1e-8, 9e-6, 2e-5, 3e-3, 1.0, 9e4, 2e5, 1e20])
def test_it_is_tanh_for_any_scale_and_softcap(unit: float, largest: float, sign: int) -> None:
    x = (spread(largest) / unit).float()
    found = tanh(x, sign * unit)
    assert (found - torch.tanh(x.double() * sign * unit)).abs().max() < 4e-6


@pytest.mark.parametrize("unit", [1e-8, 3e-3, 1e20])
@pytest.mark.parametrize("place", [(0, 0), (7, 13), (TOGETHER - 1, ptx.THREADS - 1)])
@pytest.mark.parametrize("largest", [0.5, 5.0])
def test_a_nan_stays_one_and_is_felt_by_no_other(place: tuple[int, int], largest: float, unit: float) -> None:
    x = (spread(largest) / unit).float()
    x[place] = math.nan
    found = tanh(x, unit)
    assert torch.equal(found.isnan(), x.isnan())
    assert (found - torch.tanh(x.double() * unit)).abs().nan_to_num(0.0).max() < 4e-6
    assert tanh(torch.full_like(x, math.nan), unit).isnan().all()


def test_infinite_products_are_capped() -> None:
    x = spread(0.5).float()
    x[0, 0], x[3, 5] = math.inf, -math.inf
    found = tanh(x, 0.01)
    assert found[0, 0] == 1 and found[3, 5] == -1
