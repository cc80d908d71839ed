"""DTensors sharded by batch or heads: opaque kernels run on each rank's share, and gradients come back sharded."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import attnplug
from attnplug import Capabilities, Feature, ImplSpec, SDPAParams, SDPBackend
from ranks import World

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
    assert out.placements == (placement,)
    torch.testing.assert_close((out.full_tensor(), lse.full_tensor()), (expected, expected_lse))
    gradients = torch.autograd.grad(expected.square().sum(), whole)
    found = torch.autograd.grad(out.square().sum(), shared)
    torch.testing.assert_close([gradient.full_tensor() for gradient in found], [*gradients], rtol=1e-4, atol=1e-5)


CASES = [(4, Shard(0), False), (4, Shard(1), True), (2, Shard(1), False), (1, Shard(1), False), (4, Replicate(), True)]
IMPLS = ["torch", "aten_flash", "aten_math", "math_ref", "opaque"]


def check_all() -> None:
    """Hold every implementation, a call of packed sequences, and a compiled call, against the whole ones."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for impl in IMPLS:
        for placement in (Shard(0), Shard(1)):
            shared = [distribute_tensor(torch.randn(4, 4, 5, 8), mesh, [placement]) for _ in range(3)]
            assert attnplug.explain(*shared, impl=impl).chosen == impl
            attend = functools.partial(attnplug.scaled_dot_product_attention, impl=impl)
            hold(attend, attnplug.scaled_dot_product_attention, shared)
            with attnplug.patch_torch(), attnplug.sdpa_kernel(impl), attnplug.record() as calls:
                hold(torch.nn.functional.scaled_dot_product_attention, attnplug.scaled_dot_product_attention, shared)
            assert calls[0].impl == impl
    hold_sinks_that_every_rank_has([distribute_tensor(torch.randn(4, 4, 5, 8), mesh, [Shard(0)]) for _ in range(3)])
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    packed = [distribute_tensor(torch.randn(12, 4, 8), mesh, [Shard(1)]) for _ in range(3)]
    attend = functools.partial(
        attnplug.varlen_attn, cu_seq_q=starts, cu_seq_k=starts, max_q=7, max_k=7, is_causal=True, impl="math_ref"
    )
    hold(attend, attend, packed)


def hold(attend: Any, reference: Any, shared: list[Any]) -> None:
    """Hold a call of DTensors, forward and backward, against a call of the whole tensors."""
    shared = [tensor.detach().requires_grad_() for tensor in shared]
    whole = [tensor.full_tensor().detach().requires_grad_() for tensor in shared]
    out, expected = attend(*shared), reference(*whole)
    assert isinstance(out, DTensor)
    assert out.placements == shared[0].placements
    torch.testing.assert_close(out.full_tensor(), expected)
    gradients = torch.autograd.grad(expected.square().sum(), whole)
    found = torch.autograd.grad(out.square().sum(), shared)
    torch.testing.assert_close([gradient.full_tensor() for gradient in found], [*gradients], rtol=1e-4, atol=1e-5)


def hold_sinks_that_every_rank_has(shared: list[Any]) -> None:
    """Hold the gradient of a plain tensor, to which each rank adds its share, against that of the whole call."""
    whole = [tensor.full_tensor() for tensor in shared]
    gradients = []
    for tensors in (shared, whole):
        sinks = torch.linspace(-1.0, 1.0, 4).requires_grad_()
        out = attnplug.scaled_dot_product_attention(*tensors, sinks=sinks, impl="math_ref")
        gradients += torch.autograd.grad(out.square().sum(), sinks)
    torch.testing.assert_close(*gradients)


def check_compiled() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shared = [distribute_tensor(torch.randn(4, 4, 5, 8), mesh, [Shard(1)]) for _ in range(3)]
    for impl in ("torch", "math_ref", "opaque"):
        attend = functools.partial(attnplug.scaled_dot_product_attention, impl=impl)
        hold(attend, attnplug.scaled_dot_product_attention, shared)
        hold(torch.compile(attend, fullgraph=True, backend="aot_eager"), attnplug.scaled_dot_product_attention, shared)


@pytest.fixture
def one_rank() -> Iterator[None]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    register()
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("kv_heads", "placement", "masked"), CASES)
def test_an_opaque_kernel_runs_on_dtensors(one_rank: None, kv_heads: int, placement: Any, masked: bool) -> None:
    pytest.importorskip("attnplug_math_ref")
    check(kv_heads, placement, masked)


def test_every_implementation_and_the_drop_in_run_on_dtensors_as_explain_says(one_rank: None) -> None:
    pytest.importorskip("attnplug_math_ref")
    check_all()


@pytest.mark.slow
def test_compiled_calls_of_dtensors_are_one_graph(one_rank: None) -> None:
    pytest.importorskip("attnplug_math_ref")
    check_compiled()


@pytest.mark.parametrize(("dim", "along"), [(2, "sequence"), (3, "head size")])
def test_shards_that_attention_cannot_be_cut_along_are_an_error(one_rank: None, dim: int, along: str) -> None:
    mesh = init_device_mesh("cpu", (1,))
    query = distribute_tensor(torch.randn(2, 4, 8, 8), mesh, [Shard(dim)])
    for ask in (attnplug.scaled_dot_product_attention, attnplug.explain):
        with pytest.raises(
            ValueError, match=f"query: got a DTensor that is sharded along the {along}; .* Redistribute"
        ):
            ask(query, query, query)
    packed, starts = distribute_tensor(torch.randn(8, 4, 8), mesh, [Shard(0)]), torch.tensor([0, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"sharded along the tokens; .*ring_varlen_attn"):
        attnplug.varlen_attn(packed, packed, packed, starts, starts, 8, 8)


def test_a_dtensor_is_not_taken_for_the_plain_tensor_of_a_call_before_it(one_rank: None) -> None:
    plain = torch.randn(2, 4, 8, 8)
    shared = distribute_tensor(plain, init_device_mesh("cpu", (1,)), [Shard(1)])
    for impl in (None, "aten_flash", "opaque"):
        for query in (plain, shared, plain, shared):
            out = attnplug.scaled_dot_product_attention(query, query, query, impl=impl)
            assert type(out) is type(query)


@pytest.mark.parametrize("impl", [None, "aten_math", "opaque"])
def test_a_dtensor_beside_a_plain_query_is_an_error(one_rank: None, impl: str | None) -> None:
    mesh, plain = init_device_mesh("cpu", (1,)), torch.randn(2, 4, 8, 8)
    shared = distribute_tensor(plain, mesh, [Shard(1)])
    mask, sinks = (distribute_tensor(torch.zeros(shape), mesh, [Replicate()]) for shape in ((1, 1, 8, 8), (4,)))
    attnplug.scaled_dot_product_attention(plain, plain, plain, impl=impl)  # which is recognised from then on
    for ask in (attnplug.scaled_dot_product_attention, attnplug.explain):
        with pytest.raises(ValueError, match="key: is a DTensor, and the query is not; distribute both, or neither"):
            ask(plain, shared, shared, impl=impl)
        with pytest.raises(ValueError, match="attn_mask: is a DTensor"):
            ask(plain, plain, plain, mask, impl=impl)
        with pytest.raises(ValueError, match="sinks: is a DTensor"):
            ask(plain, plain, plain, sinks=sinks, impl=impl)


def on_two_ranks() -> None:
    register()
    for case in CASES:
        check(*case)
    check_all()
    check_compiled()


@pytest.mark.slow
def test_two_ranks_each_run_their_share(tmp_path: Any) -> None:
    pytest.importorskip("attnplug_math_ref")
    world = World(2, tmp_path)
    try:
        world.run(on_two_ranks)
    finally:
        world.close()
