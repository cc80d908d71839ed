"""PyTorch's own tests of attention end with the drop-in in place as they end without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytorch_tests import PATCH, differences

pytestmark = pytest.mark.slow
FILE = os.environ.get("PYTORCH_TESTS", "")


@pytest.mark.skipif(not FILE, reason="PYTORCH_TESTS does not name a copy of PyTorch's test/test_transformers.py")
@pytest.mark.parametrize("wanted", [PATCH, "torch", "aten_flash", "aten_math", "math_ref", "flex"])
def test_they_end_as_they_do_without_but_for_what_is_documented(wanted: str) -> None:
    unexplained = [test for test, why in differences(Path(FILE).resolve(), wanted).items() if not why]
    assert not unexplained, "\n".join(unexplained)


def test_one_that_ends_otherwise_would_be_found(tmp_path: Path) -> None:
    file = tmp_path / "test_transformers.py"
    file.write_text(
        "import torch\n"
        "def test_is_pytorch_s_own(): assert torch.nn.functional.scaled_dot_product_attention is torch._C._nn."
        "scaled_dot_product_attention\n"
        "def test_is_nothing_else(): pass\n"
    )
    assert differences(file, PATCH) == {"test_is_pytorch_s_own: passed without, failed with it": ""}
