"""What an author writes, and what they get for it: one forward, maybe a backward, and a statement."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import attnplug
from attnplug import Capabilities, Feature, ImplSpec, SDPAParams, SDPBackend
from author_kernels import WithBackward, forward

SHAPE = (1, 2, 4, 8)


@pytest.fixture
def register() -> Callable[..., None]:
    def add(name: str, kernel: Any, *features: Feature, **fields: Any) -> None:
        capabilities = Capabilities(features=features, **fields)
        attnplug.register_impl(
            ImplSpec(name=name, kernel=kernel, backend=SDPBackend.EFFICIENT_ATTENTION, capabilities=capabilities)
        )

    return add


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(SHAPE, dtype=dtype, requires_grad=True) for _ in range(3)]


def test_a_forward_alone_runs_and_shows_up_everywhere(register: Callable[..., None]) -> None:
    register("mine", forward, Feature.LSE)
    query = torch.randn(SHAPE)
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    torch.testing.assert_close(attnplug.scaled_dot_product_attention(query, query, query, impl="mine"), expected)
    assert "mine" in attnplug.list_flash_attention_impls()
    record = next(record for record in attnplug.list_impls() if record.name == "mine")
    assert (record.status, record.distribution) == ("available", "this program")
    assert "mine" in str(attnplug.explain(query, query, query))


def test_without_a_backward_it_is_passed_over_when_a_gradient_is_needed(register: Callable[..., None]) -> None:
    register("mine", forward)
    query, key, value = inputs()
    with attnplug.sdpa_kernel(["mine", "aten_math"], set_priority=True), attnplug.record() as calls:
        attnplug.scaled_dot_product_attention(query, key, value)
        with torch.no_grad():
            attnplug.scaled_dot_product_attention(query, key, value)
        attnplug.scaled_dot_product_attention(query.detach(), key.detach(), value.detach())
    assert [call.impl for call in calls] == ["aten_math", "mine", "mine"]
    assert calls[0].passed_over == {"mine": ("has no backward, and a gradient is needed",)}


def test_without_a_backward_it_is_passed_over_when_a_gradient_is_needed_outside_a_vmap(
    register: Callable[..., None],
) -> None:
    register("mine", forward)
    tensors, mask = [tensor[None] for tensor in inputs()], torch.zeros(1, 4, 4, dtype=torch.float64)

    def ran(*given: Tensor) -> str:
        with attnplug.sdpa_kernel(["mine", "aten_math"], set_priority=True), attnplug.record() as calls:
            out = torch.func.vmap(torch.func.vmap(attnplug.scaled_dot_product_attention))(
                *(tensor[None] for tensor in given)
            )
        if out.requires_grad:
            out.sum().backward()
        return calls[0].impl

    without = [tensor.detach() for tensor in tensors]
    assert ran(*tensors) == "aten_math"
    assert ran(*without) == "mine"
    with torch.no_grad():
        assert ran(*tensors) == "mine"
    register("masked", forward, Feature.ADDITIVE_MASK)
    with attnplug.sdpa_kernel("masked"), pytest.raises(attnplug.NoImplementationError, match="gradient of attn_mask"):
        torch.func.vmap(attnplug.scaled_dot_product_attention)(*without, mask.requires_grad_())
    slopes = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="alibi_slopes: requires a gradient"):
        torch.func.vmap(lambda *given: attnplug.scaled_dot_product_attention(*given[:3], alibi_slopes=given[3]))(
            *without, slopes
        )


@pytest.mark.parametrize("recorded_first", [True, False])
def test_calls_alike_but_for_the_grad_mode_are_decided_apart(
    register: Callable[..., None], recorded_first: bool
) -> None:
    register("mine", forward)
    query, key, value = inputs()
    modes = [recorded_first, not recorded_first] * 3
    with attnplug.sdpa_kernel(["mine", "aten_math"], set_priority=True), attnplug.record() as calls:
        for mode in modes:
            with torch.set_grad_enabled(mode):
                out = attnplug.scaled_dot_product_attention(query, key, value)
            assert out.requires_grad is mode
    assert [call.impl for call in calls] == ["aten_math" if mode else "mine" for mode in modes]


class MadeOfPyTorchs:
    """A kernel that puts something around PyTorch's own attention."""

    @staticmethod
    def forward(params: SDPAParams) -> tuple[Tensor, None]:
        return F.scaled_dot_product_attention(params.query, params.key, params.value, scale=params.scale) * 2, None

    @staticmethod
    def backward(params: SDPAParams, grad_out: Tensor, *_: Any) -> tuple[Tensor, ...]:
        given = [tensor.detach().requires_grad_() for tensor in (params.query, params.key, params.value)]
        with torch.enable_grad():
            out = F.scaled_dot_product_attention(*given, scale=params.scale) * 2
        return torch.autograd.grad(out, given, grad_out)


class ThroughWhichTracesSee:
    composite = True
    forward = MadeOfPyTorchs.forward


class AfterAnothersKernel(MadeOfPyTorchs):
    """A kernel that first calls another plugin's, by attnplug's function, and then PyTorch's own attention."""

    @staticmethod
    def forward(params: SDPAParams) -> tuple[Tensor, None]:
        attnplug.scaled_dot_product_attention(params.query, params.key, params.value, impl="another")
        return MadeOfPyTorchs.forward(params)


@pytest.mark.parametrize("kernel", [MadeOfPyTorchs, ThroughWhichTracesSee, AfterAnothersKernel])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_kernel_may_be_made_of_pytorch_s_attention(
    register: Callable[..., None], kernel: Any, compiled: bool
) -> None:
    query = inputs()[0]
    (expected,) = torch.autograd.grad(F.scaled_dot_product_attention(query, query, query).sum() * 2, query)
    register("another", forward)
    register("mine", kernel)
    attnplug.activate_flash_attention_impl("mine")

    def attend(query: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, query, query)

    function = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend
    with attnplug.record() as calls:
        (found,) = torch.autograd.grad(function(query).sum(), query)
    assert [call.impl for call in calls if call.impl != "another"] == ["mine"]
    torch.testing.assert_close(found, expected)


def test_with_a_backward_it_gets_autograd(register: Callable[..., None]) -> None:
    register("mine", WithBackward, Feature.LSE, Feature.LSE_GRADIENT)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return attnplug.scaled_dot_product_attention(query, key, value, return_lse=True, impl="mine")

    assert torch.autograd.gradcheck(call, inputs())


def test_the_same_tensor_may_come_three_times(register: Callable[..., None]) -> None:
    register("mine", WithBackward)
    query = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    out = attnplug.scaled_dot_product_attention(query, query, query, impl="mine")
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    grad = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad(result, query, grad)[0] for result in (out, expected)))


def test_lse_gradients_are_refused_unless_declared(register: Callable[..., None]) -> None:
    register("mine", WithBackward, Feature.LSE)
    out, lse = attnplug.scaled_dot_product_attention(*inputs(), return_lse=True, impl="mine")
    with pytest.raises(attnplug.GradientError, match="'mine' gives no gradient through lse"):
        (out.sum() + lse.sum()).backward()


@pytest.mark.parametrize("impl", ["mine", "aten_flash"])
def test_lse_gradients_are_refused_in_graphs_too(impl: str, register: Callable[..., None]) -> None:
    register("mine", WithBackward, Feature.LSE)
    attend = functools.partial(attnplug.scaled_dot_product_attention, return_lse=True, impl=impl)

    def loss(*tensors: Tensor) -> Tensor:
        out, lse = attend(*tensors)
        return out.sum() + lse.sum()

    message = f"'{impl}' gives no gradient through lse"
    compiled, given = torch.compile(attend, backend="aot_eager", fullgraph=True), inputs()
    out, _ = compiled(*given)
    expected = torch.autograd.grad(attend(*given)[0].sum(), given)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), given), expected)
    with pytest.raises(attnplug.GradientError, match=message):
        sum(result.sum() for result in compiled(*given)).backward()
    with pytest.raises(attnplug.GradientError, match=message):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(*given).backward()


def test_an_lse_without_a_gradient_under_transforms_is_refused_in_words_or_returned(
    register: Callable[..., None],
) -> None:
    class OfOperators:
        composite = True
        forward = staticmethod(forward)

    register("mine", OfOperators, Feature.LSE)
    query = torch.randn(SHAPE)

    def attend(each: Tensor) -> tuple[Tensor, Tensor]:
        return attnplug.scaled_dot_product_attention(each, each, each, impl="mine", return_lse=True)

    with pytest.raises(attnplug.GradientError, match="'mine' gives no gradient through lse"):
        torch.func.jvp(attend, (query,), (query,))
    for tensor in (query, query.clone().requires_grad_()):
        torch.testing.assert_close(torch.func.functionalize(attend)(tensor), attend(query))
    torch.testing.assert_close(
        torch.func.grad(torch.func.functionalize(lambda each: attend(each)[0].sum()))(query),
        torch.func.grad(lambda each: attend(each)[0].sum())(query),
    )


def test_an_lse_that_is_kept_keeps_nothing_else_of_the_call(register: Callable[..., None]) -> None:
    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor) -> Tensor:
            nodes.append(weakref.ref(ctx))
            return logits.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    class Composite:
        composite = True

        @staticmethod
        def forward(params: SDPAParams) -> tuple[Tensor, Tensor]:
            logits = Kept.apply(params.scale * params.query @ params.key.mT)
            return torch.softmax(logits, -1) @ params.value, torch.logsumexp(logits, -1)

    nodes: list[Any] = []
    register("mine", Composite, Feature.LSE)
    out, lse = attnplug.scaled_dot_product_attention(*inputs(), return_lse=True, impl="mine")
    assert lse.requires_grad and nodes[0]() is not None
    del out
    assert nodes[0]() is None


def test_no_backward_runs_for_a_loss_that_sends_no_gradient(register: Callable[..., None]) -> None:
    class Stopped(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, out: Tensor) -> Tensor:
            return out.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    class Counted(WithBackward):
        @staticmethod
        def backward(*given: Any) -> Any:
            ran.append(given)
            return WithBackward.backward(*given)

    ran: list[Any] = []
    register("mine", Counted)
    query, key, value = inputs()
    for impl in ("aten_math", "mine"):
        Stopped.apply(attnplug.scaled_dot_product_attention(query, key, value, impl=impl)).sum().backward()
        assert query.grad is None and not ran

    def traced(*tensors: Tensor) -> Any:
        loss = Stopped.apply(attnplug.scaled_dot_product_attention(*tensors, impl="mine")).sum()
        return torch.autograd.grad(loss, tensors, allow_unused=True), loss

    assert "mine_backward" not in make_fx(traced)(query, key, value).code


def test_second_derivatives_are_refused_unless_declared(register: Callable[..., None]) -> None:
    register("mine", WithBackward)
    query, key, value = inputs()
    out = attnplug.scaled_dot_product_attention(query, key, value, impl="mine")
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), query)[0])
    with pytest.raises(attnplug.GradientError, match="'mine' has no second derivatives"):
        grad.sum().backward()


def test_inference_mode_runs_without_a_graph(register: Callable[..., None]) -> None:
    register("mine", WithBackward)
    with torch.inference_mode():
        query = torch.randn(SHAPE)
        out = attnplug.scaled_dot_product_attention(query, query, query, impl="mine")
    assert out.is_inference() and not out.requires_grad


def test_the_kernel_sees_one_form_whatever_the_call_looked_like(register: Callable[..., None]) -> None:
    seen: list[SDPAParams] = []

    def look(params: SDPAParams) -> tuple[Tensor, None]:
        seen.append(params)
        groups = params.query.shape[1] // params.key.shape[1]
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (params.key, params.value))
        logits = params.scale * params.query @ key.mT
        if params.attn_mask is not None:
            logits = logits.masked_fill(~params.attn_mask, float("-inf"))
        return torch.softmax(logits, -1) @ value, None

    register("look", look, Feature.BOOLEAN_MASK, Feature.GQA)
    shapes = [
        ((4, 8), (6, 8), (4, 6)),
        ((2, 4, 8), (2, 6, 8), (4, 6)),
        ((2, 4, 8), (3, 2, 6, 8), (3, 1, 4, 6)),
        ((3, 1, 2, 4, 8), (5, 2, 6, 8), (3, 5, 2, 4, 6)),
        ((3, 5, 1, 4, 8), (3, 5, 2, 6, 8), (1, 6)),
    ]
    for query_shape, key_shape, mask_shape in shapes:
        query, key = torch.randn(query_shape), torch.randn(key_shape)
        mask = torch.rand(mask_shape) > 0.3
        mask[..., 0] = True
        out = attnplug.scaled_dot_product_attention(query, key, key, mask, impl="look")
        torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(query, key, key, mask))
        params = seen[-1]
        full = (*params.query.shape[:3], params.key.shape[2])
        assert params.query.dim() == params.key.dim() == params.value.dim() == params.attn_mask.dim() == 4
        assert all(have in (1, want) for have, want in zip(params.attn_mask.shape, full, strict=True))
        assert params.scale == pytest.approx(8**-0.5)
    query, key = torch.randn(4, 3, 8), torch.randn(2, 3, 8)
    out = attnplug.scaled_dot_product_attention(query, key, key, enable_gqa=True, impl="look")
    assert out.shape == (4, 3, 8) and seen[-1].key.shape == (1, 2, 3, 8)


def test_a_broadcast_mask_gets_a_gradient_of_its_own_shape(register: Callable[..., None]) -> None:
    class Masked:
        @staticmethod
        def forward(params: SDPAParams) -> tuple[Tensor, None]:
            logits = params.scale * params.query @ params.key.mT + params.attn_mask
            return torch.softmax(logits, -1) @ params.value, None

        @staticmethod
        def backward(params: SDPAParams, grad_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            leaves = [getattr(params, name).detach().requires_grad_() for name in ("query", "key", "value")]
            mask = params.attn_mask.detach().expand(*params.query.shape[:3], -1).clone().requires_grad_()
            with torch.enable_grad():
                out, _ = Masked.forward(SDPAParams(*leaves, mask, scale=params.scale))
            *grads, of_mask = torch.autograd.grad(out, [*leaves, mask], grad_out)
            return *grads, of_mask.to(dtype)

    dtype = torch.float64
    register("masked", Masked, Feature.ADDITIVE_MASK, Feature.MASK_GRADIENT)
    query, key, value = inputs()
    mask = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def call(*tensors: Tensor) -> Tensor:
        return attnplug.scaled_dot_product_attention(*tensors, impl="masked")

    assert torch.autograd.gradcheck(call, (query, key, value, mask))
    (expected,) = torch.autograd.grad(call(query, key, value, mask).sum(), mask)
    dtype = torch.float32  # what the kernel summed in need not be the mask's own
    (found,) = torch.autograd.grad(call(query, key, value, mask).sum(), mask)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_a_path_may_name_a_module_or_something_in_it(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_kernel.py").write_text(
        "import torch\n"
        "def forward(params):\n"
        "    logits = params.scale * params.query @ params.key.mT\n"
        "    return torch.softmax(logits, -1) @ params.value, None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    query = torch.randn(SHAPE)
    for name, path in (("whole", "some_kernel"), ("part", "some_kernel:forward")):
        attnplug.register_impl(ImplSpec(name=name, kernel=path, backend=None))
        assert attnplug.scaled_dot_product_attention(query, query, query, impl=name).shape == SHAPE


def test_a_feature_that_does_not_exist_is_an_error_with_the_closest_one() -> None:
    with pytest.raises(AttributeError, match="Feature of attnplug .* has no 'CAUSL'; did you mean 'CAUSAL'"):
        Feature.CAUSL  # noqa: B018, raises


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no_such_module.impl", "No module named 'no_such_module'; write 'package.module' or 'package.module:object'"),
        ("math:squirt", "math has no 'squirt'; did you mean 'sqrt'"),
    ],
)
@pytest.mark.filterwarnings("ignore::attnplug.PluginWarning")
def test_a_dotted_path_that_does_not_resolve_names_plugin_field_and_fix(
    register: Callable[..., None], path: str, said: str
) -> None:
    register("mine", path)
    query = torch.randn(SHAPE)
    with pytest.raises(attnplug.NoImplementationError) as raised:
        attnplug.scaled_dot_product_attention(query, query, query, impl="mine")
    assert f"ImplSpec 'mine'.kernel: {path!r} does not resolve" in str(raised.value)
    assert said in str(raised.value)


@pytest.mark.parametrize(("scale", "sign"), [(0.5, 1), (-0.5, -1), (0.0, 0)])
def test_a_call_with_a_positive_scale_has_the_same_logits_and_gradients(scale: float, sign: int) -> None:
    query, key = torch.randn(2, *SHAPE, dtype=torch.float64)
    call = SDPAParams(query, key, key, scale=scale)
    same, factor = call.with_positive_scale()
    assert same.scale > 0 and factor == sign and (same is call) == (scale > 0)
    torch.testing.assert_close(same.scale * same.query @ same.key.mT, scale * query @ key.mT)
    grad_logits = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(factor * same.scale * grad_logits @ same.key, scale * grad_logits @ key)
