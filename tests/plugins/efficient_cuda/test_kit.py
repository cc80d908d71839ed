"""The conformance kit on the plugin's own code, whose operators are emulated: quick runs, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

from attnplug.testing import check_impl
from cuda_calls import emulate, install_cudnn, install_sequences, wrong
from cuda_kernels_emulated import Cudnn, CudnnSequences, Cutlass


class WholeCudnn:
    """Both paths of the operators."""

    def __init__(self) -> None:
        self.dense, self.sequences = Cudnn(), CudnnSequences()

    def forward(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        return (self.dense if query.dim() == 4 else self.sequences).forward(query, *args, **kwargs)

    def backward(self, grad_out: Any, *args: Any, **kwargs: Any) -> Any:
        return (self.dense if grad_out.dim() == 4 else self.sequences).backward(grad_out, *args, **kwargs)


@pytest.mark.parametrize(("name", "dtype"), [("efficient_cuda", "float32"), ("cudnn", "float16")])
def test_the_code_around_the_kernels_conforms(monkeypatch: pytest.MonkeyPatch, name: str, dtype: str) -> None:
    install_cudnn(monkeypatch, 92500)
    install_sequences(monkeypatch)
    kernel: Any = Cutlass() if name == "efficient_cuda" else WholeCudnn()
    emulate(monkeypatch, name, kernel)
    report = check_impl("emulated", device="cpu", dtype=dtype)
    assert not wrong(report), "\n\n".join(wrong(report))
    assert not report.failures
