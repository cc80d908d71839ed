"""State meets the rest of PyTorch: threads of backward, autocast, inference mode, copies, worker processes."""

from __future__ import annotations

import copy
import gc
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.data import DataLoader, Dataset

import attnplug
from attending import ran_in
from attnplug import Capabilities, ImplSpec, SDPAParams, SDPBackend

SHAPE = (1, 2, 4, 8)
ORIGINAL = F.scaled_dot_product_attention


class Noted:
    """A kernel that notes in which thread its forward and its backward ran."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, str]] = []

    def forward(self, params: SDPAParams) -> tuple[Tensor, None]:
        self.ran.append(("forward", threading.current_thread().name))
        return params.query * 2, None

    def backward(self, params: SDPAParams, grad_out: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.ran.append(("backward", threading.current_thread().name))
        return grad_out * 3, torch.zeros_like(params.key), torch.zeros_like(params.value)


class Attention(nn.Module):
    """Self-attention that knows nothing of attnplug."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.packed = nn.Linear(8, 24)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.packed(hidden).chunk(3, -1))


@pytest.fixture
def noted() -> Noted:
    kernel = Noted()
    spec = ImplSpec(name="noted", kernel=kernel, backend=SDPBackend.EFFICIENT_ATTENTION, capabilities=Capabilities())
    attnplug.register_impl(spec)
    return kernel


@pytest.fixture
def bind() -> Iterator[Callable[..., attnplug.BindingHandle]]:
    """`attnplug.bind`, undone after the test: a binding counts for the process as long as nobody removes it."""
    with ExitStack() as stack:

        def bound(*arguments: Any) -> attnplug.BindingHandle:
            handle = attnplug.bind(*arguments)
            stack.callback(handle.remove)
            return handle

        yield bound


def query() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).requires_grad_()


def in_thread(function: Callable[[], Any], name: str = "another") -> Any:
    with ThreadPoolExecutor(1, thread_name_prefix=name) as pool:
        return pool.submit(function).result(timeout=60)


# --- backward is its forward's, wherever and whenever it runs ---


@contextmanager
def scoped() -> Iterator[None]:
    with attnplug.patch_torch(), attnplug.sdpa_kernel("noted"):
        yield


@contextmanager
def active() -> Iterator[None]:
    attnplug.activate_flash_attention_impl("noted")
    yield
    attnplug.restore_flash_attention_impl()


@contextmanager
def elsewhere() -> Iterator[None]:
    with attnplug.sdpa_kernel("aten_math"):
        yield


@contextmanager
def another_activation() -> Iterator[None]:
    attnplug.activate_flash_attention_impl("aten_math")
    yield
    attnplug.restore_flash_attention_impl()


@contextmanager
def unregistered() -> Iterator[None]:
    attnplug.unregister_impl("noted")
    yield


@pytest.mark.parametrize("thread", ["the same", "another"])
@pytest.mark.parametrize("later", [elsewhere, another_activation, unregistered])
@pytest.mark.parametrize("chosen", [scoped, active])
def test_backward_is_its_forward_s_after_the_choice_has_changed(
    noted: Noted, chosen: Any, later: Any, thread: str
) -> None:
    inputs = query()
    with chosen():
        out = F.scaled_dot_product_attention(inputs, inputs.detach(), inputs.detach())
    with later():
        backward = out.sum().backward
        backward() if thread == "the same" else in_thread(backward)
    assert [what for what, _ in noted.ran] == ["forward", "backward"]
    assert noted.ran[1][1].startswith("another") == (thread == "another")
    assert torch.equal(inputs.grad, torch.full(SHAPE, 3.0))


def test_a_graph_may_be_differentiated_twice_with_the_same_result(noted: Noted) -> None:
    inputs = query()
    with scoped():
        out = F.scaled_dot_product_attention(inputs, inputs.detach(), inputs.detach())
    first, second = (torch.autograd.grad(out.sum(), inputs, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_compiled_backward_is_its_forward_s_after_the_choice_has_changed() -> None:
    inputs, model = torch.randn(1, 4, 8), Attention()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(model(inputs).sum(), [*model.parameters()])
    with attnplug.patch_torch():
        with attnplug.sdpa_kernel("aten_math"):
            out = compiled(inputs)
        with attnplug.sdpa_kernel("aten_flash"):
            torch.testing.assert_close(torch.autograd.grad(out.sum(), [*model.parameters()]), expected)


# --- checkpoints ---


@pytest.mark.parametrize("thread", ["the same", "another"])
def test_a_checkpoint_in_a_model_s_bound_part_recomputes_alike_in_any_thread(
    bind: Any, noted: Noted, thread: str
) -> None:
    model, hidden = Attention(), torch.randn(1, 4, 8, requires_grad=True)
    with attnplug.patch_torch():
        bind(model, "noted")
        with attnplug.sdpa_kernel("aten_math"):
            out = checkpoint(model, hidden, use_reentrant=False, context_fn=attnplug.checkpoint_contexts)
        in_thread(out.sum().backward) if thread == "another" else out.sum().backward()
    assert [what for what, _ in noted.ran] == ["forward", "forward", "backward"]


def test_a_recomputation_that_calls_more_often_than_its_forward_is_an_error() -> None:
    times = iter([1, 2])

    def block(inputs: Tensor) -> Tensor:
        for _ in range(next(times)):
            inputs = attnplug.scaled_dot_product_attention(inputs, inputs, inputs)
        return inputs

    with set_checkpoint_early_stop(False):
        out = checkpoint(block, query(), use_reentrant=False, context_fn=attnplug.checkpoint_contexts)
    with pytest.raises(attnplug.AttnplugError, match="makes more attention calls than its forward did"):
        out.sum().backward()


# --- autocast and inference mode, through PyTorch's function ---


@pytest.mark.parametrize("impl", ["torch", "aten_flash", "aten_math", "math_ref"])
def test_autocast_gives_the_type_and_the_gradients_that_it_gives_without_the_drop_in(impl: str) -> None:
    if impl not in attnplug.list_flash_attention_impls():
        pytest.skip(f"{impl} is not installed")
    model, hidden = Attention(), torch.randn(2, 4, 8)

    def step() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(hidden)
        return out, *torch.autograd.grad(out.float().sum(), [*model.parameters()])

    expected = step()
    with attnplug.patch_torch():
        assert all(map(torch.equal, step(), expected))
        with attnplug.sdpa_kernel(impl):
            found = step()
            assert ran_in(step) == [impl]
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("impl", ["aten_flash", "aten_math", "math_ref"])
@pytest.mark.parametrize("first", ["inference", "training"])
def test_inference_and_training_take_turns(first: str, impl: str) -> None:
    """A decision that is kept from one must not serve the other."""
    if impl not in attnplug.list_flash_attention_impls():
        pytest.skip(f"{impl} is not installed")
    model, hidden = Attention(), torch.randn(2, 4, 8)
    expected = model(hidden)
    gradients = torch.autograd.grad(expected.sum(), [*model.parameters()])
    with attnplug.patch_torch(), attnplug.sdpa_kernel(impl):
        for inference in (first == "inference", first != "inference") * 2:
            with torch.inference_mode(inference):
                out = model(hidden)
            assert out.is_inference() == inference
            torch.testing.assert_close(out.clone() if inference else out, expected)
            if not inference:
                torch.testing.assert_close(torch.autograd.grad(out.sum(), [*model.parameters()]), gradients)


def test_parameters_made_in_inference_mode_can_be_attended_to_outside_it() -> None:
    with torch.inference_mode():
        kept = torch.randn(SHAPE)
    expected = F.scaled_dot_product_attention(kept, kept, kept)
    for impl in ("aten_flash", "aten_math", "math_ref"):
        if impl in attnplug.list_flash_attention_impls():
            torch.testing.assert_close(attnplug.scaled_dot_product_attention(kept, kept, kept, impl=impl), expected)


# --- models that carry a binding ---


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, saved_and_loaded])
def test_a_copy_carries_its_binding_and_the_same_weights(bind: Any, clone: Any) -> None:
    model, hidden = Attention(), torch.randn(1, 4, 8)
    bind(model, "aten_math")
    other = clone(model)
    with attnplug.patch_torch():
        assert ran_in(lambda: other(hidden)) == ["aten_math"]
        torch.testing.assert_close(other(hidden), model(hidden))
    assert model.state_dict().keys() == Attention().state_dict().keys()


@pytest.mark.parametrize("order", ["bound, then compiled", "compiled, then bound"])
def test_a_model_that_is_itself_bound_can_be_compiled(bind: Any, order: str) -> None:
    model, hidden = Attention(), torch.randn(1, 4, 8)
    expected = model(hidden)
    with attnplug.patch_torch():
        if order == "bound, then compiled":
            bind(model, "aten_math")
            compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
        else:
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            compiled(hidden)
            bind(model, "aten_math")
        torch.testing.assert_close(compiled(hidden), expected)
        assert ran_in(lambda: attnplug.scaled_dot_product_attention(*[hidden[None]] * 3)) == ["torch"]


def test_a_compiled_model_sees_what_inside_it_is_bound_and_let_go(bind: Any) -> None:
    model, hidden = nn.Sequential(Attention(), nn.Identity()), torch.randn(1, 4, 8)
    with attnplug.patch_torch():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        found = [ran_in(lambda: compiled(hidden))]
        handles = []
        for impl in ("aten_math", "aten_flash"):
            handles.append(bind(model[0], impl))
            found.append(ran_in(lambda: compiled(hidden)))
        for handle in reversed(handles):
            handle.remove()
            found.append(ran_in(lambda: compiled(hidden)))
    assert found == [["torch"], ["aten_math"], ["aten_flash"], ["aten_math"], ["torch"]]


def test_a_compiled_copy_carries_its_binding(bind: Any) -> None:
    model, hidden = Attention(), torch.randn(1, 4, 8)
    handle = bind(model, "aten_math")
    other = copy.deepcopy(model)
    handle.remove()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with attnplug.patch_torch():
        for each in (model, other):
            torch.compile(each, backend=keep, fullgraph=True)(hidden)
    assert ["attention_math" in graph.code for graph in graphs] == [False, True]
    torch._dynamo.reset()
    del model, other, each, handle
    graphs.clear()
    gc.collect()  # a binding counts as long as its module is there, and a copy's too


def test_a_bound_model_may_run_in_many_threads_at_once(bind: Any) -> None:
    """As with `nn.DataParallel`: each thread enters the scope, and leaves it, for itself."""
    model, hidden = Attention(), torch.randn(1, 4, 8)
    bind(model, "aten_math")
    with attnplug.patch_torch(), ThreadPoolExecutor(4) as pool:
        one_of_each = [lambda: (model(hidden), Attention()(hidden))] * 40
        seen = list(pool.map(ran_in, one_of_each))
    assert seen == [["aten_math", "torch"]] * 40


def test_patches_may_come_and_go_while_other_threads_compute() -> None:
    hidden, model, stop = torch.randn(1, 4, 8), Attention(), threading.Event()
    expected = model(hidden)

    def compute() -> int:
        with attnplug.sdpa_kernel("aten_math"):
            while not stop.is_set():
                torch.testing.assert_close(model(hidden), expected)
        return 1

    with ThreadPoolExecutor(2) as pool:
        working = [pool.submit(compute) for _ in range(2)]
        for _ in range(10):
            with attnplug.patch_torch():
                pass
        stop.set()
        assert [work.result(timeout=60) for work in working] == [1, 1]
    assert F.scaled_dot_product_attention is ORIGINAL


# --- worker processes ---


class Attended(Dataset[Any]):
    """Items that are computed by a bound model, in whatever process asks for them."""

    def __init__(self, model: Attention) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, list[str]]:
        hidden = torch.full((1, 4, 8), float(index))
        with torch.no_grad(), attnplug.patch_torch(), attnplug.record() as calls:
            out = self.model(hidden)
            Attention()(hidden)
        return out, [call.impl for call in calls]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader_attend_as_the_main_process_does(bind: Any, method: str) -> None:
    data = Attended(Attention())
    bind(data.model, "aten_math")
    expected = [data[index] for index in range(len(data))]
    assert all(names == ["aten_math", "torch"] for _, names in expected)
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=method, timeout=600)
    for (found, names), (out, expected_names) in zip(loader, expected, strict=True):
        assert names == expected_names
        torch.testing.assert_close(found, out)


def test_a_binding_goes_with_its_module() -> None:
    with attnplug.patch_torch():
        model = Attention()
        attnplug.bind(model, "aten_math")
        assert not torch.backends.mha.get_fastpath_enabled()  # PyTorch's C++ path would pass the binding by
        del model
        gc.collect()
        assert torch.backends.mha.get_fastpath_enabled()
