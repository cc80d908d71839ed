"""The backward kernels for Hopper compile to what they were written for, without a GPU.

That is seen in the machine code: asynchronous products alone, memory that fits, exponentials that are computed while a
product runs, and next to no spills.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles nothing under TRITON_INTERPRET=1", allow_module_level=True)

from attnplug_flash_triton import cost
from attnplug_flash_triton.config import SHARED_MEMORY
from hopper_gradients import Call, call, plan_of

SPILLED = 160
"""Bytes of a thread, of masked tiles and of the places of results. For how many the assembler finds no register differs
between releases: at most 56 with Triton 3.6 and ptxas 13.1, 144 with Triton 3.9."""

CALLS: dict[str, dict[str, Any]] = {
    "causal": dict(is_causal=True),
    "whole tiles": dict(queries=256, keys=256),
    "odd lengths": {},
    "window": dict(window=(100, 7), lower_right=True),
    "softcap, causal": dict(softcap=5.0, is_causal=True),
    "used keys": dict(used=(130, 300), is_causal=True, lower_right=True),
    "variable length": dict(lengths=((64, 200), (200, 64)), is_causal=True),
}
KERNELS = {
    "64": (64, False),
    "64 deterministic": (64, True),
    "128": (128, False),
    "128 deterministic": (128, True),
    "256": (256, True),
}
CASES = [
    pytest.param(kernel, name, marks=() if name == "causal" and kernel != "64 deterministic" else pytest.mark.slow)
    for kernel in KERNELS
    for name in CALLS
]
PRODUCTS = {"key_gradients_kernel": 4, "key_gradients_wide_kernel": 4, "query_gradient_kernel": 3}


def compiled(made: Call, deterministic: bool) -> dict[str, tuple[Any, cost.Cost]]:
    """Return the compiled Gluon kernels of a plan, and what they cost."""
    plan = plan_of(made, deterministic=deterministic)
    halves = {
        n: t.bfloat16() if n in ("query", "key", "value", "grad_out", "out") else t for n, t in made.given.items()
    }
    tensors = plan.tensors(halves, torch.device("cpu"))
    return {
        step.kernel.__name__: (cost.compiled(step, tensors, "sm_90"), cost.cost(step, tensors, "sm_90"))
        for step in plan.launches
        if step.kernel.is_gluon()
    }


def machine_code(kernel: Any, folder: Path) -> list[str]:
    """Return the instructions of a kernel, and the labels between them."""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    text = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout
    found = (re.search(r"^\s*(\.L_\w+):|/\*[0-9a-f]+\*/\s+(.*?);", line) for line in text.splitlines())
    return [match[1] or match[2] for match in found if match]


def loops(code: list[str]) -> list[list[str]]:
    """Return the innermost loops that multiply."""
    places = {label: i for i, label in enumerate(code) if label.startswith(".L_")}
    spans = []
    for end, instruction in enumerate(code):
        match = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction)
        if match and places.get(match[1], end) < end:
            spans.append((places[match[1]], end))
    multiply = [span for span in spans if any("HGMMA" in x for x in code[slice(*span)])]
    inner = [s for s in multiply if not any(s[0] <= t[0] and t[1] <= s[1] and s != t for t in multiply)]
    return [code[begin:end] for begin, end in inner]


def check(size: int, deterministic: bool, arguments: dict[str, Any], folder: Path) -> None:
    """Assert what the module says of each kernel that a call launches, and print what it costs."""
    kernels = compiled(call(size, **arguments), deterministic)
    assert kernels
    for name, (kernel, costs) in kernels.items():
        code = machine_code(kernel, folder)
        products = sum("HGMMA" in instruction for instruction in code)
        sys.stderr.write(f"\n{size:4} {name:26} {costs.spilled:4} spilled {costs.shared:7} shared {products:4} HGMMA")
        assert costs.shared <= SHARED_MEMORY["sm_90"]
        assert costs.spilled <= SPILLED
        assert products >= PRODUCTS[name] * size // 16 // 4
        assert not any(re.search(r"\bHMMA", instruction) for instruction in code)


@pytest.mark.parametrize(("kernel", "name"), CASES)
def test_every_configuration_fits_and_multiplies_asynchronously(
    kernel: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        check(*KERNELS[kernel], CALLS[name], tmp_path)


@pytest.mark.parametrize("size", [64, 128])
def test_exponentials_are_computed_while_a_product_runs(size: int, tmp_path: Path) -> None:
    """The first wait of a round, for dP, comes after the exponentials: ptxas moves waits up where it may."""
    ((kernel, _),) = compiled(call(size, queries=256, keys=256), deterministic=False).values()
    rounds = [loop for loop in loops(machine_code(kernel, tmp_path)) if any("MUFU.EX2" in x for x in loop)]
    for instructions in sorted(rounds, key=len)[:2]:  # of each warpgroup; waits that try again look like loops, too
        first_product = next(i for i, x in enumerate(instructions) if "HGMMA" in x)
        first_wait = next(i for i, x in enumerate(instructions) if "WARPGROUP.DEPBAR" in x)
        exponentials = [i for i, x in enumerate(instructions) if "MUFU.EX2" in x]
        assert first_product < exponentials[0] < exponentials[-1] < first_wait


def test_a_kernel_is_compiled_once_for_all_lengths() -> None:
    variants: dict[str, set[str]] = {}
    for queries, keys in ((2, 3), (100, 900), (333, 129), (513, 1000)):
        made = call(128, queries=queries, keys=keys, is_causal=True)
        halves = {n: t.bfloat16() if n != "lse" else t for n, t in made.given.items()}
        for step in (plan := plan_of(made)).launches:
            tensors = plan.tensors(halves, torch.device("cpu"))
            _, specialization, options = cost.specialised(step, tensors, "sm_90")
            variants.setdefault(step.kernel.__name__, set()).add(f"{specialization} {options}")
    assert len(variants.pop("key_gradients_kernel")) == 1
