"""flash_triton where it does not run: what it declines, with which reason, and what it needs.

That its results are right is tested in processes of their own, since Triton decides between its compiler
and its interpreter when kernels are defined.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attnplug
import attnplug_flash_triton
import forked

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
TESTS = HERE.parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def python(*arguments: str, program: str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=TESTS.parent,
        check=False,
    )


# Why a check of a quick run is left out; any other reason would be an oversight.
LEFT_OUT = {
    "part of a full run only",
    "does not declare NESTED",
    "does not declare SECOND_DERIVATIVES",
    "does not declare float64",
    "is made for float32 alone",  # in the run for float16
    "has no gradients for paged keys and values",
}


@pytest.mark.slow(first=True)
@pytest.mark.skipif(INTERPRETED, reason="this process is the interpreter's already")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_conformance_kit_passes_in_the_interpreter(dtype: str) -> None:
    done = python(str(TESTS / "support" / "interpreter.py"), dtype, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-8000:]
    report = json.loads(done.stdout)
    failed = [f"{result['check']}: {result['reason']}" for result in report["results"] if result["status"] == "failed"]
    assert report["passed"], "\n\n".join(failed)
    reasons = {result["reason"].partition(" -- ")[0] for result in report["results"] if result["status"] != "passed"}
    assert reasons <= LEFT_OUT


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this process is the interpreter's already")
def test_results_are_right_in_the_interpreter() -> None:
    folder = str(HERE / "interpreted")
    done = python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", folder, TRITON_INTERPRET="1")
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
    with pytest.raises(attnplug.NoImplementationError, match="runs on cuda; the call is on cpu"):
        attnplug.scaled_dot_product_attention(query, query, query, impl="flash_triton")


def test_a_gpu_that_is_too_old_is_declined_with_what_it_lacks() -> None:
    with FakeTensorMode():
        query = torch.empty(1, 1, 4, 16, dtype=torch.float16, device="cuda")
    params = attnplug.SDPAParams(query, query, query)
    reasons = attnplug.can_use_impl("flash_triton", params, compute_capability=(7, 5)).reasons
    assert reasons == ("needs compute capability 8.0 or later, found 7.5",)


RELEASE = ".".join(triton.__version__.split(".")[:2])
PIPELINE = "a pipeline across tiles of queries"
OWN, PLAIN = "forward runs on Hopper's own kernels", "forward runs on the plain kernels, not on Hopper's own: "


@pytest.mark.parametrize(
    ("gpu", "wish", "options", "said"),
    [
        (
            (9, 0),
            "",
            {},
            [
                f"{OWN}; {PIPELINE} is not yet proven on sm_90, FLASH_TRITON_HOPPER=1 uses it",
                OWN.replace("forward", "backward"),
            ],
        ),
        ((9, 0), "1", {}, [f"{OWN}; FLASH_TRITON_HOPPER=1 uses {PIPELINE}, not yet proven on sm_90"]),
        ((9, 0), "", {"size": 256}, [OWN]),
        ((9, 0), "", {"dropout_p": 0.1}, [f"{PLAIN}has no dropout"]),
        ((9, 0), "0", {}, [f"{PLAIN}FLASH_TRITON_HOPPER=0 keeps Hopper's own kernels from running"]),
        ((9, 0), "another Triton", {"size": 256}, [f"{OWN}, proven with Triton 3.0; this is {RELEASE}"]),
        ((8, 0), "", {}, []),
    ],
)
def test_explain_says_which_kernels_run_and_why(
    monkeypatch: pytest.MonkeyPatch, gpu: tuple[int, int], wish: str, options: dict[str, Any], said: list[str]
) -> None:
    from attnplug_flash_triton import toolchain
    from attnplug_flash_triton.hopper import choose

    monkeypatch.setattr(toolchain, "reasons", lambda device: [])
    monkeypatch.setenv("FLASH_TRITON_HOPPER", wish if wish in ("0", "1") else "")
    monkeypatch.setattr(choose, "PROVEN_WITH", "3.0" if wish == "another Triton" else RELEASE)
    with FakeTensorMode():
        shape = (1, 4, 512, options.get("size", 64))
        query = torch.empty(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        options = {name: value for name, value in options.items() if name != "size"}
        found = attnplug.explain(query, query, query, impl="flash_triton", compute_capability=gpu, **options)
    assert found.chosen == "flash_triton"
    assert list(found.candidates[0].notes[: len(said)]) == said
    assert len(found.candidates[0].notes) == (2 if said else 0)


def test_on_a_gpu_it_comes_before_the_older_kernels_and_in_the_interpreter_behind_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    older = next(record.priority for record in attnplug.list_impls() if record.name == "aten_flash")
    for interpreted in ("", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        (spec,) = attnplug_flash_triton.attnplug_register_impls()
        assert (spec.priority > older) is not bool(interpreted)


@pytest.mark.parametrize(
    ("release", "better", "wanted"),
    [
        (
            "12.8",
            None,
            ("ptxas 12.8 corrupts products on Hopper; install triton 3.7 or later, or nvidia-cuda-nvcc 13.1",),
        ),
        ("13.0", "13.1", ()),
        ("13.1", None, ()),
    ],
)
def test_an_assembler_that_corrupts_products_is_replaced_or_declined(
    tmp_path: Path, release: str, better: str | None, wanted: tuple[str, ...]
) -> None:
    """With stand-ins for ptxas, in a process of its own, because the setting belongs to the process."""
    paths = {}
    for name, version in (("ptxas", release), ("better", better)):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        paths[name] = str(path)
    code = (
        "import attnplug, torch; from attnplug_flash_triton import toolchain; from triton import knobs;"
        "from torch._subclasses.fake_tensor import FakeTensorMode;"
        f"toolchain._others = lambda: {[paths['better']] if better else []!r};"
        "mode = FakeTensorMode(); mode.__enter__(); query = torch.empty(1, 1, 4, 16, device='cuda');"
        "mode.__exit__(None, None, None); params = attnplug.SDPAParams(query, query, query);"
        "print(attnplug.can_use_impl('flash_triton', params, compute_capability=(9, 0)).reasons);"
        "print(attnplug.can_use_impl('flash_triton', params, compute_capability=(8, 0)).reasons);"
        "toolchain.use_good_ptxas(); print(knobs.nvidia.ptxas.path)"
    )
    done = python("-c", code, program=forked.python("dynamo"), TRITON_PTXAS_PATH=paths["ptxas"])
    assert done.returncode == 0, done.stderr
    on_hopper, on_ampere, used = done.stdout.splitlines()
    assert on_hopper.startswith(repr(wanted)[:-3]) if wanted else on_hopper == "()"
    assert on_ampere == "()"
    assert used == paths["better" if better else "ptxas"]
