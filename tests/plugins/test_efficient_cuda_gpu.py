"""`efficient_cuda` and `cudnn` on a card: the conformance kit in full, and what no emulation can tell."""

from __future__ import annotations

import pytest
import torch

import attnplug

plugin = pytest.importorskip("attnplug_efficient_cuda", reason="attnplug-efficient-cuda is not installed")
from attnplug.testing import check_impl  # noqa: E402

pytestmark = pytest.mark.gpu
SPECS = {spec.name: spec for spec in plugin.attnplug_register_impls()}


@pytest.fixture(autouse=True)
def _registered() -> None:
    for name, spec in SPECS.items():
        if name not in attnplug.list_flash_attention_impls():
            attnplug.register_impl(spec)


def make(*shape: int, dtype: torch.dtype = torch.float16, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda", requires_grad=grad)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_conformance_in_full(name: str) -> None:
    report = check_impl(name, device="cuda", level="full")
    assert report.passed, str(report)


@pytest.mark.parametrize("name", sorted(SPECS))
@pytest.mark.parametrize("is_causal", [True, False])
def test_out_and_gradients_are_those_of_pytorch_over_whole_blocks(name: str, is_causal: bool) -> None:
    query, key, value = (make(2, 8, 512, 64) for _ in range(3))
    call = attnplug.SDPAParams(query, key, value, is_causal=is_causal)
    if not (verdict := attnplug.can_use_impl(name, call)):
        pytest.skip("; ".join(verdict.reasons))
    out = attnplug.scaled_dot_product_attention(query, key, value, is_causal=is_causal, impl=name)
    wide = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=is_causal)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (query, key, value), grad)
    right = torch.autograd.grad(expected, wide, grad.double())
    torch.testing.assert_close(out.double(), expected, atol=4e-3, rtol=4e-3)
    for got, want in zip(found, right, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-2, rtol=1e-2)


def test_masks_shared_by_all_queries_are_not_copied_to_each() -> None:
    query, key, value = (make(2, 8, 4096, 64, grad=False) for _ in range(3))
    mask = make(2, 1, 1, 4096, grad=False)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attnplug.scaled_dot_product_attention(query, key, value, mask, impl="efficient_cuda")
    used = torch.cuda.max_memory_allocated() - before
    assert used < 2 * query.numel() * query.element_size()


def test_deterministic_mode_gives_equal_bits() -> None:
    query, key, value = (make(1, 2, 2048, 64) for _ in range(3))
    try:
        torch.use_deterministic_algorithms(True)
        runs = []
        for _ in range(3):
            out = attnplug.scaled_dot_product_attention(query, key, value, impl="efficient_cuda")
            runs.append((out, *torch.autograd.grad(out.sum(), (query, key, value))))
    finally:
        torch.use_deterministic_algorithms(False)
    for again in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("size", [64, 128, 256])
def test_compiled_calls_are_those_of_eager_mode(size: int) -> None:
    query, key, value = (make(2, 4, 128, size) for _ in range(3))

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attnplug.scaled_dot_product_attention(query, key, value, is_causal=True, impl="efficient_cuda")

    compiled = torch.compile(attend, fullgraph=True)(query, key, value)
    torch.testing.assert_close(compiled, attend(query, key, value))
    compiled.sum().backward()
    assert query.grad is not None and query.grad.isfinite().all()
