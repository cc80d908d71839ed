"""flash_triton's tables of tiles, and the command that measures them: on a GPU, or here in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import forked
from attnplug_flash_triton import config
from attnplug_flash_triton.config import Cell, Table, Tiles
from attnplug_flash_triton.tune import climb, neighbours

CELL = Cell(config.FORWARD, config.HALF, 64, config.PLAIN)


def interpreted(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", **environment}
    return subprocess.run([forked.python(), *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("architecture", config.ARCHITECTURES)
def test_every_call_finds_its_tiles(architecture: str) -> None:
    table = config.table_of(architecture)
    for kernel in config.KERNELS:
        for precision in (config.HALF, config.SINGLE, config.TF32):
            for extra in (True,) if kernel == config.MASK else (False, True):
                for size in range(1, 257):
                    assert isinstance(table.choose(kernel, precision, size, extra), Tiles)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    table = config.table_of("sm_90").but(CELL, Tiles(32, 16, 2, 5), "2 ms, 3 ms before")
    table.write(tmp_path / "table.json")
    assert Table.read(tmp_path / "table.json") == table
    assert table.choose(config.FORWARD, config.HALF, 33, False) == Tiles(32, 16, 2, 5)


def edited(path: Path, change: Any) -> Path:
    config.table_of("sm_90").write(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["tiles"].pop(str(CELL)), "missing: forward, half, 64, plain"),
        (lambda content: content["tiles"].update(backward={}), "unknown: backward"),
        (lambda content: content["spilling"].update(backward=""), "unknown: backward"),
        (lambda content: content.update(architecture="sm_70"), "'sm_70' is not one of sm_80, sm_90"),
        (
            lambda content: content["tiles"][str(CELL)].update(block_m=100),
            "64, plain: block_m 100 is not one of 16, 32",
        ),
        (lambda content: content["tiles"].update({str(CELL): [1, 2]}), r"expected block_m, block_n, .* got \[1, 2\]"),
        (lambda content: content.pop("measured"), "not a table of tiles: KeyError: 'measured'"),
    ],
    ids=["missing", "unknown", "unknown spill", "architecture", "out of range", "no tiles", "no origin"],
)
def test_a_file_that_is_no_table_is_refused_with_what_is_wrong(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Table.read(edited(tmp_path / "table.json", change))


def test_a_table_for_the_release_at_work_goes_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "FOLDER", tmp_path)
    general, own = tmp_path / "sm_90.json", tmp_path / f"sm_90-triton{config.release()}.json"
    (tmp_path / "sm_90-triton0.1.json").touch()
    assert config.path_of("sm_90") == general
    own.touch()
    assert config.path_of("sm_90") == own


def test_climbing_ends_where_no_neighbour_is_faster() -> None:
    def milliseconds(tiles: Tiles) -> float:
        if tiles.block_m == 256:
            return float("inf")  # spills
        return (
            abs(tiles.block_m - 200) // 16 + abs(tiles.block_n - 64) // 16 + abs(tiles.num_warps - 8) + tiles.num_stages
        )

    assert climb(Tiles(16, 16, 1, 4), milliseconds) == Tiles(128, 64, 8, 1)


def test_climbing_takes_noise_for_none() -> None:
    start = Tiles(64, 64, 4, 2)
    assert climb(start, lambda tiles: 1.0 if tiles == start else 0.99) == start
    assert all(tiles != start for tiles in neighbours(start))


def test_tuning_writes_the_table_that_calls_then_use(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    done = interpreted("-m", "attnplug_flash_triton.tune", "--only", str(CELL), "--write", str(path))
    assert done.returncode == 0, done.stderr
    assert f"written: {path}" in done.stdout and done.stdout.startswith(str(CELL))
    table = Table.read(path)
    assert table.architecture == config.INTERPRETER and "no GPU" in table.measured

    table.but(CELL, Tiles(16, 128, 1, 1)).write(path)
    code = (
        "import torch, attnplug; from attnplug_flash_triton.plans import Launch;"
        "query = torch.randn(1, 1, 40, 64).half();"
        "run = Launch.run;"
        "Launch.run = lambda *given: (print(given[0].programs, given[0].compiled_in['BLOCK_N']), run(*given));"
        "attnplug.scaled_dot_product_attention(query, query, query, impl='flash_triton')"
    )
    done = interpreted("-c", code, FLASH_TRITON_TABLE=str(path))
    assert done.stdout.split() == ["3", "128"], done.stderr


def test_a_table_that_is_none_breaks_the_implementation_with_the_reason(tmp_path: Path) -> None:
    code = (
        "import torch, attnplug; query = torch.randn(1, 1, 4, 16);"
        "attnplug.can_use_impl('flash_triton', attnplug.SDPAParams(query, query, query));"
        "print({record.name: record for record in attnplug.list_impls()}['flash_triton'].reason)"
    )
    done = interpreted("-c", code, FLASH_TRITON_TABLE=str(tmp_path / "none.json"))
    assert "ValueError: FLASH_TRITON_TABLE:" in done.stdout and "none.json is not a table" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "interpreter", "message"),
    [
        ([], "0", "needs a GPU; or, to see that it works, TRITON_INTERPRET=1"),
        (["--only", "nothing"], "1", "--only: no entry's name contains 'nothing'; one is forward, half, 64, plain"),
    ],
)
def test_tuning_says_what_it_needs(arguments: list[str], interpreter: str, message: str) -> None:
    done = interpreted(
        "-m", "attnplug_flash_triton.tune", *arguments, TRITON_INTERPRET=interpreter, CUDA_VISIBLE_DEVICES=""
    )
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
