"""What a model asks of its attention reaches the kernel, or is refused by name."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnplug.integrations import transformers as bridge
from tiny_models import (
    SIZES,
    build,
    gemma2,
    gpt_oss,
    hf,
    llama,
    register_spy,
    tokens,
)

bridge.register()


def test_key_and_value_heads_are_not_repeated() -> None:
    spy = register_spy()
    model = build(llama())
    model.set_attn_implementation("attnplug:spy")
    model(tokens(2, 7))
    assert {(p.query.shape[1], p.key.shape[1], p.enable_gqa) for p in spy.seen} == {(4, 2, True)}


def test_a_causal_mask_is_left_out_where_lengths_are_equal_or_one_token_is_decoded() -> None:
    spy = register_spy()
    model = build(llama())
    model.set_attn_implementation("attnplug:spy")
    memory = model(tokens(2, 7), use_cache=True).past_key_values
    assert all(p.is_causal and p.attn_mask is None for p in spy.seen)
    spy.seen.clear()
    model(tokens(2, 1), past_key_values=memory)
    assert [(p.query.shape[2], p.key.shape[2], p.is_causal, p.attn_mask) for p in spy.seen] == [(1, 8, False, None)] * 2


def test_softcap_sinks_and_scale_reach_the_kernel() -> None:
    spy = register_spy()
    for config in (gemma2, gpt_oss):
        model = build(config())
        model.set_attn_implementation("attnplug:spy")
        model(tokens(1, 7))
    softcapped, with_sinks = spy.seen[0], spy.seen[-1]
    assert (softcapped.softcap, softcapped.sinks) == (2.0, None)
    assert softcapped.scale == pytest.approx(8**-0.5)
    assert (with_sinks.softcap, with_sinks.sinks.shape) == (0.0, (4,))


@pytest.mark.parametrize("training", [False, True])
def test_dropout_of_a_layer_is_applied_in_training_only(training: bool) -> None:
    spy = register_spy()
    with torch.no_grad():
        bridge.attention_forward(layer(training=training), *heads(5, 5), None, dropout=0.25, impl="spy")
    assert [p.dropout for p in spy.seen] == [0.25 if training else 0.0]


def test_dropout_of_a_model_reaches_the_kernel() -> None:
    spy = register_spy()
    model = build(hf.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.25)).train()
    model.set_attn_implementation("attnplug:spy")
    model(tokens(1, 5))
    assert {p.dropout for p in spy.seen} == {0.25}


def layer(is_causal: bool = True, training: bool = False) -> Any:
    return SimpleNamespace(is_causal=is_causal, training=training)


def heads(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    return tuple(torch.randn(1, 2, length, 8, generator=random) for length in (queries, keys, keys))


def formula(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    logits = (query.double() @ key.double().mT / math.sqrt(8)).masked_fill(~visible, -math.inf)
    return (logits.softmax(-1) @ value.double()).transpose(1, 2).float()


def test_queries_dropped_after_the_mask_was_made_are_the_last_ones() -> None:
    found, _ = bridge.attention_forward(layer(), *heads(2, 6), None)
    visible = torch.ones(2, 6, dtype=torch.bool).tril(4)
    torch.testing.assert_close(found, formula(*heads(2, 6), visible))


def test_in_a_model_with_eager_masks_a_missing_one_hides_nothing() -> None:
    name = hf.AutoModel.from_config(gpt_oss(), attn_implementation="attnplug").config._attn_implementation
    found, _ = hf.AttentionInterface()[name](layer(is_causal=True), *heads(6, 6), None)
    torch.testing.assert_close(found, formula(*heads(6, 6), torch.ones(6, 6, dtype=torch.bool)))


def test_a_window_without_a_mask_is_applied() -> None:
    found, _ = bridge.attention_forward(layer(), *heads(6, 6), None, sliding_window=2)
    places = torch.arange(6)
    distance = places[:, None] - places
    torch.testing.assert_close(found, formula(*heads(6, 6), (distance >= 0) & (distance < 2)))


def test_a_window_without_a_mask_is_refused_where_its_two_sides_are_not_known() -> None:
    with pytest.raises(ValueError, match="sliding_window=2: needs an attention_mask"):
        bridge.attention_forward(layer(is_causal=False), *heads(6, 6), None, sliding_window=2)
    found, _ = bridge.attention_forward(layer(is_causal=False), *heads(6, 6), None, sliding_window=6)  # hides nothing
    torch.testing.assert_close(found, formula(*heads(6, 6), torch.ones(6, 6, dtype=torch.bool)))


def test_the_output_has_heads_behind_tokens_and_is_contiguous() -> None:
    found, probabilities = bridge.attention_forward(layer(), *heads(5, 5), None)
    assert found.shape == (1, 5, 2, 8)
    assert found.is_contiguous()
    assert probabilities is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("output_attentions", True, "use attn_implementation='eager'"),
        ("cache", object(), "continuous batching"),
        ("indices", torch.zeros(1), "does not know what it means"),
        ("cu_seq_lens_k", torch.tensor([0, 5]), "cu_seq_lens_q is missing"),
    ],
)
def test_what_cannot_be_done_is_an_error_that_names_it(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        bridge.attention_forward(layer(), *heads(5, 5), None, **{name: value})


def test_arguments_that_ask_for_nothing_are_accepted() -> None:
    nothing: dict[str, Any] = {
        "output_attentions": False,
        "indices": None,
        "use_cache": True,
        "position_ids": torch.arange(5),
    }
    bridge.attention_forward(layer(), *heads(5, 5), None, **nothing)


def test_output_attentions_of_a_model_is_an_error_and_not_a_tuple_of_none() -> None:
    model = hf.AutoModel.from_config(llama(), attn_implementation="attnplug")
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens(1, 5), output_attentions=True)


def test_packed_sequences_come_in_a_batch_of_one() -> None:
    query, key, value = (tensor.expand(2, -1, -1, -1) for tensor in heads(5, 5))
    with pytest.raises(ValueError, match="cu_seq_lens_q: packed sequences come in a batch of 1, this one has 2"):
        bridge.attention_forward(layer(), query, key, value, cu_seq_lens_q=torch.tensor([0, 2, 5]))
