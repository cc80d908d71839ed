"""DTensors sharded by batch or heads: opaque kernels run on each rank's share, and gradients come back sharded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import attnplug
from attnplug import Capabilities, Feature, ImplSpec, SDPAParams, SDPBackend

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


class Opaque:
    """Attention that a DTensor cannot look into, with its backward."""

    def forward(self, params: SDPAParams) -> tuple[Tensor, Tensor]:
        assert type(params.query) is Tensor
        out, lse = attnplug.scaled_dot_product_attention(
            *(tensor.detach() for tensor in (params.query, params.key, params.value)),
            attn_mask=params.attn_mask,
            enable_gqa=params.enable_gqa,
            return_lse=True,
            impl="math_ref",
        )
        return out, lse

    def backward(self, params: SDPAParams, grad_out: Tensor, *_: Any) -> Any:
        tensors = [tensor.detach().requires_grad_() for tensor in (params.query, params.key, params.value)]
        with torch.enable_grad():
            out = attnplug.scaled_dot_product_attention(
                *tensors, attn_mask=params.attn_mask, enable_gqa=params.enable_gqa, impl="aten_math"
            )
            return torch.autograd.grad(out, tensors, grad_out)


FEATURES = (Feature.LSE, Feature.GQA, Feature.BOOLEAN_MASK)


def register() -> None:
    capabilities = Capabilities(features=FEATURES)
    attnplug.register_impl(
        ImplSpec(name="opaque", kernel=Opaque(), backend=SDPBackend.FLASH_ATTENTION, capabilities=capabilities)
    )


def check(kv_heads: int, placement: Any, masked: bool) -> None:
    """Hold a sharded call against the whole one, on this rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    query, key = torch.randn(4, 4, 5, 8), torch.randn(4, kv_heads, 5, 8)
    mask = torch.rand(4, 1, 5, 5) > 0.2 if masked else None
    whole = [tensor.clone().requires_grad_() for tensor in (query, key, key + 1)]
    shared = [distribute_tensor(tensor.detach(), mesh, [placement]).requires_grad_() for tensor in whole]
    arguments: dict[str, Any] = {"attn_mask": mask, "enable_gqa": kv_heads != 4, "return_lse": True}
    expected, expected_lse = attnplug.scaled_dot_product_attention(*whole, **arguments, impl="math_ref")
    out, lse = attnplug.scaled_dot_product_attention(*shared, **arguments, impl="opaque")
    assert isinstance(out, DTensor)
    torch.testing.assert_close((out.full_tensor(), lse.full_tensor()), (expected, expected_lse))
    gradients = torch.autograd.grad(expected.square().sum(), whole)
    found = torch.autograd.grad(out.square().sum(), shared)
    torch.testing.assert_close([gradient.full_tensor() for gradient in found], [*gradients], rtol=1e-4, atol=1e-5)


CASES = [(4, Shard(0), False), (4, Shard(1), True), (2, Shard(1), False), (1, Shard(1), False), (4, Replicate(), True)]


@pytest.fixture
def one_rank() -> Iterator[None]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("kv_heads", "placement", "masked"), CASES)
def test_an_opaque_kernel_runs_on_dtensors(one_rank: None, kv_heads: int, placement: Any, masked: bool) -> None:
    pytest.importorskip("attnplug_math_ref")
    register()
    check(kv_heads, placement, masked)


def _rank(rank: int, world: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    register()
    for case in CASES:
        check(*case)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_each_run_their_share(tmp_path: Any) -> None:
    pytest.importorskip("attnplug_math_ref")
    multiprocessing.spawn(_rank, args=(2, str(tmp_path / "store")), nprocs=2)
