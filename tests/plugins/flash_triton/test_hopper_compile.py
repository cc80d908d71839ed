"""Every configuration of forward that is shipped for Hopper compiles without a GPU, and overlaps as it should.

The machine code is looked at: no round spills (a few registers may, once for each tile of queries), products run on the
asynchronous tensor cores, and the exponentials of a round stand between the wait for its scores and the one for its
output, where ptxas would not leave them by itself.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles nothing under TRITON_INTERPRET=1", allow_module_level=True)

from attnplug import SDPAParams
from attnplug_flash_triton import cost, impl
from attnplug_flash_triton.hopper import outputs
from attnplug_flash_triton.plans import Plan
from attnplug_flash_triton.problem import Machine
from hopper_gradients import call

BEFORE_ROUNDS = 128
"""Bytes of one thread that may be spilled where it costs next to nothing."""
HOPPER = Machine("sm_90", 132)
CALLS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": dict(is_causal=True),
    "window": dict(is_causal=True, window=(1500, -1)),
    "everything": dict(lengths=((192, 192),), is_causal=True, window=(50, -1), softcap=2.0, sinks=True),
    "narrow": dict(is_causal=True, window=(50, 0)),
    "softcap": dict(softcap=2.0),
    "causal softcap": dict(softcap=2.0, is_causal=True),
    "short": dict(queries=64),
    "window, used keys": dict(used=(192, 90), window=(50, 20), lower_right=True),
    "negative scale": dict(scale=-0.5),
}
ALL = [(size, name) for size in (64, 128, 256) for name in CALLS]
QUICK = [(64, "full"), (128, "causal")]
CASES = [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in ALL]
PER_PRODUCT = 16
"""Of what is added up, head size or keys, so many for one HGMMA instruction."""


def machine_code(kernel: Any) -> list[str]:
    """Return the instructions of a compiled kernel, with their addresses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return re.findall(r"/\*([0-9a-f]{4,5}\*/ .*?);", text)


def rounds(code: list[str]) -> list[list[str]]:
    """Return the loops with products and exponentials that contain no other one.

    They end in a branch with a condition; those without come back from waiting for a barrier, which stands elsewhere.
    """
    at = [int(line.split("*")[0], 16) for line in code]
    found = []
    for end, line in zip(at, code, strict=True):
        back = re.search(r"@\S+ BRA (?:`\S+ )?0x([0-9a-f]+)", line)
        if back and int(back[1], 16) < end:
            body = [other for place, other in zip(at, code, strict=True) if int(back[1], 16) <= place <= end]
            if any("MUFU.EX2" in other for other in body) and any("HGMMA" in other for other in body):
                found.append(body)
    shortest: list[list[str]] = []
    for body in sorted(found, key=len):
        if not any(set(other) < set(body) for other in shortest):
            shortest.append(body)
    return shortest


@pytest.mark.parametrize(("size", "name"), CASES)
def test_shipped_kernels_fit_and_overlap(size: int, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    params = params_of(size, name)
    assert_fits_and_overlaps(params, outputs.forward(params, HOPPER), size, name, capsys)


JOINED = [
    *((64, name) for name in ("full", "causal", "narrow", "causal softcap")),
    *((128, name) for name in ("full", "causal", "window", "everything")),
]


@pytest.mark.parametrize(
    ("size", "name"), [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in JOINED]
)
def test_joined_tiles_fit_and_overlap(size: int, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    params = params_of(size, name)
    plan = outputs.forward(params, HOPPER, join=True)
    assert plan.launches[0].compiled_in["JOINED"]
    assert_fits_and_overlaps(params, plan, size, f"{name}, joined", capsys)


def params_of(size: int, name: str) -> SDPAParams:
    """Return a call of as many queries as three warpgroups take."""
    return call(size, heads=(2, 1), **({"queries": 192, "keys": 192} | CALLS[name])).params


def assert_fits_and_overlaps(
    params: SDPAParams, plan: Plan, size: int, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = plan.tensors(impl.tensors_of(params), torch.device("cpu"))
    launch = plan.launches[0]
    found = cost.cost(launch, tensors, "sm_90")
    with capsys.disabled():
        sys.stderr.write(f"\nsm_90 forward {size} {name}: {found}\n")
    assert not cost.does_not_fit(found, "sm_90")
    assert found.spilled <= BEFORE_ROUNDS

    code = machine_code(cost.compiled(launch, tensors, "sm_90"))
    assert not [line for line in code if re.search(r"\bHMMA\b", line)]
    loops = rounds(code)
    assert len(loops) >= launch.compiled_in["CONSUMERS"]
    for body in loops:
        text = " ".join(body)
        assert not re.findall(r"\b(?:STL|LDL)\b", text)
        assert text.count("HGMMA") == (size + launch.compiled_in["BLOCK_N"]) // PER_PRODUCT
        scores, output = text.index("WARPGROUP.DEPBAR.LE gsb0, 0x1"), text.index("WARPGROUP.DEPBAR.LE gsb0, 0x0")
        exponentials = [found.start() for found in re.finditer(r"MUFU\.EX2", text)]
        assert all(scores < place < output for place in exponentials)
    if launch.compiled_in["JOINED"]:  # between two tiles, too
        assert_exponentials_follow_scores(code, 64 * launch.compiled_in["BLOCK_N"] // 128)


def assert_exponentials_follow_scores(code: list[str], count: int) -> None:
    """Assert that behind each wait for scores alone there are so many before the next wait, for what was multiplied."""
    waits = [place for place, line in enumerate(code) if "WARPGROUP.DEPBAR.LE" in line]
    for wait, following in itertools.pairwise(waits):
        if "0x1" in code[wait]:
            assert "0x0" in code[following]
            assert sum("MUFU.EX2" in line for line in code[wait:following]) >= count
