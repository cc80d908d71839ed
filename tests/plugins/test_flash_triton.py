"""flash_triton where it does not run: what it declines, with which reason, and what it needs.

That its results are right is tested in processes of their own, since Triton decides between its compiler
and its interpreter when kernels are defined.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attnplug

pytest.importorskip("triton")

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=HERE.parent.parent,
        check=False,
    )


@pytest.mark.skipif(INTERPRETED, reason="this process is the interpreter's already")
def test_results_are_right_in_the_interpreter() -> None:
    file = str(HERE / "test_flash_triton_interpreted.py")
    done = python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_listing_imports_neither_torch_nor_triton() -> None:
    code = (
        "import attnplug, sys; names = [record.name for record in attnplug.list_impls()];"
        "assert 'flash_triton' in names, names; assert not {'torch', 'triton'} & set(sys.modules)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(INTERPRETED, reason="CPU tensors are accepted in the interpreter")
def test_cpu_tensors_are_declined_outside_the_interpreter() -> None:
    query = torch.randn(1, 1, 4, 16)
    with pytest.raises(attnplug.NoImplementationError, match="TRITON_INTERPRET=1"):
        attnplug.scaled_dot_product_attention(query, query, query, impl="flash_triton")


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([torch.randn(1, 1, 4, 16, dtype=torch.float64)] * 3, "does not support float64"),
        ([torch.randn(1, 1, 4, 4)] * 3, "head size 4 is below 8"),
        ([torch.randn(1, 1, 4, 512)] * 3, "head size 512 is above 256"),
    ],
)
def test_what_the_kernels_do_not_do_is_declined_with_the_reason(tensors: list[torch.Tensor], reason: str) -> None:
    with pytest.raises(attnplug.NoImplementationError, match=reason):
        attnplug.scaled_dot_product_attention(*tensors, impl="flash_triton")


@pytest.mark.parametrize(
    ("release", "better", "wanted"),
    [
        ("12.8", None, ["ptxas 12.8 corrupts products on Hopper; point TRITON_PTXAS_PATH at ptxas 13.1 or later"]),
        ("13.0", "13.1", []),
        ("13.1", None, []),
    ],
)
def test_an_assembler_that_corrupts_products_is_replaced_or_declined(
    tmp_path: Path, release: str, better: str | None, wanted: list[str]
) -> None:
    """With stand-ins for ptxas, in a process of its own, because the setting belongs to the process."""
    paths = {}
    for name, version in (("ptxas", release), ("better", better)):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        paths[name] = str(path)
    code = (
        "from attnplug_flash_triton import toolchain; from triton import knobs;"
        f"toolchain._of_blackwell = lambda: {paths['better'] if better else ''!r};"
        "print(toolchain.use_good_ptxas()); print(knobs.nvidia.ptxas.path)"
    )
    done = python("-c", code, TRITON_PTXAS_PATH=paths["ptxas"])
    assert done.returncode == 0, done.stderr
    reasons, used = done.stdout.splitlines()
    assert reasons.startswith(repr(wanted)[:-2]) if wanted else reasons == "[]"
    assert used == paths["better" if better else "ptxas"]
