"""A bound module attends as it was told to, a checkpoint recomputes as it computed, and nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import bias
from torch.utils.checkpoint import checkpoint

import attnplug
from attending import DEFAULT, FLASH, MATH, Attention, Model, Q, ran, ran_in
from attnplug import ImplSpec, Kernel, SDPBackend


class TwoLayers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Model(), Model()

    def forward(self, query: Tensor) -> Tensor:
        return self.second(self.first(query))


def _saved(model: TwoLayers) -> TwoLayers:
    """Return what `torch.load` makes of a model."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_binding_holds_for_one_module() -> None:
    model = TwoLayers()
    with attnplug.patch_torch():
        handle = attnplug.bind(model.first, SDPBackend.MATH)
        assert ran_in(lambda: model(Q)) == ["aten_math", "torch"]
        with attnplug.sdpa_kernel("aten_flash"):
            assert ran_in(lambda: model(Q)) == ["aten_math", "aten_flash"]
        handle.remove()
        handle.remove()
        assert ran_in(lambda: model(Q)) == ["torch", "torch"]


def test_a_binding_ends_when_the_forward_raises() -> None:
    class Raises(torch.nn.Module):
        def forward(self) -> None:
            raise KeyError

    module = Raises()
    handle = attnplug.bind(module, "aten_math")
    with pytest.raises(KeyError):
        module()
    with attnplug.record() as calls:
        attnplug.scaled_dot_product_attention(Q, Q, Q)
    handle.remove()
    assert calls[0].impl == "torch"


def test_what_is_outside_a_bound_module_stays_pytorch_s_own_bit_for_bit() -> None:
    """PyTorch masks this bias by itself, in other sums than an implementation of attnplug that aligns it."""
    query, keys, mask = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8), bias.causal_lower_right(3, 5)
    expected = F.scaled_dot_product_attention(query, keys, keys, mask)
    model = Model()
    handle = attnplug.bind(model, "aten_math")
    with attnplug.patch_torch():
        found = F.scaled_dot_product_attention(query, keys, keys, mask)
    handle.remove()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _saved])
def test_a_handle_in_a_copied_model_is_that_of_the_copy(copied: Callable[[TwoLayers], TwoLayers]) -> None:
    model = TwoLayers()
    model.handles = [attnplug.bind(model, "aten_flash"), attnplug.bind(model.second, "aten_math")]
    other = copied(model)
    with attnplug.patch_torch():
        assert ran_in(lambda: other(Q)) == ["aten_flash", "aten_math"]
        for handle in other.handles:
            handle.remove()
        assert ran_in(lambda: other(Q)) == ["torch", "torch"]
        assert ran_in(lambda: model(Q)) == ["aten_flash", "aten_math"]
    assert "removed" in repr(copied(other).handles)


def test_a_copied_handle_is_removed_from_a_class_derived_from_the_bound_one() -> None:
    """As `fully_shard` derives one, of a module that is bound already."""
    model = Model()
    model.handle = attnplug.bind(model, "aten_math")
    model.__class__ = type("Sharded", (type(model),), {})
    other = copy.deepcopy(model)
    with attnplug.patch_torch():
        assert ran_in(lambda: other(Q)) == ["aten_math"]
        other.handle.remove()
        assert ran_in(lambda: other(Q)) == ["torch"]


def test_a_module_is_counted_until_its_last_handle_is_removed() -> None:
    """While one is bound, `nn.TransformerEncoderLayer` calls no fast path in C++, which no binding would reach."""
    model = TwoLayers()
    handles = [attnplug.bind(model.second, "aten_math") for _ in range(2)]
    handles.append(copy.copy(handles[0]))
    with attnplug.patch_torch():
        assert not torch.backends.mha.get_fastpath_enabled()
        for handle in handles:
            handle.remove()
        assert torch.backends.mha.get_fastpath_enabled()


def test_compiled_models_follow_a_binding() -> None:
    class Marked:
        composite = True

        @staticmethod
        def forward(params: Any) -> Any:
            return params.value + 100, None

    attnplug.register_impl(ImplSpec(name="marked", kernel=Marked, backend=None))
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    model = TwoLayers()
    with attnplug.patch_torch():
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        assert (compiled(Q) < 50).all()
        handle = attnplug.bind(model.second, "marked")
        assert (compiled(Q) > 50).all()
        handle.remove()
        assert (compiled(Q) < 50).all() and counter.frame_count == 2  # coming back compiles nothing


def test_a_wrong_binding_is_an_error_when_it_is_made() -> None:
    with pytest.raises(TypeError, match="module: expected a torch.nn.Module, got str"):
        attnplug.bind("layer", "torch")
    with pytest.raises(attnplug.UnknownImplementationError):
        attnplug.bind(Model(), "tourch")


def block(query: Tensor) -> Tensor:
    out = attnplug.scaled_dot_product_attention(query, query, query)
    return out + attnplug.scaled_dot_product_attention(out, query, query, impl="aten_flash")


def test_a_checkpoint_recomputes_with_the_implementations_of_its_forward() -> None:
    query = torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    with attnplug.sdpa_kernel("aten_math"):
        (expected,) = torch.autograd.grad(block(query).sum(), query)
        out = checkpoint(block, query, use_reentrant=False, context_fn=attnplug.checkpoint_contexts)
    with attnplug.sdpa_kernel("torch"), attnplug.record() as calls:
        (grad,) = torch.autograd.grad(out.sum(), query)
    assert [call.impl for call in calls] == ["aten_math", "aten_flash"]
    torch.testing.assert_close(grad, expected)


def test_a_checkpoint_of_an_unmodified_model_recomputes_alike() -> None:
    query = torch.randn(1, 2, 4, 8, requires_grad=True)
    with attnplug.patch_torch():
        with attnplug.sdpa_kernel("aten_math"):
            out = checkpoint(Model(), query, use_reentrant=False, context_fn=attnplug.checkpoint_contexts)
        assert ran_in(lambda: out.sum().backward()) == ["aten_math"]


def test_a_compiled_function_in_a_checkpoint_recomputes_under_the_activation_of_its_forward() -> None:
    spec = ImplSpec(
        name="square",
        kernel=Kernel(forward=lambda params: ((params.value * 2).square(), None), composite=True),
        backend=None,
    )
    attnplug.register_impl(spec)
    attend = torch.compile(lambda query: attnplug.scaled_dot_product_attention(query, query, query), backend="eager")
    query = torch.randn(1, 2, 4, 8, requires_grad=True)
    attnplug.activate_flash_attention_impl("square")
    out = checkpoint(attend, query, use_reentrant=False, context_fn=attnplug.checkpoint_contexts)
    attnplug.restore_flash_attention_impl()
    (grad,) = torch.autograd.grad(out.sum(), query)
    torch.testing.assert_close(grad, 8 * query)


def test_a_hook_that_fails_before_a_bound_forward_leaves_the_user_s_scope() -> None:
    module = Attention()

    def fail(*_: Any) -> None:
        raise ValueError

    module.register_forward_pre_hook(fail)
    attnplug.bind(module, MATH)
    with attnplug.sdpa_kernel(FLASH):
        with pytest.raises(ValueError):
            module(Q)
        assert ran() == FLASH
    assert ran() == DEFAULT


def test_a_bound_module_is_of_its_class_and_afterwards_nothing_else() -> None:
    class Special(Attention):
        """A class of the user's."""

    module = Special()
    handle = attnplug.bind(module, MATH)
    assert isinstance(module, Special)
    assert (type(module).__name__, type(module).__module__) == ("Special", __name__)
    assert type(module).__doc__ == "A class of the user's."
    handle.remove()
    assert type(module) is Special and vars(module).keys() == vars(Special()).keys()


def test_a_class_that_keeps_a_list_of_its_own_hears_of_no_binding() -> None:
    class Listed(Attention):
        known: dict[str, type] = {}

        def __init_subclass__(cls, *, name: str, **arguments: Any) -> None:
            super().__init_subclass__(**arguments)
            Listed.known[name] = cls

    module = Listed()
    attnplug.bind(module, MATH)
    assert ran_in(lambda: module(Q)) == [MATH] and not Listed.known

    class Derived(type(module), name="derived"):  # type: ignore[misc]  # by somebody else, as parametrizations are
        pass

    assert Listed.known == {"derived": Derived}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_several_bindings_the_last_counts_and_they_go_in_any_order(order: tuple[int, int]) -> None:
    seen: list[str] = []
    module = Attention(lambda: seen.append(ran()))
    handles = [attnplug.bind(module, name) for name in (MATH, FLASH)]
    module(Q)
    handles[order[0]].remove()
    module(Q)
    handles[order[1]].remove()
    module(Q)
    assert seen == [FLASH, (FLASH, MATH)[order[0]], DEFAULT]


def test_a_replica_of_a_bound_module_attends_with_its_own_weights() -> None:
    """As `nn.DataParallel` makes them: its attributes, with other parameters put into their place."""

    class Weighted(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, hidden: Tensor) -> Tensor:
            seen.append(ran())
            return hidden * self.weight

    seen: list[str] = []
    module = Weighted()
    attnplug.bind(module, MATH)
    replica = module._replicate_for_data_parallel()
    replica.weight = torch.full((8,), 2.0)
    assert torch.equal(replica(Q), 2 * Q) and seen == [MATH]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_bound_module_can_be_scripted_and_is_then_pytorch_s_own() -> None:
    class Unmodified(nn.Module):
        def forward(self, query: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(query, query, query)

    module = Unmodified()
    handle = attnplug.bind(module, MATH)
    scripted = torch.jit.script(module)
    handle.remove()
    torch.testing.assert_close(scripted(Q), module(Q))


def test_what_cannot_be_bound_is_refused() -> None:
    with pytest.raises(TypeError, match="is TorchScript"):
        attnplug.bind(torch.jit.script(nn.Linear(2, 2)), MATH)
    with pytest.raises(ValueError, match="is not initialized; call it once"):
        attnplug.bind(nn.LazyLinear(2), MATH)
    lists = nn.ModuleList([Model()]), nn.ModuleDict({"first": Model()}), nn.ParameterList(), nn.ParameterDict()
    for module in (*lists, nn.Module()):
        with pytest.raises(TypeError, match=f"{type(module).__name__} has no forward to bind; bind each module"):
            attnplug.bind(module, MATH)


def test_what_is_called_without_a_forward_of_its_class_is_bound() -> None:
    class Called(nn.Module):
        def __call__(self) -> Tensor:
            return attnplug.scaled_dot_product_attention(Q, Q, Q)

    class Layers(nn.ModuleList):
        def forward(self) -> Tensor:
            return sum(layer() for layer in self)

    given = nn.Module()
    given.forward = lambda: attnplug.scaled_dot_product_attention(Q, Q, Q)
    for module in (Called(), given, Layers([Called()])):
        with attnplug.bind(module, MATH):
            assert ran_in(module) == ["aten_math"]


def test_a_binding_ends_with_its_block_however_that_is_left() -> None:
    module = Model()
    with attnplug.patch_torch():
        with pytest.raises(KeyError), attnplug.bind(module, "aten_math") as handle:
            assert ran_in(lambda: module(Q)) == ["aten_math"]
            raise KeyError
        assert ran_in(lambda: module(Q)) == ["torch"] and repr(handle) == "<BindingHandle: removed>"
