"""Which GPU a kernel is told of: the one that is here, or the one that is asked about."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attnplug
from attnplug import Capabilities, ImplSpec, SDPAParams


def fake_query(device: str = "cuda", *shape: int) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(shape or (1, 2, 16, 8), device=device)


class Curious:
    """A kernel that notes which GPU it is told of whenever it is asked."""

    shape_dependent = True

    def __init__(self) -> None:
        self.told: list[tuple[int, int] | None] = []

    def forward(self, params: SDPAParams) -> Any:
        raise AssertionError("a kernel was run")

    def supports(self, params: SDPAParams) -> str:
        self.told.append(attnplug.compute_capability(params.query.device))
        return ""


@pytest.fixture
def curious() -> Curious:
    kernel = Curious()
    attnplug.register_impl(ImplSpec(name="curious", kernel=kernel, backend=None))
    return kernel


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let PyTorch find these GPUs."""

    def find(*gpus: tuple[int, int]) -> None:
        # To make a fake tensor PyTorch 2.11 first makes a real one, on a GPU that it finds.
        monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpus[device])

    return find


def test_a_kernel_is_told_of_the_gpu_that_is_here(here: Callable[..., None]) -> None:
    here((9, 0), (12, 0))
    assert attnplug.compute_capability("cuda") == (9, 0)
    assert attnplug.compute_capability(torch.device("cuda:1")) == (12, 0)


def test_there_is_none_on_other_devices_and_where_no_gpu_is(
    here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    here((9, 0))
    assert attnplug.compute_capability("cpu") is None
    assert attnplug.compute_capability("cuda:7") is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert attnplug.compute_capability("cuda") is None
    here()
    assert attnplug.compute_capability("cuda") is None


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_question_about_another_gpu_reaches_the_kernel_and_ends_with_the_answer(
    here: Callable[..., None], curious: Curious, device: str
) -> None:
    here((8, 0), (8, 0))
    query = fake_query(device)
    params = SDPAParams(query, query, query)
    assert attnplug.can_use_impl("curious", params, compute_capability=(9, 0))
    attnplug.explain(query, query, query, impl="curious", compute_capability=(12, 0))
    assert attnplug.compute_capability(device) == (8, 0)
    attnplug.explain(query, query, query, impl="curious")
    assert curious.told == [(9, 0), (12, 0), (8, 0)]


def test_capabilities_are_held_against_the_gpu_that_is_asked_about(here: Callable[..., None]) -> None:
    here((12, 0))
    spec = ImplSpec(
        name="hopper",
        kernel=Curious(),
        backend=None,
        capabilities=Capabilities(devices=("cuda",), compute_capability=(9, 0)),
    )
    attnplug.register_impl(spec)
    query = fake_query()
    verdict = attnplug.can_use_impl("hopper", SDPAParams(query, query, query), compute_capability=(8, 9))
    assert verdict.reasons == ("needs compute capability 9.0 or later, found 8.9",)
    assert attnplug.can_use_impl("hopper", SDPAParams(query, query, query))


def test_another_thread_keeps_its_own_gpu(here: Callable[..., None]) -> None:
    here((8, 0))
    told: list[Any] = []

    class Asking(Curious):
        def supports(self, params: SDPAParams) -> str:
            thread = threading.Thread(target=lambda: told.append(attnplug.compute_capability("cuda")))
            thread.start()
            thread.join()
            return super().supports(params)

    kernel = Asking()
    attnplug.register_impl(ImplSpec(name="asking", kernel=kernel, backend=None))
    query = fake_query()
    assert attnplug.can_use_impl("asking", SDPAParams(query, query, query), compute_capability=(9, 0))
    assert (kernel.told, told) == ([(9, 0)], [(8, 0)])


@pytest.mark.parametrize(
    ("device", "capability", "error", "message"),
    [
        ("cuda", "9.0", TypeError, r"compute_capability: expected two integers such as \(9, 0\), got '9.0'"),
        ("cuda", 9.0, TypeError, "expected two integers"),
        ("cuda", (9, True), TypeError, "expected two integers"),
        ("cuda", (9, 0, 0), TypeError, "expected two integers"),
        ("cuda", (0, 3), ValueError, "no GPU has 0.3"),
        ("cuda", (9, 10), ValueError, "no GPU has 9.10"),
        ("cpu", (9, 0), ValueError, "describes a CUDA device, and query is on cpu; put query on cuda"),
    ],
)
def test_a_wrong_gpu_is_an_error_that_says_why(
    curious: Curious, device: str, capability: Any, error: type[Exception], message: str
) -> None:
    query = fake_query(device)
    with pytest.raises(error, match=message):
        attnplug.explain(query, query, query, compute_capability=capability)
    with pytest.raises(error, match=message):
        attnplug.can_use_impl("curious", SDPAParams(query, query, query), compute_capability=capability)
    assert curious.told == []


def test_nvidia_gpus_cannot_be_asked_about_where_pytorch_is_built_for_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    query = fake_query()
    with pytest.raises(ValueError, match="compute_capability: is NVIDIA's, and this PyTorch is built for AMD GPUs"):
        attnplug.explain(query, query, query, compute_capability=(9, 0))


@pytest.mark.parametrize("shape", [(0, 2, 16, 8), (1, 2, 0, 8)], ids=str)
def test_an_empty_call_is_explained_as_one_that_needs_no_kernel(curious: Curious, shape: tuple[int, ...]) -> None:
    query = torch.empty(shape)
    told = attnplug.explain(query, query, query, softcap=3.0)
    assert told.empty and told.chosen is None
    assert {verdict.name for verdict in told.candidates} == set(attnplug.list_flash_attention_impls())
    for verdict in told.candidates:
        assert verdict.reasons == ("is not asked: the call is empty, and no kernel runs",)
    assert curious.told == []
    with attnplug.record() as calls:
        assert not attnplug.scaled_dot_product_attention(query, query, query, softcap=3.0).numel()
    assert calls == []


def test_empty_sequences_are_explained_so_too() -> None:
    tokens, starts = torch.empty(0, 2, 8), torch.zeros(1, dtype=torch.int32)
    told = attnplug.explain(tokens, tokens, tokens, cu_seq_q=starts, cu_seq_k=starts, max_q=0, max_k=0)
    assert told.empty and told.chosen is None


def test_a_call_that_is_not_empty_says_so() -> None:
    query = torch.empty(1, 2, 16, 8)
    told = attnplug.explain(query, query, query)
    assert not told.empty and told.chosen == "torch"
