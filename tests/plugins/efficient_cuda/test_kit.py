"""The conformance kit on the plugin's own code, whose operators are emulated: quick runs, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
