"""What flash_triton launches, written down by a driver that stands for Triton's.

Kernels are compiled for a Hopper GPU, of which there need be none.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from attnplug import CausalVariant, SDPAParams
from attnplug_flash_triton import impl, plans
from attnplug_flash_triton.problem import Machine

HOPPER = Machine("sm_90", 132)
HEADS = (4, 2)


class Driver:
    """A driver of Triton that writes down what it is to launch: the compiled kernel, the grid, stream and arguments."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.stream = self.device = 0
        self.maps: list[tuple[Any, ...]] = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (0, f"{name} on {self.device}", 0, 0, 1024),
            build_signature_metadata=tuple,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
            launch=lambda *given: self.launched.append(given),
            fill_tma_descriptor_tiled=self.map_of,
            fill_tma_descriptor=self.map_of,
        )

    def map_of(self, *given: Any) -> Any:
        self.maps.append(given)
        return ("map", given[0])

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        identity = (src.fn.__name__, str(src.signature), str(src.attrs), str(src.constants))

        def launcher(*given: Any) -> None:
            x, y, z, stream, function, _metadata, _of_launch, _enter, _exit, *arguments = given
            self.launched.append(((*identity, function), (x, y, z), stream, *map(plain, arguments)))

        return launcher


def plain(argument: Any) -> Any:
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Put a driver in the place of Triton's own, and a Hopper GPU in that of the device, without the family for it."""
    stub = Driver()
    monkeypatch.setattr(driver, "_active", stub)  # first, so that it is there until the last kernel is unloaded
    kernels = [getattr(impl.launches, name) for name in dir(impl.launches) if name.endswith("_kernel")]
    for kernel in kernels:  # what was compiled for another driver has its launcher
        monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    monkeypatch.setattr(impl, "machine_of", lambda device: HOPPER)
    monkeypatch.setattr(impl, "family_for", lambda params, machine: impl.launches)  # what every GPU has
    monkeypatch.setattr(impl, "_plans", {})
    monkeypatch.setattr(impl, "_growing", {})
    monkeypatch.setattr(plans, "_compiled", {})
    return stub


def tensors(*lengths: int, heads: tuple[int, int] = (2, 2), dtype: torch.dtype = torch.float16) -> list[Tensor]:
    queries, keys = lengths
    shapes = ((1, heads[0], queries, 64), (1, heads[1], keys, 64), (1, heads[1], keys, 64))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def packed(query: Tensor, key: Tensor, value: Tensor) -> SDPAParams:
    ends = torch.tensor([0, 3, query.shape[2]], dtype=torch.int32)
    tokens = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    lengths = dict(cu_seq_q=ends, cu_seq_k=ends, max_q=query.shape[2], max_k=query.shape[2])
    return SDPAParams(*tokens, scale=0.1, causal_variant=CausalVariant.LOWER_RIGHT, **lengths)


def numbered(launched: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return launches with the first pointer that appears as 0, the next as 1, and so on."""
    seen: dict[int, str] = {}
    return [
        tuple(
            seen.setdefault(item, f"pointer {len(seen)}") if isinstance(item, int) and item > 2**32 else item
            for item in launch
        )
        for launch in launched
    ]


def prepared(params: SDPAParams) -> Any:
    run = impl.prepare(params)
    assert run is not None
    return run


def prepared_packed(params: SDPAParams) -> Any:
    run = impl.prepare_packed(params)
    assert run is not None
    return run


def besides_of(params: SDPAParams) -> tuple[Tensor | None, ...]:
    besides = params.sinks, params.alibi_slopes, params.seqused_k, params.block_table
    return params.cu_seq_q, params.cu_seq_k, *besides


def shifted_like(tensor: Tensor) -> Tensor:
    """Return a tensor that starts at an odd address."""
    return torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)


def paged(length: int, table: Tensor | None = None, **options: Any) -> SDPAParams:
    """Return a call of two sequences of one query each, whose keys are in pages of 16."""
    query, (key, value) = torch.ones(2, HEADS[0], 64, dtype=torch.float16), torch.randn(2, 512, 16, 2, 64).half()
    of_sequences = dict(
        cu_seq_q=torch.arange(3, dtype=torch.int32),
        seqused_k=torch.tensor([length, 1], dtype=torch.int32),
        block_table=torch.zeros(2, 256, dtype=torch.int32) if table is None else table,
    )
    options = dict(max_q=1, max_k=length, causal_variant=CausalVariant.LOWER_RIGHT) | options
    return SDPAParams(query, key, value, enable_gqa=True, scale=0.1, **of_sequences, **options)
