"""Calls on a GPU that is not there are each one graph: what a trace asks of a CUDA tensor, it may ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import attnplug
from attnplug import CausalVariant, SDPAParams
from attnplug._call import device

IMPLS = ["torch", "aten_flash", "flash_triton", "efficient_cuda", "cudnn"]
HOPPER, CUDNN = (9, 0), 91900


def new(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype)


def square(**options: Any) -> tuple[list[Tensor], dict[str, Any]]:
    return [new(2, 4, 64, 64) for _ in range(3)], options


def masked(*shape: int, dtype: torch.dtype = torch.float16) -> tuple[list[Tensor], dict[str, Any]]:
    return [*square()[0], new(*shape, dtype=dtype)], {}


CALLS: dict[str, Callable[[], tuple[list[Tensor], dict[str, Any]]]] = {
    "plain": square,
    "causal": lambda: square(is_causal=True),
    "a mask": lambda: masked(2, 1, 64, 64),
    "a mask with one column": lambda: masked(2, 4, 64, 1),
    "a boolean mask": lambda: masked(64, 64, dtype=torch.bool),
    "dropout": lambda: square(dropout_p=0.25),
    "lse": lambda: square(return_lse=True),
    "a negative scale under a causal mask": lambda: square(is_causal=True, scale=-0.3),
    "one query": lambda: ([new(2, 4, 1, 64), *square()[0][1:]], {}),
    "grouped queries": lambda: ([new(2, 4, 64, 64), new(2, 2, 64, 64), new(2, 2, 64, 64)], {"enable_gqa": True}),
    "fewer queries than keys": lambda: (
        [new(2, 4, 32, 64), *square()[0][1:]],
        {"is_causal": True, "causal_variant": CausalVariant.LOWER_RIGHT},
    ),
    "three dimensions": lambda: ([new(4, 64, 64) for _ in range(3)], {}),
}


@pytest.fixture(autouse=True)
def _on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnplug._registry.registry.device_types", lambda: {"cpu", "cuda"})
    monkeypatch.setattr(device._thread, "described", HOPPER)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: CUDNN)
    monkeypatch.setitem(device._cudnn_errs, 0, (False, True, True))


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_call_on_a_gpu_is_one_graph(impl: str, call: str) -> None:
    if impl not in attnplug.list_flash_attention_impls():
        pytest.skip(f"{impl} is not installed")

    def attend(*tensors: Tensor) -> Any:
        return attnplug.scaled_dot_product_attention(*tensors, impl=impl, **options)

    with FakeTensorMode(), torch.no_grad():  # without a driver there is no autograd of CUDA tensors
        tensors, options = CALLS[call]()
        described = dict(options)
        described["dropout"] = described.pop("dropout_p", 0.0)
        if tensors[0].dim() == 4:
            params = SDPAParams(*tensors, **described)
            if not (verdict := attnplug.can_use_impl(impl, params, compute_capability=HOPPER)):
                pytest.skip("; ".join(verdict.reasons))
        returned = torch.compile(attend, backend="eager", fullgraph=True)(*tensors)
        out = returned[0] if options.get("return_lse") else returned
    assert out.shape == tensors[0].shape and out.is_cuda
