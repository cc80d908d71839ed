"""Under `torch.compile` the operator in the graph decides whether a call is verified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnplug
from attnplug import MismatchError
from spoiled_kernels import Formula, WrongGradient, WrongOut, register, tensors


def compiled(impl: str) -> tuple[Callable[..., Any], list[int]]:
    """Return a compiled call, and a list that grows by one each time that it is compiled."""
    graphs: list[int] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(len(module.graph.nodes))
        return module.forward

    torch.compiler.reset()
    attend = torch.compile(
        lambda *given: attnplug.scaled_dot_product_attention(*given, impl=impl), backend=backend, fullgraph=True
    )
    return attend, graphs


@pytest.mark.parametrize("kernel", [Formula, None])
def test_compiled_calls_are_verified_and_equal_the_others(kernel: type[Formula] | None) -> None:
    attend, graphs = compiled("torch" if kernel is None else register(kernel))
    given = tensors()
    plain = attend(*given)
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        assert torch.equal(attend(*given), plain)
        attend(*given)
    attend(*given)
    assert watched.results == 2
    assert len(graphs) == 2  # with and without, and coming back compiles nothing


def test_a_wrong_compiled_call_is_found() -> None:
    attend, _ = compiled(register(WrongOut))
    with attnplug.verify(1.0, on_mismatch="raise"), pytest.raises(MismatchError, match="out: largest error"):
        attend(*tensors(9))


def test_the_rate_counts_calls_not_compilations() -> None:
    attend, _ = compiled("torch")
    given = tensors(2)
    with attnplug.verify(0.2, seed=3) as watched:
        for _ in range(200):
            attend(*given)
    assert watched.calls == 200
    assert 20 <= watched.results <= 60


def test_a_wrong_gradient_of_a_compiled_opaque_kernel_is_found() -> None:
    attend, graphs = compiled(register(WrongGradient))
    given = tensors(17, requires_grad=True)
    attend(*given).sum().backward()
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        out = attend(*given).sum()
        with pytest.raises(MismatchError, match="gradient of .* largest error") as raised:
            out.backward()
    assert watched.gradients == 1
    assert "gradients=(" in str(raised.value)  # in the line that repeats the call
    assert len(graphs) == 2  # the same graph tells of gradients


def test_right_gradients_of_a_compiled_opaque_kernel_raise_no_alarm() -> None:
    attend, _ = compiled(register(Formula))
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        attend(*tensors(17, requires_grad=True)).square().sum().backward()
    assert (watched.results, watched.gradients, dict(watched.skipped)) == (1, 1, {})


def test_gradients_of_code_that_is_compiled_of_operators_are_said_not_to_be_verified() -> None:
    attend, _ = compiled("torch")
    with attnplug.verify(1.0, on_mismatch="raise") as watched:
        attend(*tensors(17, requires_grad=True)).sum().backward()
    assert watched.gradients == 0
    assert "gradients: of compiled code that is made of PyTorch's operators" in str(watched)


@pytest.mark.gpu
def test_on_a_gpu_a_process_sees_compiled_gradients_and_a_block_says_that_it_does_not() -> None:
    attend, _ = compiled(register(Formula))
    given = tensors(17, requires_grad=True, device="cuda")
    with attnplug.verify(1.0, on_mismatch="raise") as of_thread:
        attend(*given).sum().backward()
    of_process = attnplug.verify(1.0, on_mismatch="raise").start()
    attend(*given).sum().backward()
    of_process.stop()
    assert of_thread.gradients == 0 and "start() sees it" in str(of_thread)
    assert of_process.gradients == 1
