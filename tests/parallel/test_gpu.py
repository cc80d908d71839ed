"""One rank on NCCL: the same code as several ranks run, on the device that they have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from attnplug import parallel
from attnplug.testing import assert_right

pytestmark = pytest.mark.gpu


@pytest.fixture
def group() -> Iterator[Any]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def given(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("impl", ["aten_flash", None])  # `aten_flash` by its `partial_backward`
@pytest.mark.parametrize("method", ["ring", "ulysses"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_call_over_one_rank_is_the_call(group: Any, method: str, impl: str | None, is_causal: bool) -> None:
    tensors = given((2, 4, 192, 64), (2, 2, 192, 64), (2, 2, 192, 64))
    grad_out = torch.randn_like(tensors[0])
    call = parallel.ring_attention if method == "ring" else parallel.ulysses_attention
    out, lse = call(*tensors, group=group, is_causal=is_causal, enable_gqa=True, return_lse=True, impl=impl)
    out.backward(grad_out)
    names = ("query", "key", "value")
    arguments = dict(zip(names, (tensor.detach() for tensor in tensors), strict=True))
    assert_right(
        {**arguments, "is_causal": is_causal, "enable_gqa": True},
        out.detach(),
        lse.detach(),
        dict(zip(names, (tensor.grad for tensor in tensors), strict=True)),
        grad_out=grad_out,
    )


def test_packed_sequences_over_one_rank_are_the_call(group: Any) -> None:
    pytest.importorskip("attnplug_math_ref")
    tokens = given((65, 4, 64), (65, 2, 64), (65, 2, 64))
    starts = torch.tensor([0, 13, 33, 35, 65], dtype=torch.int32)
    out = parallel.ring_varlen_attn(*tokens, starts, group=group, is_causal=True, enable_gqa=True, impl="math_ref")
    on_device = starts.cuda()
    more = {"cu_seq_q": on_device, "cu_seq_k": on_device, "max_q": 30, "max_k": 30, "enable_gqa": True}
    arguments = dict(zip(("query", "key", "value"), (tensor.detach() for tensor in tokens), strict=True))
    assert_right({**arguments, **more, "is_causal": True}, out.detach())
