"""Every configuration that flash_triton ships compiles for its architecture, without a GPU.

What is compiled is what a call would launch, for each entry of the tables with the most features that it can have.
Registers are counted by the assembler; a spilled one fails, unless the table has the times by which it is faster so,
and so does more shared memory than the architecture has.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles nothing under TRITON_INTERPRET=1", allow_module_level=True)

from attnplug import SDPAParams
from attnplug_flash_triton import config, cost, impl, launches
from attnplug_flash_triton.config import Cell, Tiles
from attnplug_flash_triton.problem import Machine

ENTRIES = [
    pytest.param(architecture, kernel, precision, id=f"{architecture}-{kernel}-{precision}")
    for architecture in config.ARCHITECTURES
    for kernel in config.KERNELS
    for precision in (config.HALF, config.SINGLE, config.TF32)
]
HOPPER = Machine("sm_90", 132)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "kernel", "precision"), ENTRIES)
def test_shipped_kernels_fit_their_architecture(
    architecture: str, kernel: str, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [cell for cell in config.cells() if (cell.kernel, cell.precision) == (kernel, precision)]
    found = list(cost.rows(architecture, cells))
    with capsys.disabled():  # on stderr, which a worker of pytest-xdist shares with the terminal
        sys.stderr.write("".join(f"\n{line}  {wrong}".rstrip() for line, wrong in found) + "\n")
    assert len(found) == len(cells) * (2 if kernel == config.FEW_ROWS else 1)  # few rows have parts to add up
    assert not [f"{line}: {wrong}" for line, wrong in found if wrong]


def test_what_spills_is_said() -> None:
    """Tiles that are too large, so that it is known that a spill is seen at all; larger ones take long to compile."""
    cell = Cell(config.FORWARD, config.HALF, 64, config.PLAIN)
    before = config.use(config.table_of("sm_80").but(cell, Tiles(128, 128, 4, 1)))
    try:
        ((_, wrong),) = cost.rows("sm_80", [cell])
    finally:
        config.use(before)
    assert wrong.startswith("spills ")


def test_what_may_spill_was_measured_on_its_architecture() -> None:
    spilling = {
        (architecture, str(cell)): reason
        for architecture in config.ARCHITECTURES
        for cell, reason in config.Table.read(config.path_of(architecture)).spilling.items()
    }
    assert set(spilling) == {
        ("sm_90", "forward, half, 256, plain"),
        *(("sm_90", f"key and value gradients, half, {size}, plain") for size in (64, 128, 256)),
    }
    for reason in spilling.values():
        faster, slower = re.findall(r"([\d.]+) ms", reason)
        assert float(faster) < float(slower) and "H100" in reason


@pytest.mark.parametrize("logits", [config.PLAIN, config.EXTRA])
def test_a_kernel_is_compiled_once_for_all_lengths(logits: str) -> None:
    """Few queries have two more ways: keys split, or not."""
    variants: dict[str, set[str]] = {}
    lengths = [(2, 3), (2, 900), (3, 999), (8, 1024), (9, 100), (16, 16), (100, 7), (128, 4096), (1023, 1024)]
    for queries, keys in lengths:
        params = cost.example(Cell(config.MASK, config.HALF, 64, logits))
        query, key = (
            torch.empty(1, heads, length, 64, dtype=torch.bfloat16) for heads, length in ((4, queries), (2, keys))
        )
        mask = None if params.attn_mask is None else torch.empty(1, 4, queries, keys, requires_grad=True)
        params = replace(params, query=query, key=key, value=key, attn_mask=mask)
        wanted = cost.prepared(Cell(config.MASK, config.HALF, 64, logits), params, HOPPER)
        for launch, tensors in ((launch, each.tensors) for each in wanted for launch in each.launches):
            _, specialization, options = cost.specialised(launch, tensors, "sm_90")
            variants.setdefault(launch.kernel.__name__, set()).add(f"{specialization} {options}")
    assert len(variants) == (5 if logits == config.EXTRA else 4)
    assert len(variants.pop("forward_kernel")) == 3
    assert {name: len(each) for name, each in variants.items()} == dict.fromkeys(variants, 1)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", config.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_packed_sequences_launch_besides_fits_each_architecture(architecture: str, dtype: torch.dtype) -> None:
    """Parts that are added up, and rows that no sequence has, of out and of gradients whose heads come first.

    These rows are written 16 bytes at once.
    """
    query, key = (torch.empty(heads, 4096, 256, dtype=dtype).transpose(0, 1) for heads in (4, 2))
    bounds = torch.arange(0, 4097, 1024, dtype=torch.int32)
    few = SDPAParams(query[:4], key, key, scale=0.1, cu_seq_q=bounds // 1024, cu_seq_k=bounds, max_q=1, max_k=1024)
    many = replace(few, query=query, cu_seq_q=bounds, max_q=1024)
    machine, compiled = Machine(architecture, 132), set()
    for params in (few, many):
        plan = launches.forward(params, machine)
        tensors = plan.tensors(impl.tensors_of(params), query.device)
        wanted = [(launch, tensors) for launch in plan.launches[1:]]
        if params is many:
            out, lse, *statistics = (tensors[name] for name in plan.results)
            plan = launches.backward(params, machine, out, None, out, lse, *statistics)
            tensors = plan.tensors(tensors | {"grad_out": out}, query.device)
            wanted += [(launch, tensors) for launch in plan.launches[2:]]
        for launch, given in wanted:
            found = cost.cost(launch, given, architecture)
            assert found.spilled == 0
            assert not cost.does_not_fit(found, architecture)
            compiled.add(launch.kernel.__name__)
            if launch.kernel.__name__ == "clear_kernel":  # there may be as many such rows as there are others
                code = cost.compiled(launch, given, architecture).asm
                assert re.search(r"st\.global\.v4\.b32|store_dwordx4", code["amdgcn" if "amdgcn" in code else "ptx"])
    assert compiled == {"combine_kernel", "clear_kernel"}
