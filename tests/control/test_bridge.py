"""PyTorch's own function, routed through attnplug, in models that know nothing of it."""

from __future__ import annotations

import multiprocessing
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as imported_by_name
from torch.testing._internal.common_methods_invocations import op_db

import attnplug
from attending import Model, Q, ran_in
from attnplug import ImplSpec, SDPBackend

ORIGINAL = F.scaled_dot_product_attention


def test_scopes_apply_to_pytorch_s_function_while_it_is_patched() -> None:
    model = Model()
    with attnplug.patch_torch(), attnplug.sdpa_kernel("aten_math"):
        assert ran_in(lambda: model(Q)) == ["aten_math"]
    with attnplug.sdpa_kernel("aten_math"):
        assert ran_in(lambda: model(Q)) == []
    assert F.scaled_dot_product_attention is ORIGINAL


def test_with_nothing_selected_it_is_pytorch_s_function_bit_for_bit() -> None:
    info = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    for sample in info.sample_inputs("cpu", torch.float32):
        torch.manual_seed(0)
        expected = F.scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs)
        torch.manual_seed(0)
        with attnplug.patch_torch():
            actual = F.scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs)
        assert torch.equal(actual, expected)


def test_a_name_imported_before_follows_and_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("some_model")
    module.sdpa = imported_by_name
    monkeypatch.setitem(sys.modules, "some_model", module)
    with attnplug.patch_torch(), attnplug.sdpa_kernel("aten_math"):
        assert ran_in(lambda: module.sdpa(Q, Q, Q)) == ["aten_math"]
        kept = module.sdpa
    assert module.sdpa is ORIGINAL
    with attnplug.sdpa_kernel("aten_math"):
        assert ran_in(lambda: kept(Q, Q, Q)) == []  # a reference that outlives the patch calls PyTorch


def test_several_patches_are_removed_in_any_order() -> None:
    handles = [attnplug.patch_torch() for _ in range(3)]
    attnplug.activate_flash_attention_impl("aten_math")
    for handle in (handles[1], handles[0], handles[0], handles[2]):
        handle.remove()
    assert ran_in(lambda: Model()(Q)) == ["aten_math"]
    attnplug.restore_flash_attention_impl()
    assert F.scaled_dot_product_attention is ORIGINAL
    assert ran_in(lambda: Model()(Q)) == []


def test_models_compiled_before_follow_the_activation_and_the_restore() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    model = torch.compile(Model(), backend=counter, fullgraph=True)
    expected = model(Q)
    for _ in range(2):
        attnplug.activate_flash_attention_impl("aten_math")
        torch.testing.assert_close(model(Q), expected)
        assert "attention_math" in counter.graphs[-1].code
        attnplug.restore_flash_attention_impl()
        assert torch.equal(model(Q), expected)
    assert counter.frame_count == 2  # coming back compiled nothing


@pytest.mark.parametrize("compiled", [False, True])
def test_transformer_layers_follow_in_spite_of_their_fast_path(compiled: bool) -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
    model = torch.compile(layer, backend="eager") if compiled else layer
    inputs = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = model(inputs)
        with attnplug.patch_torch():
            assert torch.equal(model(inputs), expected)
            with attnplug.sdpa_kernel("aten_math"):
                torch.testing.assert_close(model(inputs), expected)
                if not compiled:
                    assert ran_in(lambda: model(inputs)) == ["aten_math"]
        assert torch.equal(model(inputs), expected)


def test_a_layer_leaves_its_fast_path_where_only_the_attention_in_it_is_bound() -> None:
    attnplug.register_impl(ImplSpec(name="zeros", kernel=lambda params: (params.value * 0, None), backend=None))
    layer = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
    inputs = torch.randn(2, 5, 16)
    with torch.no_grad(), attnplug.patch_torch():
        expected = layer(inputs)
        binding = attnplug.bind(layer.self_attn, "zeros")
        assert not torch.allclose(layer(inputs), expected)
        binding.remove()
        assert torch.equal(layer(inputs), expected)


# --- activation, and providers written for torch.nn.attention ---


class Provider:
    """A provider as `torch.nn.attention.register_flash_attention_impl` takes it: it overrides a leaf operator."""

    def __init__(self, shift: float) -> None:
        self.shift, self.removed = shift, 0
        self.library: Any = None

    def __call__(self) -> Provider:
        def flash(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
            return value + self.shift, query.sum(-1)

        self.library = torch.library.Library("aten", "IMPL")
        self.library.impl("_scaled_dot_product_flash_attention_for_cpu", flash, "CPU")
        return self

    def remove(self) -> None:
        self.removed += 1
        self.library._destroy()


def test_a_provider_written_for_pytorch_works_unchanged() -> None:
    provider = Provider(1.0)
    attnplug.register_flash_attention_impl("theirs", register_fn=provider)
    with pytest.raises(attnplug.NoImplementationError, match=r"activate_flash_attention_impl\('theirs'\)"):
        attnplug.scaled_dot_product_attention(Q, Q, Q, impl="theirs")
    attnplug.activate_flash_attention_impl("theirs")
    assert attnplug.current_flash_attention_impl() == "theirs"
    attnplug.register_flash_attention_impl("another", register_fn=provider)
    with pytest.raises(attnplug.NoImplementationError, match=r"activate_flash_attention_impl\('another'\)"):
        attnplug.scaled_dot_product_attention(Q, Q, Q, impl="another")
    with torch.no_grad():
        assert torch.equal(F.scaled_dot_product_attention(Q, Q, Q), Q + 1)
        assert torch.equal(attnplug.scaled_dot_product_attention(Q, Q, Q), Q + 1)
    attnplug.restore_flash_attention_impl()
    assert provider.removed == 1
    torch.testing.assert_close(F.scaled_dot_product_attention(Q, Q, Q), ORIGINAL(Q, Q, Q))
    assert not torch.equal(F.scaled_dot_product_attention(Q, Q, Q), Q + 1)


def test_an_activation_that_fails_changes_nothing() -> None:
    working = Provider(1.0)

    def broken() -> Any:
        raise OSError("no such library")

    attnplug.register_flash_attention_impl("working", register_fn=working)
    attnplug.register_flash_attention_impl("broken", register_fn=broken)
    attnplug.register_flash_attention_impl("odd", register_fn=lambda: "no handle")
    attnplug.activate_flash_attention_impl("working")
    for name, error in (("broken", OSError), ("odd", TypeError), ("nowhere", attnplug.UnknownImplementationError)):
        with pytest.raises(error):
            attnplug.activate_flash_attention_impl(name)
        assert attnplug.current_flash_attention_impl() == "working"
        assert torch.equal(F.scaled_dot_product_attention(Q, Q, Q), Q + 1)
    attnplug.activate_flash_attention_impl("aten_math")
    assert attnplug.current_flash_attention_impl() == "aten_math"
    assert not torch.equal(F.scaled_dot_product_attention(Q, Q, Q), Q + 1)


def test_a_provider_without_a_handle_is_active_all_the_same() -> None:
    attnplug.register_flash_attention_impl("bare", register_fn=lambda: None)
    attnplug.activate_flash_attention_impl("bare")
    assert attnplug.current_flash_attention_impl() == "bare"
    with pytest.warns(UserWarning, match="'bare' gave no handle"):
        attnplug.restore_flash_attention_impl()
    assert attnplug.current_flash_attention_impl() is None


def test_restoring_nothing_warns() -> None:
    with pytest.warns(UserWarning, match="no implementation is active"):
        attnplug.restore_flash_attention_impl()


def test_activating_what_cannot_work_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    attnplug.register_impl(ImplSpec(name="lost", kernel="no_such_module.kernel", backend=SDPBackend.MATH))
    with (
        pytest.warns(attnplug.PluginWarning, match="no_such_module"),
        pytest.raises(attnplug.PluginError, match="'lost' cannot be activated: ModuleNotFoundError"),
    ):
        attnplug.activate_flash_attention_impl("lost")
    assert attnplug.current_flash_attention_impl() is None
    assert F.scaled_dot_product_attention is ORIGINAL


def test_register_fn_must_be_callable_and_names_stay_unique() -> None:
    with pytest.raises(TypeError, match="register_fn: expected a callable, got 3"):
        attnplug.register_flash_attention_impl("x", register_fn=3)
    with pytest.raises(attnplug.DuplicateImplementationError):
        attnplug.register_flash_attention_impl("torch", register_fn=Provider(0.0))


# --- transforms, threads and processes ---


def test_functorch_transforms_are_right_or_a_clear_error() -> None:
    query, key, value = (torch.randn(1, 2, 4, 8, dtype=torch.float64) for _ in range(3))

    def loss(query: Tensor, impl: str) -> Tensor:
        return attnplug.scaled_dot_product_attention(query, key, value, impl=impl).sum()

    expected = torch.func.grad(lambda query: ORIGINAL(query, key, value).sum())(query)
    for impl in ("torch", "aten_math", "aten_flash"):
        torch.testing.assert_close(torch.func.grad(loss)(query, impl), expected)
    batched = torch.randn(3, 1, 2, 4, 8, dtype=torch.float64)
    expected = torch.stack([ORIGINAL(item, key, value) for item in batched])
    for impl in ("torch", "aten_math"):
        mapped = torch.vmap(lambda item, impl=impl: attnplug.scaled_dot_product_attention(item, key, value, impl=impl))
        torch.testing.assert_close(mapped(batched), expected)


def _in_child(queue: Any) -> None:
    query = torch.ones(1, 1, 2, 4)
    with attnplug.sdpa_kernel("aten_math"), attnplug.record() as calls:
        attnplug.scaled_dot_product_attention(query, query, query)
    queue.put([call.impl for call in calls])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_worker_processes_make_choices_of_their_own(method: str) -> None:
    attnplug.scaled_dot_product_attention(Q, Q, Q)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_in_child, args=(queue,))
    process.start()
    assert queue.get(timeout=600) == ["aten_math"]
    process.join()
    assert process.exitcode == 0


def test_an_activation_holds_in_every_thread() -> None:
    attnplug.activate_flash_attention_impl("aten_math")
    seen: list[str] = []
    thread = threading.Thread(target=lambda: seen.extend(ran_in(lambda: Model()(Q))))
    thread.start()
    thread.join()
    assert seen == ["aten_math"]


# --- PyTorch's own registry, both ways ---


def test_implementations_can_be_activated_through_pytorch_s_registry() -> None:
    from torch.nn import attention as theirs

    attnplug.scaled_dot_product_attention(Q, Q, Q)
    assert set(attnplug.list_flash_attention_impls()) <= set(theirs.list_flash_attention_impls())
    theirs.activate_flash_attention_impl("aten_math")
    assert attnplug.current_flash_attention_impl() == theirs.current_flash_attention_impl() == "aten_math"
    assert ran_in(lambda: Model()(Q)) == ["aten_math"]
    theirs.restore_flash_attention_impl()
    assert attnplug.current_flash_attention_impl() is None
    assert F.scaled_dot_product_attention is ORIGINAL


def test_providers_of_pytorch_s_registry_appear_and_can_be_activated() -> None:
    from torch.nn import attention as theirs

    attnplug.scaled_dot_product_attention(Q, Q, Q)  # the registries are kept in step once attnplug has been used
    provider = Provider(2.0)
    theirs.register_flash_attention_impl("from_torch", register_fn=provider)
    attnplug.register_impl(ImplSpec(name="any_change", kernel=lambda params: None, backend=None))
    assert "from_torch" in attnplug.list_flash_attention_impls()
    attnplug.activate_flash_attention_impl("from_torch")
    assert theirs.current_flash_attention_impl() == "from_torch"
    with torch.no_grad():
        assert torch.equal(F.scaled_dot_product_attention(Q, Q, Q), Q + 2)
    attnplug.restore_flash_attention_impl()
    assert theirs.current_flash_attention_impl() is None and provider.removed == 1


def test_what_pytorch_has_built_in_says_what_it_needs(on_devices: Callable[..., None]) -> None:
    on_devices("cpu", "cuda")
    records = {record.name: record for record in attnplug.list_impls()}
    assert records["FA3"].reason.startswith("needs flash_attn_interface, not installed (pip install ")
    assert records["FA4"].reason == "needs flash_attn.cute, not installed (pip install --pre flash-attn-4)"
    with pytest.raises(attnplug.NoImplementationError, match="needs flash_attn.cute, not installed"):
        attnplug.activate_flash_attention_impl("FA4")


def test_what_is_active_can_be_neither_unregistered_nor_registered_anew() -> None:
    attnplug.register_impl(ImplSpec(name="mine", kernel=lambda params: (params.value, None), backend=None))
    attnplug.activate_flash_attention_impl("mine")
    with pytest.raises(ValueError, match="'mine' is active"):
        attnplug.unregister_impl("mine")
    attnplug.register_flash_attention_impl("theirs", register_fn=Provider(1.0))
    attnplug.activate_flash_attention_impl("theirs")
    with pytest.raises(ValueError, match="impl: 'theirs' is active"):
        attnplug.register_flash_attention_impl("theirs", register_fn=Provider(2.0))
