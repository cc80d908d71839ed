"""Joined tiles of the forward kernel for Hopper on such a GPU: the bits are those of tiles one after another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attnplug import CausalVariant, SDPAParams

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a GPU of compute capability 9.0",
    ),
]

LENGTHS = [(64, 64), (65, 1), (200, 1000), (1024, 1024), (1000, 1100), (2049, 700), (4224, 4224)]
CALLS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": dict(is_causal=True),
    "lower right": dict(is_causal=True, causal_variant=CausalVariant.LOWER_RIGHT),
    "narrow window": dict(window_size=(100, 30), causal_variant=CausalVariant.LOWER_RIGHT),
    "wide window": dict(window_size=(1500, 0), is_causal=True),
    "softcap": dict(softcap=2.0, is_causal=True),
    "negative scale": dict(scale=-0.3),
}
SEQUENCES = [(1, 5), (400, 700), (0, 10), (64, 200), (30, 0), (1024, 1024)]


def assert_same_bits(params: SDPAParams) -> None:
    """Assert that the results are equal, again and again, whatever a program's number of tiles is."""
    from attnplug_flash_triton import impl
    from attnplug_flash_triton.hopper import outputs
    from attnplug_flash_triton.problem import Machine, machine_of

    device, given = params.query.device, impl.tensors_of(params)
    want = outputs.forward(params, machine_of(device)).run(given, device)
    for machine in (machine_of(device), Machine("sm_90", 7)):
        plan = outputs.forward(params, machine, join=True)
        assert plan.launches[0].compiled_in["JOINED"] is outputs.can_join(params, machine)
        for _ in range(10):
            for one, other in zip(plan.run(given, device), want, strict=True):
                assert torch.equal(one, other)


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in shapes]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("size", [64, 128])
def test_joined_tiles_give_the_same_bits(size: int, name: str) -> None:
    for queries, keys in LENGTHS:
        query, key, value = tensors((2, 6, queries, size), (2, 3, keys, size), (2, 3, keys, size))
        params = SDPAParams(query, key, value, enable_gqa=True, **{"scale": size**-0.5} | CALLS[name])
        assert_same_bits(params)
        used = torch.tensor([keys // 3, keys], dtype=torch.int32, device="cuda")
        assert_same_bits(replace(params, seqused_k=used))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("size", [64, 128])
def test_joined_tiles_of_packed_sequences_give_the_same_bits(size: int, name: str) -> None:
    (queries, keys), starts = map(sum, zip(*SEQUENCES, strict=True)), []
    for lengths in zip(*SEQUENCES, strict=True):
        starts.append(torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).cuda())
    query, key, value = tensors((queries, 6, size), (keys, 3, size), (keys, 3, size))
    options = {"scale": size**-0.5, "max_q": 1024, "max_k": 1024} | CALLS[name]
    assert_same_bits(SDPAParams(query, key, value, enable_gqa=True, cu_seq_q=starts[0], cu_seq_k=starts[1], **options))
