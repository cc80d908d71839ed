"""`attnplug.integrations.diffusers`: a pipeline's own models run in a scope, and its masked calls stay right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnplug
import attnplug.integrations.diffusers as integration
from attnplug import Capabilities, ImplSpec
from tiny_diffusers import diffusers, flux_model, unet_model


def unet() -> Any:
    torch.manual_seed(0)
    return unet_model().eval()


def run(model: Any, seen: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, text = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 4, 4), (2, 5, 16)))
    mask = {} if seen is None else {"encoder_attention_mask": seen}
    with torch.no_grad():
        return model(sample, torch.tensor([3, 500]), encoder_hidden_states=text, **mask).sample


def maskless(params: attnplug.SDPAParams) -> tuple[Tensor, None]:
    """A kernel that knows no masks, as SageAttention's is."""
    return torch.softmax(params.scale * params.query @ params.key.mT, -1) @ params.value, None


@pytest.fixture
def _maskless() -> None:
    capabilities = Capabilities(quantized=True)
    attnplug.register_impl(ImplSpec(name="maskless", kernel=maskless, backend=None, capabilities=capabilities))


def test_models_of_diffusers_run_in_the_scope_and_others_do_not() -> None:
    model = unet()
    text_encoder = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True)
    pipeline = SimpleNamespace(components={"unet": model, "text_encoder": text_encoder, "scheduler": object()})
    expected = run(model)
    with integration.bind(pipeline, "aten_math"), attnplug.record() as calls:
        found = run(model)
        text_encoder(torch.randn(1, 3, 16))
    assert {call.impl for call in calls[:8]} == {"aten_math"} and len(calls) > 8
    assert calls[8].impl != "aten_math"
    torch.testing.assert_close(found, expected)
    with attnplug.record() as calls:
        run(model)
    assert calls == []


@pytest.mark.usefixtures("_maskless")
def test_a_kernel_without_masks_leaves_masked_calls_to_the_next_name() -> None:
    model, seen = unet(), torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    expected = run(model, seen)
    with integration.bind(model, ["maskless", "torch"], set_priority=True), attnplug.record() as calls:
        found = run(model, seen)
    assert {call.impl for call in calls} == {"maskless", "torch"}
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("_maskless")
def test_the_famous_one_liner_loses_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """`F.scaled_dot_product_attention = sageattn`, whose `**kwargs` swallow it: what the recipe is there for."""

    def sageattn(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1) @ value

    model, seen = unet(), torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    expected = run(model, seen)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sageattn)
    assert (run(model, seen) - expected).abs().max() > 1e-4


def test_a_backend_that_does_not_end_in_pytorch_s_function_is_an_error() -> None:
    model = flux_model()
    model.set_attention_backend("_native_math")
    with pytest.raises(ValueError, match=r"backend '_native_math'.*set_attention_backend\('native'\) first"):
        integration.bind(model, "aten_math")
    model.set_attention_backend("native")
    integration.bind(model, "aten_math").remove()


@pytest.mark.parametrize(
    "pipeline", [None, "a path", torch.nn.Linear(1, 1), diffusers.UNet2DConditionModel, SimpleNamespace(components=[])]
)
def test_what_holds_no_model_of_diffusers_is_an_error(pipeline: Any) -> None:
    got = type(pipeline).__name__
    with pytest.raises(ValueError, match=f"expected a DiffusionPipeline or a model of diffusers, got {got}"):
        integration.bind(pipeline, "torch")


@pytest.mark.parametrize("backends", ["no_such_implementation", None, [], ["torch", 3]])
def test_backends_that_mean_nothing_leave_nothing_behind(backends: Any) -> None:
    before = torch.nn.functional.scaled_dot_product_attention
    with pytest.raises((TypeError, ValueError), match="backends: "):
        integration.bind(unet(), backends)
    assert torch.nn.functional.scaled_dot_product_attention is before


def test_a_model_that_cannot_be_bound_leaves_those_before_it_as_they_were() -> None:
    class Nothing(diffusers.ModelMixin):  # type: ignore[misc]  # importorskip returns Any
        """A model without a forward."""

    model, original = unet(), torch.nn.functional.scaled_dot_product_attention
    pipeline = SimpleNamespace(components={"unet": model, "nothing": Nothing()})
    with pytest.raises(TypeError, match="Nothing has no forward to bind"):
        integration.bind(pipeline, "aten_math")
    assert torch.nn.functional.scaled_dot_product_attention is original
    with attnplug.patch_torch(), attnplug.record() as calls:
        run(model)
    assert calls and "aten_math" not in {call.impl for call in calls}


def test_bindings_of_one_model_end_in_any_order_and_with_an_exception() -> None:
    before, model = torch.nn.functional.scaled_dot_product_attention, unet()

    def ran() -> set[str]:
        with attnplug.record() as calls:
            run(model)
        return {call.impl for call in calls}

    first, second = integration.bind(model, "aten_math"), integration.bind(model, "torch")
    assert ran() == {"torch"}
    first.remove()
    assert ran() == {"torch"}
    second.remove()
    second.remove()
    with pytest.raises(ZeroDivisionError), integration.bind(model, "aten_math"):
        assert ran() == {"aten_math"}
        1 / 0  # noqa: B018, raises
    assert ran() == set()
    assert torch.nn.functional.scaled_dot_product_attention is before
