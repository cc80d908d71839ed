"""Opaque kernels, which no trace can look into, given a forward and a backward alone: nothing else is asked.

The kernel here saves what its backward needs, draws its own dropout, and says nothing of shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import attnplug
from attnplug import Capabilities, Feature, ImplSpec, SDPAParams

SHAPE = (2, 2, 5, 8)


class Saving:
    """Saves its weights and its dropout mask for backward, one of them only sometimes; its out lies in columns."""

    @staticmethod
    def forward(params: SDPAParams) -> tuple[Tensor | None, ...]:
        query, key, value = (tensor.detach() for tensor in (params.query, params.key, params.value))
        logits = params.scale * query @ key.mT
        weights, keep = torch.softmax(logits, -1), None
        if params.dropout:
            keep = (torch.rand(weights.shape) >= params.dropout) / (1 - params.dropout)
        out = (weights if keep is None else weights * keep) @ value
        return torch.from_numpy(out.mT.numpy().copy()).mT, torch.logsumexp(logits, -1), weights, keep

    @staticmethod
    def backward(
        params: SDPAParams, grad_out: Tensor, grad_lse: None, out: Tensor, lse: Tensor, *saved: Tensor
    ) -> tuple[Tensor, ...]:
        weights, keep = saved
        keep = torch.ones_like(weights) if keep is None else keep
        grad_weights = (grad_out @ params.value.mT) * keep
        grad_logits = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
        query, key = params.query, params.key
        return params.scale * grad_logits @ key, params.scale * grad_logits.mT @ query, (weights * keep).mT @ grad_out


@pytest.fixture(autouse=True)
def _saving() -> None:
    capabilities = Capabilities(features={Feature.LSE, Feature.DROPOUT})
    attnplug.register_impl(ImplSpec(name="saving", kernel=Saving, backend=None, capabilities=capabilities))


def attend(query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0) -> Tensor:
    return attnplug.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, impl="saving")


def step(function: Callable[..., Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    """Return the result and the gradients of one step that starts from the same inputs and the same seed."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(SHAPE, generator=generator, requires_grad=True) for _ in range(3)]
    torch.manual_seed(0)
    out = function(*inputs, *arguments)
    return out, *torch.autograd.grad(out.square().sum(), inputs)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_forward_saves_need_not_be_described(backend: str, dropout: float) -> None:
    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    torch.testing.assert_close(step(compiled, dropout), step(attend, dropout))


def test_a_compiled_backward_leaves_the_random_state_alone() -> None:
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    query = torch.randn(SHAPE, requires_grad=True)
    out = compiled(query, query, query, 0.5)
    before = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_equal_calls_in_one_graph_draw_differently(backend: str) -> None:
    def twice(query: Tensor) -> tuple[Tensor, Tensor]:
        return attend(query, query, query, 0.5), attend(query, query, query, 0.5)

    first, second = torch.compile(twice, backend=backend, fullgraph=True)(torch.randn(SHAPE, requires_grad=True))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_checkpoint_draws_the_same_mask_again(backend: str) -> None:
    def block(*inputs: Tensor) -> Tensor:
        return checkpoint(lambda *tensors: attend(*tensors, 0.5).sin(), *inputs, use_reentrant=False)

    torch.testing.assert_close(step(torch.compile(block, backend=backend, fullgraph=True)), step(block))


def test_lengths_may_change_without_a_description() -> None:
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (4, 6, 9):
        query = torch.randn(1, 2, length, 8, requires_grad=True)
        (theirs,) = torch.autograd.grad(attend(query, query, query).square().sum(), query)
        (ours,) = torch.autograd.grad(compiled(query, query, query).square().sum(), query)
        torch.testing.assert_close(ours, theirs)


class SavesWork(Saving):
    """Its gradients are the very tensors that it was given."""

    @staticmethod
    def backward(params: SDPAParams, grad_out: Tensor, *others: Any) -> tuple[Tensor, ...]:
        return grad_out, params.key, grad_out.view(grad_out.shape)


def test_a_graph_gets_gradients_in_memory_of_their_own() -> None:
    """It may reuse the memory of what an operator was given, and of each of its results."""
    attnplug.register_impl(ImplSpec(name="saves_work", kernel=SavesWork, backend=None))
    seen: list[tuple[set[int], list[int]]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if str(func).startswith("attnplug.saves_work_backward"):
                given = {tensor.data_ptr() for tensor in args if isinstance(tensor, Tensor)}
                seen.append((given, [tensor.data_ptr() for tensor in out]))
            return out

    leaves = [torch.randn(SHAPE, requires_grad=True) for _ in range(3)]
    grad = torch.randn(SHAPE)
    with Watch():
        out = attnplug.scaled_dot_product_attention(*leaves, impl="saves_work")
        found = torch.autograd.grad(out, leaves, grad)
    ((given, returned),) = seen
    assert len(set(returned)) == 3
    assert given.isdisjoint(returned)
    for gradient, expected in zip(found, (grad, leaves[1].detach(), grad), strict=True):
        assert torch.equal(gradient, expected)


def test_the_operator_passes_opcheck_with_dropout() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    query = torch.randn(SHAPE, requires_grad=True)
    torch.compile(attend, backend=counter, fullgraph=True)(query, query, query, 0.5)
    node = next(node for node in counter.graphs[0].graph.nodes if "attnplug" in str(node.target))
    arguments = [torch.randn(SHAPE, requires_grad=True) if hasattr(item, "meta") else item for item in node.args]
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")  # the fourth compares random numbers
    torch.library.opcheck(node.target, tuple(arguments), test_utils=utilities)


# torch.func -------------------------------------------------------------------------------------------------

Attend = Callable[..., Tensor]
reference = torch.nn.functional.scaled_dot_product_attention


def batches(*leading: int) -> list[Tensor]:
    return [torch.randn(*leading, *SHAPE) for _ in range(3)]


@pytest.mark.parametrize("impl", ["saving", "math_ref", "aten_math", "aten_flash"])
def test_func_grad_and_vmap_give_what_they_give_for_pytorch(impl: str) -> None:
    def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: function(*inputs).square().sum()

    def ours(*inputs: Tensor) -> Tensor:
        return attnplug.scaled_dot_product_attention(*inputs, impl=impl)

    query, key, value = batches(3)
    theirs_vmap = torch.stack([reference(*each) for each in zip(query, key, value, strict=True)])
    torch.testing.assert_close(torch.func.vmap(ours)(query, key, value), theirs_vmap)
    shared = torch.func.vmap(ours, in_dims=(0, None, None))(query, key[0], value[0])
    torch.testing.assert_close(shared, torch.stack([reference(each, key[0], value[0]) for each in query]))

    one = (query[0], key[0], value[0])
    everything = (0, 1, 2)
    torch.testing.assert_close(
        torch.func.grad(loss(ours), everything)(*one), torch.func.grad(loss(reference), everything)(*one)
    )
    per_sample = torch.func.vmap(torch.func.grad(loss(ours), everything))(query, key, value)
    theirs = [torch.func.grad(loss(reference), everything)(*each) for each in zip(query, key, value, strict=True)]
    torch.testing.assert_close(per_sample, tuple(torch.stack(column) for column in zip(*theirs, strict=True)))


def test_vmap_gives_a_kernel_elements_in_memory_of_their_own_whatever_dimension_it_took_away() -> None:
    class Dense(Saving):
        @staticmethod
        def forward(params: SDPAParams) -> tuple[Tensor | None, ...]:
            assert params.query.is_contiguous()
            return Saving.forward(params)

    attnplug.register_impl(ImplSpec(name="dense", kernel=Dense, backend=None))
    query = torch.randn(*SHAPE, 3)
    out = torch.func.vmap(lambda each: attnplug.scaled_dot_product_attention(each, each, each, impl="dense"), 4)(query)
    torch.testing.assert_close(out, torch.stack([reference(*[query[..., n]] * 3) for n in range(3)]))


def test_vmap_draws_anew_for_each_element_or_says_why_not() -> None:
    query = torch.randn(SHAPE).expand(4, *SHAPE)

    def drop(each: Tensor) -> Tensor:
        return attend(each, each, each, 0.5)

    out = torch.func.vmap(drop, randomness="different")(query)
    assert not any(torch.equal(out[0], other) for other in out[1:])
    for randomness in ("error", "same"):
        with pytest.raises(RuntimeError, match=r"'saving' with dropout_p > 0 .*randomness='different'"):
            torch.func.vmap(drop, randomness=randomness)(query)


def test_forward_mode_and_second_derivatives_are_errors_and_never_zeros() -> None:
    query = torch.randn(SHAPE)

    def loss(each: Tensor) -> Tensor:
        return attend(each, each, each).square().sum()

    with pytest.raises(attnplug.GradientError, match=r"'saving' has no forward-mode derivatives.*SDPBackend\.MATH"):
        torch.func.jvp(loss, (query,), (query,))
    with pytest.raises(attnplug.GradientError, match="'saving' has no second derivatives"):
        torch.func.grad(lambda each: torch.func.grad(loss)(each).square().sum())(query)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(attnplug.GradientError, match="'saving' has no forward-mode derivatives"),
    ):
        loss(torch.autograd.forward_ad.make_dual(query, query))


def test_a_kernel_of_operators_without_forward_mode_derivatives_is_named_with_the_way_out() -> None:
    """As an opaque kernel is, rather than PyTorch's operator alone."""

    class Fused:
        composite = True

        @staticmethod
        def forward(params: SDPAParams) -> tuple[Tensor, Tensor]:
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            out, lse = flash(params.query, params.key, params.value, scale=params.scale)
            return out, lse

    attnplug.register_impl(ImplSpec(name="fused", kernel=Fused, backend=None))
    query = torch.randn(SHAPE)

    def function(each: Tensor) -> Tensor:
        out: Tensor = attnplug.scaled_dot_product_attention(each, each, each, impl="fused")
        return out

    for transform in (torch.func.jvp, lambda function, inputs, _: torch.func.linearize(function, *inputs)):
        with pytest.raises(attnplug.GradientError, match=r"'fused' has no forward-mode derivatives.*SDPBackend\.MATH"):
            transform(function, (query,), (query,))
    attnplug.unregister_impl("fused")


@pytest.mark.parametrize("impl", ["math_ref", "aten_math"])
def test_the_math_family_has_forward_mode_derivatives(impl: str) -> None:
    query, tangent = torch.randn(SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)

    def function(each: Tensor) -> Tensor:
        return attnplug.scaled_dot_product_attention(each, each, each, impl=impl)

    def formula(each: Tensor) -> Tensor:
        return torch.softmax(each @ each.mT / SHAPE[-1] ** 0.5, -1) @ each

    torch.testing.assert_close(
        torch.func.jvp(function, (query,), (tangent,)), torch.func.jvp(formula, (query,), (tangent,))
    )


def test_a_transform_that_is_compiled_gives_what_it_gives_uncompiled() -> None:
    def gradient(query: Tensor) -> Tensor:
        return torch.func.grad(lambda each: attend(each, query, query).square().sum())(query)

    query = torch.randn(SHAPE)
    torch.testing.assert_close(torch.compile(gradient, backend="aot_eager")(query), gradient(query))


def test_vmap_compiles_without_a_break() -> None:
    def mapped(function: Attend) -> Attend:
        return lambda query, key, value: torch.func.vmap(function, (0, None, 0), 1)(query, key[0], value)

    given = [each.requires_grad_() for each in batches(3)]
    outs = [torch.compile(mapped(attend), backend="aot_eager", fullgraph=True)(*given), mapped(reference)(*given)]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*[torch.autograd.grad(out.square().sum(), given) for out in outs])
    query = batches(2, 3)[0]
    twice = torch.func.vmap(torch.func.vmap(lambda each: attend(each, each, each)))
    torch.testing.assert_close(torch.compile(twice, backend="aot_eager", fullgraph=True)(query), twice(query))


def test_compiled_vmap_draws_anew_for_each_element_or_says_why_not() -> None:
    def mapped(randomness: str) -> Tensor:
        drop = torch.func.vmap(lambda each: attend(each, each, each, 0.5), randomness=randomness)
        return torch.compile(drop, backend="aot_eager", fullgraph=True)(torch.randn(SHAPE).expand(4, *SHAPE))

    out = mapped("different")
    assert not any(torch.equal(out[0], other) for other in out[1:])
    for randomness in ("error", "same"):
        with pytest.raises(RuntimeError, match=r"'saving' with dropout_p > 0 .*randomness='different'"):
            mapped(randomness)


class OfNumpy:
    """Reads the memory of its tensors, as a GPU's kernels do; numpy refuses one whose numbers do not lie there."""

    @staticmethod
    def forward(params: SDPAParams) -> tuple[Tensor, ...]:
        read = [torch.from_numpy(tensor.detach().numpy()) for tensor in (params.query, params.key, params.value)]
        return Saving.forward(replace(params, query=read[0], key=read[1], value=read[2]))[:2]  # type: ignore[return-value]  # both are there

    @staticmethod
    def backward(params: SDPAParams, grad_out: Tensor, grad_lse: None, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        query, key, value, grad_out = (
            torch.from_numpy(tensor.detach().numpy()) for tensor in (params.query, params.key, params.value, grad_out)
        )
        weights = torch.exp(params.scale * query @ key.mT - lse.unsqueeze(-1))
        return Saving.backward(
            replace(params, query=query, key=key, value=value), grad_out, grad_lse, out, lse, weights, None
        )


def test_a_minus_that_pytorch_has_put_off_is_in_the_memory_that_a_kernel_reads() -> None:
    """The imaginary part of a conjugate is a view of the number's own memory, with the other sign."""
    attnplug.register_impl(ImplSpec(name="reading", kernel=OfNumpy, backend=None))
    numbers = [torch.randn(SHAPE, dtype=torch.complex64).requires_grad_() for _ in range(3)]

    def gradients(impl: str) -> tuple[Tensor, ...]:
        query, key, value = (each.conj().imag for each in numbers)
        assert query.is_neg()
        out = attnplug.scaled_dot_product_attention(query, key, value, impl=impl)
        return (out, *torch.autograd.grad(torch.complex(out, out).conj().imag.square().sum(), numbers))

    for _ in range(2):
        torch.testing.assert_close(gradients("reading"), gradients("aten_math"))
    attnplug.unregister_impl("reading")


# Many gradients at once --------------------------------------------------------------------------------------


def by_one_call(function: Attend, given: list[Tensor], grads: Tensor) -> Any:
    return torch.autograd.grad(function(*given), given, grads, is_grads_batched=True)


def by_vmap(function: Attend, given: list[Tensor], grads: Tensor) -> Any:
    out = function(*given)
    return torch.func.vmap(lambda grad: torch.autograd.grad(out, given, grad))(grads)


def by_both(function: Attend, given: list[Tensor], grads: Tensor) -> Any:
    out = function(*given)
    return torch.func.vmap(lambda grads: torch.autograd.grad(out, given, grads, is_grads_batched=True))(
        grads.unflatten(0, (2, -1))
    )


def by_one_call_for_a_sum(function: Attend, given: list[Tensor], grads: Tensor) -> Any:
    return torch.autograd.grad(function(*given).sum(), given, grads[:, 0, 0, 0, 0], is_grads_batched=True)


def by_jacobian(function: Attend, given: list[Tensor], grads: Tensor) -> Any:
    return torch.autograd.functional.jacobian(lambda *each: function(*each)[:, 0], tuple(given), vectorize=True)


def by_checkpoint(function: Attend, given: list[Tensor], grads: Tensor) -> Any:
    return by_one_call(lambda *each: checkpoint(function, *each, use_reentrant=False), given, grads)


def with_a_graph(function: Attend, given: list[Tensor], grads: Tensor) -> Any:
    return torch.autograd.grad(function(*given), given, grads, is_grads_batched=True, create_graph=True)


def by_vmap_with_a_graph(function: Attend, given: list[Tensor], grads: Tensor) -> Any:
    out = function(*given)
    return torch.func.vmap(lambda grad: torch.autograd.grad(out, given, grad, create_graph=True))(grads)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("impl", ["reading", "math_ref", "aten_flash"])
@pytest.mark.parametrize(
    "differentiate",
    [by_one_call, by_vmap, by_both, by_one_call_for_a_sum, by_jacobian, by_checkpoint, with_a_graph],
)
def test_many_gradients_at_once_are_what_they_are_for_pytorch(impl: str, differentiate: Any) -> None:
    attnplug.register_impl(ImplSpec(name="reading", kernel=OfNumpy, backend=None))
    given = [torch.randn(SHAPE).requires_grad_() for _ in range(3)]
    grads = torch.randn(4, *SHAPE)
    found = differentiate(lambda *each: attnplug.scaled_dot_product_attention(*each, impl=impl), given, grads)
    torch.testing.assert_close(found, differentiate(reference, given, grads))


def test_many_gradients_through_out_and_lse_at_once_are_those_of_the_formula() -> None:
    class WithLse(OfNumpy):
        @staticmethod
        def backward(params: SDPAParams, grad_out: Tensor, grad_lse: Any, out: Tensor, lse: Tensor) -> Any:
            query, key, value = OfNumpy.backward(params, grad_out, None, out, lse)
            weights = torch.exp(params.scale * params.query @ params.key.mT - lse.unsqueeze(-1))
            weights *= torch.from_numpy(grad_lse.numpy()).unsqueeze(-1) * params.scale
            return query + weights @ params.key, key + weights.mT @ params.query, value

    capabilities = Capabilities(features={Feature.LSE, Feature.LSE_GRADIENT})
    attnplug.register_impl(ImplSpec(name="with_lse", kernel=WithLse, backend=None, capabilities=capabilities))
    given = [torch.randn(SHAPE).requires_grad_() for _ in range(3)]
    grads = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE[:-1])

    def gradients(impl: str) -> tuple[Tensor, ...]:
        results = attnplug.scaled_dot_product_attention(*given, return_lse=True, impl=impl)
        return torch.autograd.grad(results, given, grads, is_grads_batched=True)

    torch.testing.assert_close(gradients("with_lse"), gradients("math_ref"))


def test_what_many_gradients_at_once_are_asked_for_in_vain_is_said_as_for_one() -> None:
    attnplug.register_impl(ImplSpec(name="reading", kernel=OfNumpy, backend=None))
    query, grads = torch.randn(SHAPE).requires_grad_(), torch.randn(3, *SHAPE)
    for differentiate in (with_a_graph, by_vmap_with_a_graph):
        (found,) = differentiate(
            lambda each: attnplug.scaled_dot_product_attention(*[each] * 3, impl="reading"), [query], grads
        )
        with pytest.raises(attnplug.GradientError, match="'reading' has no second derivatives"):
            found.sum().backward()


def test_what_differentiates_a_gradient_gets_an_error_and_never_zeros() -> None:
    attnplug.register_impl(ImplSpec(name="reading", kernel=OfNumpy, backend=None))
    query, grad = torch.randn(SHAPE).requires_grad_(), torch.randn(SHAPE)

    def function(each: Tensor) -> Tensor:
        out: Tensor = attnplug.scaled_dot_product_attention(each, each, each, impl="reading")
        return out

    def by_the_gradient_given() -> Any:
        return torch.autograd.functional.jvp(function, query.detach(), grad)  # differentiates backward by what it got

    def by_a_tangent() -> Any:
        out = function(query)
        with torch.autograd.forward_ad.dual_level():
            return torch.autograd.grad(out, query, torch.autograd.forward_ad.make_dual(grad, grad))

    def among_others() -> Any:
        (found,) = torch.autograd.grad(function(query), query, grad, create_graph=True)
        return torch.autograd.grad(found.sum() + query.sum(), query)

    for mode, differentiate in (
        (nullcontext, by_the_gradient_given),
        (nullcontext, by_a_tangent),
        (nullcontext, among_others),
        (Seeing, by_a_tangent),
    ):
        with mode(), pytest.raises(attnplug.GradientError, match="'reading' has no second derivatives"):
            differentiate()
    with pytest.raises(attnplug.GradientError, match="'reading' has no forward-mode derivatives"):
        torch.func.jvp(torch.func.functionalize(function), (query.detach(),), (grad,))


class Seeing(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def test_an_lse_without_a_gradient_is_refused_under_vmap_in_compiled_as_in_eager_code() -> None:
    mapped = torch.func.vmap(
        lambda each: attnplug.scaled_dot_product_attention(each, each, each, impl="saving", return_lse=True)
    )
    given = batches(3)[0].requires_grad_()
    for function in (mapped, torch.compile(mapped, backend="aot_eager", fullgraph=True)):
        out, lse = function(given)
        torch.testing.assert_close(
            torch.autograd.grad(out.sin().sum(), given, retain_graph=True),
            torch.autograd.grad(reference(given, given, given).sin().sum(), given),
        )
        with pytest.raises(attnplug.GradientError, match="'saving' gives no gradient through lse"):
            (out.sum() + lse.sum()).backward()


def test_vmap_over_no_elements_is_refused_in_words() -> None:
    attnplug.register_impl(ImplSpec(name="reading", kernel=OfNumpy, backend=None))
    query = torch.randn(SHAPE).requires_grad_()
    out = attnplug.scaled_dot_product_attention(query, query, query, impl="reading")
    nothing = torch.zeros(0, *SHAPE)
    for run in (
        lambda: torch.func.vmap(lambda each: attend(each, each, each))(nothing),
        lambda: torch.func.vmap(lambda grad: torch.autograd.grad(out, query, grad))(nothing),
    ):
        with pytest.raises(RuntimeError, match="cannot be run for a dimension of size 0"):
            run()


def test_what_forward_saves_of_some_elements_alone_is_not_lost() -> None:
    class Moody(Saving):
        saves: list[bool] = []

        @classmethod
        def forward(cls, params: SDPAParams) -> tuple[Tensor | None, ...]:
            out, lse, weights, _ = Saving.forward(params)
            return out, lse, weights, torch.ones_like(params.query[..., :1]) if cls.saves.pop() else None

    attnplug.register_impl(ImplSpec(name="moody", kernel=Moody, backend=None))
    for saves in ([True, False], [False, True]):
        Moody.saves = saves
        with pytest.raises(TypeError, match="NoneType"):
            torch.func.vmap(lambda each: attnplug.scaled_dot_product_attention(each, each, each, impl="moody"))(
                batches(2)[0]
            )
