"""FlashAttention 3 and 4 as PyTorch's registry has them: what they decline, and which package they need."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attnplug


class TestProvidersOfPyTorch:
    """FA3 and FA4 decline beforehand what PyTorch's `_fa3.py` and `_fa4.py` refuse in the middle of a call."""

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("flash_attn_interface", "flash_attn", "flash_attn.cute"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    @staticmethod
    def reasons(name: str, gpu: tuple[int, int], size: int = 64, **options: Any) -> tuple[str, ...]:
        with FakeTensorMode():
            query = torch.empty(1, 2, 128, size, dtype=torch.float16, device="cuda")
        params = attnplug.SDPAParams(query, query, query, **options)
        found = attnplug.can_use_impl(name, params, compute_capability=gpu).reasons
        return tuple(reason for reason in found if not reason.startswith("overrides"))  # which activation mends

    @pytest.mark.parametrize(("name", "majors"), [("FA3", {9}), ("FA4", {9, 10})])
    @pytest.mark.parametrize("gpu", [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)], ids=str)
    def test_runs_on_these_gpus_alone(self, name: str, majors: set[int], gpu: tuple[int, int]) -> None:
        found = self.reasons(name, gpu)
        assert (found == ()) == (gpu[0] in majors)
        assert all("compute capability" in reason for reason in found)

    @pytest.mark.parametrize("name", ["FA3", "FA4"])
    def test_has_no_dropout(self, name: str) -> None:
        assert self.reasons(name, (9, 0), dropout=0.5) == ("does not support dropout",)

    def test_head_sizes_of_fa4_follow_the_gpu(self) -> None:
        assert self.reasons("FA4", (9, 0), size=192) == self.reasons("FA4", (10, 0), size=256) == ()
        assert "head size 192" in self.reasons("FA4", (10, 0), size=192)[0]


def test_the_package_of_flash_attention_2_does_not_make_fa4_look_installed(
    monkeypatch: pytest.MonkeyPatch, on_devices: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise RuntimeError('imported in vain')")
    monkeypatch.syspath_prepend(str(tmp_path))
    on_devices("cpu", "cuda")
    reason = {record.name: record.reason for record in attnplug.list_impls()}["FA4"]
    assert reason.startswith("needs flash_attn.cute, not installed")
    (tmp_path / "flash_attn" / "cute").mkdir()
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    importlib.invalidate_caches()
    reason = {record.name: record.reason for record in attnplug.list_impls()}["FA4"]
    assert "flash_attn" not in reason
