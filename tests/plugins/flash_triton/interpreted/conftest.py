"""flash_triton computes what the contract says, in Triton's interpreter.

Triton decides between compiler and interpreter when kernels are defined, so these tests need a process of
their own: test_flash_triton.py starts one. By hand: `TRITON_INTERPRET=1 pytest` with this folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from interpreter import quickened


@pytest.fixture(autouse=True, scope="module")
def _small_tiles() -> Iterator[None]:
    """Tiles of 16, so that short sequences have several."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("runs in a process of its own, from test_flash_triton.py")
    from attnplug_flash_triton import config

    with quickened():
        before = config.use(config.Table.uniform(config.INTERPRETER, config.Tiles(16, 16, 1, 1)))
        yield
        config.use(before)


@pytest.fixture
def memory_is_nan() -> Iterator[None]:
    """Let new tensors hold NaN, as PyTorch does for those that ask for deterministic algorithms."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
