"""Small random models of transformers, and what tests do with them.

Their weights are large enough for attention to matter: with the usual initialisation logits are close to zero,
and a mask, a softcap or a sink could be lost unseen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnplug
from attnplug import Capabilities, Feature, ImplSpec, SDPBackend

hf: Any = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
SLIDING = {**GROUPED, "sliding_window": 4}


def llama() -> Any:
    return hf.LlamaConfig(**GROUPED)


def mistral() -> Any:
    return hf.MistralConfig(**SLIDING)


def gemma2() -> Any:
    return hf.Gemma2Config(**SLIDING, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)


def gpt_oss() -> Any:
    return hf.GptOssConfig(**SLIDING, num_local_experts=2, num_experts_per_tok=1)


def bert() -> Any:
    return hf.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def vit() -> Any:
    return hf.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        hidden_dropout_prob=0.0,
    )


def _encoder_decoder() -> dict[str, Any]:
    layers = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    widths = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48)
    return {"vocab_size": 67, "d_model": 32, **layers, **heads, **widths, "dropout": 0.0, "pad_token_id": 0}


def bart() -> Any:
    return hf.BartConfig(**_encoder_decoder())


def pegasus_x() -> Any:
    """A model that says nowhere that its decoder is causal: only its masks do."""
    return hf.PegasusXConfig(**_encoder_decoder(), num_global_tokens=4, block_size=4)


def bigbird_pegasus() -> Any:
    """A model whose encoder computes attention itself and adds the mask to logits."""
    return hf.BigBirdPegasusConfig(**_encoder_decoder(), max_position_embeddings=64)


def t5() -> Any:
    return hf.T5Config(
        vocab_size=67,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        decoder_start_token_id=0,
    )


NEEDS = {gemma2: Feature.SOFTCAP, gpt_oss: Feature.SINKS}


def need(*features: Feature) -> None:
    """Skip a test that no implementation on this machine can run."""
    for record in attnplug.list_impls():
        if record.status == "available" and set(features) <= set(record.capabilities.features):
            return
    pytest.skip(f"no installed implementation supports {', '.join(feature.value for feature in features)}")


def build(config: Any, auto: Any = hf.AutoModel) -> Any:
    """Return a model with random weights, so large that its attention is far from uniform."""
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=1.0 if "sinks" in name else 0.25)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 67, shape, generator=torch.Generator().manual_seed(1))


def padded(side: str) -> dict[str, Tensor]:
    """Return a batch of two sequences of 11 and 7 tokens."""
    seen = torch.ones(2, 11, dtype=torch.long)
    seen[1, slice(0, 4) if side == "left" else slice(7, 11)] = 0
    return {"input_ids": tokens(2, 11) * seen, "attention_mask": seen}


def train_step(model: Any, attention: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the output, where it is not padding, and the gradient of every parameter."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    out = model(**inputs).last_hidden_state
    if "decoder_input_ids" not in inputs and "attention_mask" in inputs:
        out = out * inputs["attention_mask"].unsqueeze(-1)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * direction).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), **found}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare tensor by tensor; gradients that are zero but for rounding, as of key biases, by the largest one."""
    assert found.keys() == expected.keys()
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-6 * largest, msg=f"{name}: {{}}".format)


class Spy:
    """A kernel that keeps what it is given, and answers with PyTorch's function."""

    composite = True  # gradients go through PyTorch's function

    def __init__(self) -> None:
        self.seen: list[attnplug.SDPAParams] = []

    def forward(self, params: attnplug.SDPAParams) -> tuple[Tensor, None]:
        self.seen.append(params)
        out = torch.nn.functional.scaled_dot_product_attention(
            params.query,
            params.key,
            params.value,
            params.attn_mask,
            is_causal=params.is_causal,
            enable_gqa=True,
        )
        return out, None


def register_spy() -> Spy:
    """Register a `Spy` as the implementation `spy`, for the rest of the test."""
    kernel = Spy()
    capabilities = Capabilities(features=frozenset(Feature))
    attnplug.register_impl(
        ImplSpec(name="spy", kernel=kernel, backend=SDPBackend.MATH, capabilities=capabilities, priority=-1000)
    )
    return kernel
