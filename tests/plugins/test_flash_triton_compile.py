"""Every configuration that flash_triton ships compiles for its architecture, without a card.

What is compiled is what a call would launch: the launches of real calls are recorded, and their arguments
specialised as Triton specialises them. Registers are counted by the assembler; a spilled one fails, and so
does more shared memory than the architecture has.

The whole table takes many minutes and is checked with `FLASH_TRITON_COMPILE=all`; by default only half
precision without extra work on the logits.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attnplug import CausalVariant, SDPAParams

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles nothing under TRITON_INTERPRET=1", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from attnplug_flash_triton import config, impl, problem, toolchain  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = (
    "forward_kernel",
    "query_gradient_kernel",
    "key_value_gradient_kernel",
    "mask_gradient_kernel",
    "combine_kernel",
)
ALL = os.environ.get("FLASH_TRITON_COMPILE") == "all"
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Recorder:
    """Stands for a kernel: notes what it is launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The launches of whatever calls the test makes; nothing runs."""
    recorded: list[Launch] = []
    for name in KERNELS:
        monkeypatch.setattr(impl, name, Recorder(getattr(impl, name), recorded))
    return recorded


def call(params: SDPAParams) -> None:
    out, lse, *saved = impl.forward(params)
    impl.backward(params, torch.empty_like(out), None, out, lse, *saved)


def params_of(dtype: torch.dtype, size: int, extra: bool, queries: int = 64, keys: int = 64) -> SDPAParams:
    query, key = torch.empty(1, 4, queries, size, dtype=dtype), torch.empty(1, 2, keys, size, dtype=dtype)
    arguments: dict[str, Any] = {}
    if extra:
        arguments = {
            "attn_mask": torch.empty(1, 4, queries, keys, dtype=dtype, requires_grad=True),
            "dropout": 0.1,
            "softcap": 2.0,
            "alibi_slopes": torch.empty(4),
            "window_size": (5, 5),
            "sinks": torch.empty(4),
        }
    return SDPAParams(
        query,
        key,
        key,
        is_causal=True,
        enable_gqa=True,
        scale=0.1,
        causal_variant=CausalVariant.LOWER_RIGHT,
        **arguments,
    )


def specialised(launch: Launch, target: GPUTarget) -> tuple[Any, Any, Any, dict[str, Any]]:
    kernel, args, kwargs = launch
    backend = make_backend(target)
    kwargs = {**kwargs, "debug": False, "instrumentation_mode": ""}
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **kwargs
    )
    return bound, specialization, options, kwargs


def compiled(launch: Launch, target: GPUTarget) -> Any:
    kernel = launch[0]
    bound, specialization, options, kwargs = specialised(launch, target)
    options, signature, constants, attributes = kernel._pack_args(
        make_backend(target), kwargs, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def registers_and_spills(kernel: Any, target: GPUTarget) -> tuple[int, int]:
    """Return the registers of one thread, and what does not fit them: bytes, or on AMD registers."""
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        return tuple(int(re.search(rf"\.vgpr_{what}:\s+(\d+)", text)[1]) for what in ("count", "spill_count"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def cells() -> Iterator[Any]:
    for architecture in config.ARCHITECTURES:
        for dtype in (torch.bfloat16, torch.float32):
            for size in config.SIZES:
                for extra in (False, True):
                    name = f"{architecture}-{str(dtype)[6:]}-{size}-{'extra' if extra else 'plain'}"
                    wanted = ALL or (dtype == torch.bfloat16 and not extra)
                    skip = pytest.mark.skipif(not wanted, reason="takes minutes; FLASH_TRITON_COMPILE=all")
                    yield pytest.param(architecture, dtype, size, extra, id=name, marks=skip)


@pytest.mark.parametrize(("architecture", "dtype", "size", "extra"), list(cells()))
def test_shipped_kernels_fit_their_architecture(
    architecture: str,
    dtype: torch.dtype,
    size: int,
    extra: bool,
    launches: list[Launch],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if architecture == "sm_90":
        assert not toolchain.use_good_ptxas()
    monkeypatch.setattr(problem, "architecture", lambda device: architecture)
    monkeypatch.setattr(problem, "processors", lambda device: 132)
    call(params_of(dtype, size, extra))
    impl.forward(params_of(dtype, size, extra, queries=1, keys=4096))
    assert len(launches) == 5 + extra  # few queries have two kernels, one of them to add up parts of the keys
    target, bad = TARGETS[architecture], []
    for launch in launches:
        kernel, _, arguments = launch
        binary = compiled(launch, target)
        registers, spilled = registers_and_spills(binary, target)
        shared = binary.metadata.shared
        row = (
            f"{architecture:7}{str(dtype)[6:]:9}{size:4} {'extra' if extra else 'plain'} {kernel.__name__:26}"
            f"{arguments.get('BLOCK_M', 1):4} x{arguments.get('BLOCK_N', 64):4} {binary.metadata.num_warps} warps "
            f"{binary.metadata.num_stages} stages {registers:4} registers {spilled:5} spilled {shared:7} bytes shared"
        )
        with capsys.disabled():
            sys.stdout.write(f"\n{row}")
        if spilled > config.KNOWN_SPILLS.get((kernel.__name__, str(dtype)[6:], size), 0):
            bad.append(row)
        if shared > config.SHARED_MEMORY[architecture]:
            bad.append(row)
    assert not bad


@pytest.mark.parametrize("extra", [False, True])
def test_a_kernel_is_compiled_once_for_all_lengths(
    extra: bool, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, where few queries have a way of their own: keys split, or not."""
    monkeypatch.setattr(problem, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(problem, "processors", lambda device: 132)
    lengths = [(2, 3), (2, 900), (3, 999), (8, 1024), (9, 100), (16, 16), (100, 7), (128, 4096), (1023, 1024)]
    for queries, keys in lengths:
        call(params_of(torch.bfloat16, 64, extra, queries, keys))
    keys_by_kernel: dict[str, set[str]] = {}
    for launch in launches:
        _, specialization, options, _ = specialised(launch, TARGETS["sm_90"])
        keys_by_kernel.setdefault(launch[0].__name__, set()).add(f"{specialization} {options}")
    assert len(keys_by_kernel) == 4 + extra
    assert len(keys_by_kernel.pop("forward_kernel")) == 3  # many queries; few; few, keys split
    assert {name: len(keys) for name, keys in keys_by_kernel.items()} == dict.fromkeys(keys_by_kernel, 1)


def test_every_head_size_has_a_configuration() -> None:
    for architecture in config.ARCHITECTURES:
        for kernel in config.KERNELS:
            for itemsize in (2, 4):
                for extra in (False, True):
                    for size in range(1, 257):
                        tiles = config.choose(architecture, kernel, itemsize, size, extra)
                        assert min(tiles.block_m, tiles.block_n) >= 16
