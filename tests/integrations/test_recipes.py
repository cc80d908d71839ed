"""The recipes of the documentation, each on the real package: unmodified models, attention chosen by attnplug."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import attnplug


def ran(calls: list[Any]) -> set[str]:
    assert calls, "no attention reached attnplug"
    return {call.impl for call in calls}


def test_x_transformers() -> None:
    library: Any = pytest.importorskip("x_transformers", reason="pip install x-transformers would run this")
    torch.manual_seed(0)
    model = library.TransformerWrapper(
        num_tokens=20,
        max_seq_len=16,
        attn_layers=library.Decoder(dim=32, depth=2, heads=2, attn_flash=True),
    ).eval()
    tokens = torch.randint(0, 20, (2, 12))
    with torch.no_grad():
        expected = model(tokens)
        with attnplug.patch_torch(), attnplug.sdpa_kernel("aten_math"), attnplug.record() as calls:
            found = model(tokens)
    assert ran(calls) == {"aten_math"}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # as its import leaves it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning: Any = pytest.importorskip("lightning", reason="pip install lightning would run this")

    class Attends(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

        def training_step(self, batch: Any) -> torch.Tensor:
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Attnplug(lightning.Callback):
        """Bind the model for as long as the trainer fits it."""

        def __init__(self, backends: Any) -> None:
            self.backends, self.handles = backends, []

        def on_fit_start(self, trainer: Any, module: Any) -> None:
            self.handles = [attnplug.patch_torch(), attnplug.bind(module.layer, self.backends)]

        def on_fit_end(self, trainer: Any, module: Any) -> None:
            while self.handles:
                self.handles.pop().remove()

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 6, 16)), batch_size=2)
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Attnplug("aten_math")],
    )
    before = torch.nn.functional.scaled_dot_product_attention
    with warnings.catch_warnings(), attnplug.record() as calls:
        warnings.simplefilter("ignore")
        trainer.fit(Attends(), data)
    assert ran(calls) == {"aten_math"}
    assert torch.nn.functional.scaled_dot_product_attention is before


def test_timm() -> None:
    library: Any = pytest.importorskip(
        "timm", reason="pip install timm, and a torchvision for this torch, would run this"
    )
    torch.manual_seed(0)
    model = library.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=3).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        with attnplug.patch_torch(), attnplug.sdpa_kernel("aten_math"), attnplug.record() as calls:
            found = model(images)
    assert ran(calls) == {"aten_math"}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_torchtitan() -> None:
    attention: Any = pytest.importorskip(
        "torchtitan.models.common.attention", reason="pip install torchtitan, with all that it needs, would run this"
    )
    module = attention.ScaledDotProductAttention(attention.ScaledDotProductAttention.Config())
    query = torch.randn(1, 8, 2, 16)
    expected = module(query, query, query)
    with attnplug.patch_torch(), attnplug.sdpa_kernel("aten_math"), attnplug.record() as calls:
        found = module(query, query, query)
    assert ran(calls) == {"aten_math"}
    torch.testing.assert_close(found, expected)


def test_continuous_batching_of_transformers() -> None:
    library: Any = pytest.importorskip("transformers", reason="pip install transformers would run this")
    small: Any = getattr(library, "ContinuousBatchingConfig", None)
    if small is None:
        pytest.skip("pip install 'transformers>=5.20' would run this")
    config = library.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = library.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()

    def generated() -> list[list[int]]:
        outputs = model.generate_batch(
            [[1, 2, 3, 4], [5, 6, 7]],
            library.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=small(num_blocks=8, max_batch_tokens=16),
            progress_bar=False,
        )
        return [output.generated_tokens for output in outputs.values()]

    try:
        expected = generated()
    except MemoryError:
        pytest.skip("pip install psutil would run this: without it an older transformers finds no memory")
    summary = attnplug.summary()
    with attnplug.patch_torch(), attnplug.bind(model, "math_ref"):
        summary.start()
        try:
            found = generated()
        finally:
            summary.stop()
    assert found == expected
    assert ran(summary.rows) == {"math_ref"}
