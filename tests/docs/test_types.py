"""`mypy --strict` passes on what users and authors write: a program with every public name, the scaffolds, the page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import attnplug
from attnplug.cli import main
from pages import blocks

PROGRAM = Path(__file__).with_name("typed_program.py")


def mypy(cache: Path, folder: Path, *files: str | Path) -> str:
    """Return what mypy says of `files`; Triton's scaffold has the settings for kernels that have no types."""
    settings = ["--strict", "--cache-dir", str(cache), "--config-file", "with_triton/pyproject.toml"]
    command = [sys.executable, "-m", "mypy", *settings, *map(str, files)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600).stdout


@pytest.fixture(scope="module")
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What mypy says, in one run, which the next one takes most of from its cache."""
    pytest.importorskip("mypy", reason="types are checked with mypy")
    folder = tmp_path_factory.mktemp("typed")
    scaffolds = {"in_torch": "--torch", "with_triton": "--triton", "in_cuda": "--cuda"}
    for name, flavour in scaffolds.items():
        assert main(["new", name, flavour, "--directory", str(folder)]) == 0
    page = folder / "page"
    page.mkdir()
    snippets = []
    for block in blocks("first-plugin.md"):
        if block.title.endswith(".py"):
            file = page / block.title
            file.parent.mkdir(exist_ok=True)
            file.write_text(block.source)
        elif block.language == "python":
            snippets.append(block.source)
    (page / "shown.py").write_text("\n".join(snippets))
    wrong = "import attnplug, torch\nx = torch.ones(1)\nwrong: int = attnplug.scaled_dot_product_attention(x, x, x)\n"
    (folder / "wrong.py").write_text(wrong)
    packages = [folder / name / name for name in scaffolds]
    tests = folder / "in_torch" / "tests" / "test_conformance.py"
    shown = [page / "shown.py", page / "my_kernel"]
    kept = request.config.cache  # `-p no:cacheprovider` leaves None
    return mypy(kept.mkdir("mypy") if kept else folder / "cache", folder, PROGRAM, "wrong.py", *packages, tests, *shown)


def test_public_names_are_typed_and_so_are_scaffolds_and_the_first_plugin(said: str) -> None:
    errors = [line for line in said.splitlines() if re.search(r": (error|note): ", line)]
    assert [line for line in errors if not line.startswith("wrong.py:3: error: Incompatible types")] == [], said


def test_a_wrong_type_would_be_seen(said: str) -> None:
    assert re.search(r"wrong.py:3: error: Incompatible types in assignment .*Tensor", said), said


def test_the_typed_program_uses_every_public_name() -> None:
    words = set(re.findall(r"\w+", PROGRAM.read_text()))
    assert set(attnplug.__all__) - words == set()
