"""Names of attention in transformers: what they choose, and which are errors."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils.generic import is_flash_attention_requested

import attnplug
import forked
from attnplug import SDPBackend
from attnplug.integrations import transformers as bridge
from tiny_models import (
    SIZES,
    bert,
    gpt_oss,
    hf,
    llama,
    register_spy,
    tokens,
)

bridge.register()


def test_importing_the_bridge_does_not_import_transformers() -> None:
    done = forked.run("import sys, attnplug.integrations.transformers; sys.exit('transformers' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_missing_transformers_is_an_error_that_names_the_package() -> None:
    done = forked.run(
        "import sys; sys.modules['transformers'] = None\n"
        "import attnplug.integrations.transformers as bridge; bridge.register()"
    )
    assert "ImportError: attnplug.integrations.transformers needs transformers: pip install" in done.stderr


def test_registering_again_changes_nothing() -> None:
    def state() -> tuple[Any, ...]:
        methods = vars(hf.PreTrainedModel)["get_correct_attn_implementation"]
        tables = (hf.AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
        return methods, *(dict(table) for table in tables)

    bridge.register()  # with the implementations that other tests have brought since this module was imported
    before = state()
    bridge.register()
    assert state() == before


@pytest.mark.parametrize("name", ["torch", "aten_flash", "aten_math"])
def test_a_name_runs_that_implementation_in_every_layer(name: str) -> None:
    model = hf.AutoModel.from_config(bert(), attn_implementation=f"attnplug:{name}")
    with attnplug.record() as calls:
        model(tokens(1, 5))
    assert [call.impl for call in calls] == [name, name]


def test_without_a_name_the_choice_follows_scopes() -> None:
    model = hf.AutoModel.from_config(bert(), attn_implementation="attnplug")
    with attnplug.sdpa_kernel(SDPBackend.MATH), attnplug.record() as calls:
        model(tokens(1, 5))
    assert {call.backend for call in calls} == {SDPBackend.MATH}


@pytest.mark.parametrize(
    ("config", "name"), [(gpt_oss(), "attnplug+eager_masks:aten_flash"), (llama(), "attnplug:aten_flash")]
)
def test_flash_in_a_name_does_not_make_it_transformers_flash_attention(config: Any, name: str) -> None:
    model = hf.AutoModel.from_config(config, attn_implementation="attnplug:aten_flash")
    assert model.config._attn_implementation == name
    assert not is_flash_attention_requested(model.config)


def test_a_configuration_carries_its_attention_to_another_model() -> None:
    for first, second in ((gpt_oss(), llama()), (llama(), gpt_oss())):
        name = hf.AutoModel.from_config(first, attn_implementation="attnplug:aten_flash").config._attn_implementation
        model = hf.AutoModel.from_config(second, attn_implementation=name)
        assert model.config._attn_implementation.endswith(":aten_flash")
        assert ("+eager_masks" in str(model.config._attn_implementation)) == (second.model_type == "gpt_oss")


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_keeps_its_attention(clone: Any) -> None:
    model = clone(hf.AutoModel.from_config(bert(), attn_implementation="attnplug:aten_flash"))
    assert not is_flash_attention_requested(model.config)
    with attnplug.record() as calls:
        model(tokens(1, 5))
    assert {call.impl for call in calls} == {"aten_flash"}


def test_a_saved_model_loads_with_any_attention(tmp_path: Path) -> None:
    hf.AutoModel.from_config(bert(), attn_implementation="attnplug:aten_flash").save_pretrained(tmp_path)
    assert "attnplug" not in (tmp_path / "config.json").read_text()
    model = hf.AutoModel.from_pretrained(tmp_path, attn_implementation="attnplug:aten_math")
    assert model.config._attn_implementation == "attnplug:aten_math"


@pytest.mark.parametrize("name", ["attnplug", "attnplug:aten_math"])
def test_a_model_saved_whole_comes_back_in_a_process_that_registered_nothing(name: str, tmp_path: Path) -> None:
    model = hf.AutoModel.from_config(bert(), attn_implementation=name).eval()
    torch.save((model, tokens(1, 5), model(tokens(1, 5)).last_hidden_state), tmp_path / "model.pt")
    done = forked.run(f"""
import torch
model, given, expected = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
import attnplug
with attnplug.record() as calls:
    torch.testing.assert_close(model(given).last_hidden_state, expected)
assert model.config._attn_implementation == {name!r}
assert {{call.impl for call in calls}} == {{"aten_math" if {name!r}.endswith("math") else "torch"}}
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("way", ["from_config", "set_attn_implementation"])
def test_an_unknown_name_is_an_error_with_the_closest_one(way: str) -> None:
    model = hf.AutoModel.from_config(bert())
    with pytest.raises(attnplug.UnknownImplementationError, match="'aten_flsh'; did you mean 'aten_flash'"):
        if way == "from_config":
            hf.AutoModel.from_config(bert(), attn_implementation="attnplug:aten_flsh")
        else:
            model.set_attn_implementation("attnplug:aten_flsh")


def test_an_implementation_registered_later_has_its_name_too() -> None:
    spy = register_spy()
    hf.AutoModel.from_config(bert(), attn_implementation="attnplug:spy")(tokens(1, 5))
    assert len(spy.seen) == 2


def test_parts_of_a_model_may_have_their_own_attention() -> None:
    text = {**SIZES, "num_hidden_layers": 1, "bos_token_id": 1}
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 8,
        "patch_size": 4,
    }
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = hf.AutoModel.from_config(config, attn_implementation="eager")
    model.set_attn_implementation({"text_config": "attnplug:aten_flash", "vision_config": "attnplug:aten_math"})
    with attnplug.record() as calls:
        model(input_ids=tokens(1, 5), pixel_values=torch.zeros(1, 3, 8, 8))
    assert {call.impl for call in calls} == {"aten_flash", "aten_math"}
    assert not is_flash_attention_requested(model.config.text_config)


def test_a_model_that_would_ignore_the_name_is_refused() -> None:
    config = hf.OpenAIGPTConfig(vocab_size=67, n_embd=32, n_layer=1, n_head=4)
    with pytest.raises(ValueError, match="attn_implementation='attnplug': .* computes attention in its own code"):
        hf.AutoModel.from_config(config, attn_implementation="attnplug")
