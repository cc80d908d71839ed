"""The conformance kit on the plugin's own code, whose operators are emulated: quick runs, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import attnplug
from attnplug import CausalVariant
from attnplug.testing import check_impl
from cuda_calls import emulate, install_cudnn, install_sequences, seen_by, tensors, wrong
from cuda_kernels_emulated import Cudnn, CudnnSequences, Cutlass

from attnplug_efficient_cuda import operators  # isort: skip


class WholeCudnn:
    """Both paths of the operators."""

    def __init__(self) -> None:
        self.dense, self.sequences = Cudnn(), CudnnSequences()

    def forward(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        return (self.dense if query.dim() == 4 else self.sequences).forward(query, *args, **kwargs)

    def backward(self, grad_out: Any, *args: Any, **kwargs: Any) -> Any:
        return (self.dense if grad_out.dim() == 4 else self.sequences).backward(grad_out, *args, **kwargs)

    def whole(self, *args: Any, **kwargs: Any) -> Any:
        return self.dense.whole(*args, **kwargs)


@pytest.mark.parametrize(("name", "dtype"), [("efficient_cuda", "float32"), ("cudnn", "float16")])
def test_the_code_around_the_kernels_conforms(monkeypatch: pytest.MonkeyPatch, name: str, dtype: str) -> None:
    install_cudnn(monkeypatch, 92500)
    install_sequences(monkeypatch)
    kernel: Any = Cutlass() if name == "efficient_cuda" else WholeCudnn()
    emulate(monkeypatch, name, kernel)
    report = check_impl("emulated", device="cpu", dtype=dtype)
    assert not wrong(report), "\n\n".join(wrong(report))
    assert not report.failures


CALLS: list[dict[str, Any]] = [
    {},
    {"scale": 0.3},
    {"is_causal": True},
    {"is_causal": True, "return_lse": True},
    {"is_causal": True, "causal_variant": CausalVariant.LOWER_RIGHT},
    {"window_size": (2, 0)},
    {"return_lse": True},
]


@pytest.mark.parametrize("shorter", [True, False], ids=["with PyTorch's shorter operator", "without"])
@pytest.mark.parametrize(("queries", "shared"), [(5, False), (1, False), (1, True), (33, True)], ids=str)
@pytest.mark.parametrize("name", ["efficient_cuda", "cudnn"])
def test_calls_that_repeat_another_are_those_of_pytorch(
    monkeypatch: pytest.MonkeyPatch, name: str, queries: int, shared: bool, shorter: bool
) -> None:
    install_cudnn(monkeypatch, 92500)
    emulate(monkeypatch, name, Cutlass() if name == "efficient_cuda" else Cudnn())
    if not shorter:
        monkeypatch.setattr(operators, "bound", lambda name: None)
    keys = queries + 2
    for options in CALLS:
        band = {key: options[key] for key in ("is_causal", "causal_variant", "window_size") if key in options}
        for _ in range(3):
            query, key, value = (t.detach() for t in tensors(queries=queries, keys=keys, kv_heads=1 if shared else 2))
            key, value = key.expand(2, 2, keys, 8), value.expand(2, 2, keys, 8)
            seen = seen_by(queries, keys, **band)
            found = attnplug.scaled_dot_product_attention(query, key, value, impl="emulated", **options)
            out = found[0] if "return_lse" in options else found
            logits = query.double() @ key.double().mT * options.get("scale", 8**-0.5)
            logits = logits.masked_fill(~seen, -float("inf"))
            torch.testing.assert_close(out.double(), logits.softmax(-1) @ value.double(), atol=1e-5, rtol=1e-5)
            if "return_lse" in options:
                torch.testing.assert_close(found[1].double(), logits.logsumexp(-1), atol=1e-5, rtol=1e-5)


def laid_out(grad: torch.Tensor, how: str) -> torch.Tensor:
    if how == "heads first":
        return grad
    if how == "expanded":
        return grad[:, :, :1, :1].expand_as(grad)
    if how == "unaligned":
        return torch.cat([torch.zeros(1, dtype=grad.dtype), grad.flatten()])[1:].view_as(grad)
    return grad.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("shorter", [True, False], ids=["with PyTorch's shorter operator", "without"])
@pytest.mark.parametrize("queries", [5, 33, 64])
@pytest.mark.parametrize(("name", "dtype"), [("efficient_cuda", torch.float32), ("cudnn", torch.float16)], ids=str)
def test_gradients_of_calls_that_repeat_another_are_those_of_pytorch(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, queries: int, shorter: bool, heads_first: bool
) -> None:
    install_cudnn(monkeypatch, 92500)
    emulate(monkeypatch, name, Cutlass() if name == "efficient_cuda" else Cudnn())
    if not shorter:
        monkeypatch.setattr(operators, "overload", lambda name: None)
    layouts = "heads first", "rows first", "expanded", "unaligned", "rows first", "heads first"
    for options in CALLS[:4]:
        for how in layouts:
            given = tensors(queries=queries, keys=queries, dtype=dtype, heads_first=heads_first)
            torch.use_deterministic_algorithms(how == "rows first" and name == "efficient_cuda")
            try:
                found = attnplug.scaled_dot_product_attention(*given, impl="emulated", **options)
                torch.use_deterministic_algorithms(False)
                out = found[0] if "return_lse" in options else found
                grad_out = laid_out(torch.randn(out.shape, dtype=dtype), how)
                grads = torch.autograd.grad(out, given, grad_out)
            finally:
                torch.use_deterministic_algorithms(False)
            exact = [tensor.detach().double().requires_grad_() for tensor in given]
            like = {key: options[key] for key in ("is_causal", "scale") if key in options}
            expected = torch.autograd.grad(sdpa(*exact, **like), exact, grad_out.double())
            close = {"atol": 4e-3, "rtol": 4e-3} if dtype is torch.float16 else {"atol": 1e-5, "rtol": 1e-5}
            for grad, right in zip(grads, expected, strict=True):
                torch.testing.assert_close(grad.double(), right, **close)


def run_backward(strict: bool, **like: Any) -> None:
    """Run forward and then, in deterministic mode or not, backward."""
    given = tensors(queries=5, keys=7, **like)
    out = attnplug.scaled_dot_product_attention(*given, impl="emulated")
    torch.use_deterministic_algorithms(strict)
    try:
        out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_prepared_backward_of_cudnn_heeds_deterministic_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    install_cudnn(monkeypatch, 92500)
    emulate(monkeypatch, "cudnn", Cudnn())

    for strict in (False, True, False, True):
        if strict:
            with pytest.raises(RuntimeError, match="no deterministic form"):
                run_backward(strict, dtype=torch.float16)
        else:
            run_backward(strict, dtype=torch.float16)


def test_efficient_backward_in_deterministic_mode_asks_for_one_split_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, "efficient_cuda", kernel := Cutlass())
    splits: list[int | None] = []
    run = kernel.backward
    monkeypatch.setattr(
        operators,
        "efficient_backward",
        lambda *args, num_splits_key, **kwargs: (
            splits.append(num_splits_key) or run(*args, num_splits_key=num_splits_key, **kwargs)
        ),
    )
    for _ in range(3):
        for strict in (False, True):
            run_backward(strict)
    assert splits[-2:] == [1, 1] and splits.count(1) == 3
