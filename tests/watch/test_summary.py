"""`summary` says what ran, by module and kind of call."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import attnplug
from spoiled_kernels import tensors

attend: Any = attnplug.scaled_dot_product_attention


def encoder(layers: int = 2) -> torch.nn.Module:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 16, batch_first=True, dropout=0.0)
    return torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def test_calls_are_counted_by_module_kind_and_implementation() -> None:
    model = encoder()
    with attnplug.patch_torch(), attnplug.summary() as ran:
        for _ in range(3):
            model(torch.randn(1, 5, 16))
        attend(*tensors(), softcap=2.0)
    assert ran.calls == 7
    assert {(row.module, row.impl, row.calls) for row in ran.rows} == {
        ("TransformerEncoder.layers.0.self_attn", "torch", 3),
        ("TransformerEncoder.layers.1.self_attn", "torch", 3),
        ("", "math_ref", 1),
    }
    (softcapped,) = (row for row in ran.rows if row.impl == "math_ref")
    assert softcapped.kind == "float32 E8 H2 Sq<=8 Sk<=8 softcap"
    assert softcapped.passed_over["torch"] == ("does not support softcap",)


def test_modules_of_transformers_have_their_names() -> None:
    hf = pytest.importorskip("transformers")
    import attnplug.integrations.transformers

    attnplug.integrations.transformers.register()
    config = hf.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=16,
        vocab_size=50,
    )  # fmt: skip
    model = hf.AutoModel.from_config(config, attn_implementation="attnplug").eval()
    with attnplug.summary() as ran, torch.no_grad():
        model(torch.ones(1, 8, dtype=torch.long))
    (row,) = ran.rows
    assert (row.module, row.kind) == ("LlamaModel.layers.0.self_attn", "float32 E4 H4/2 Sq<=8 Sk<=8 causal")


KINDS: dict[str, dict[str, Any]] = {
    "Sq<=1 Sk<=16 window lse": {"queries": 1, "keys": 9, "window_size": (2, 0), "return_lse": True},
    "Sq<=4 Sk<=8 causal lower-right": {
        "queries": 4, "keys": 8, "is_causal": True, "causal_variant": attnplug.CausalVariant.LOWER_RIGHT,
    },
    "Sq<=8 Sk<=8 mask": {"queries": 5, "keys": 5, "attn_mask": torch.ones(5, 5).bool()},
    "Sq<=8 Sk<=8 dropout": {"queries": 5, "keys": 5, "dropout_p": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_says_what_its_calls_ask_for(kind: str) -> None:
    given = dict(KINDS[kind])
    with attnplug.summary() as ran:
        attend(*tensors(given.pop("queries"), given.pop("keys")), **given)
    assert [row.kind for row in ran.rows] == [f"float32 E8 H2 {kind}"]


def test_compiled_calls_are_counted_in_the_module_that_was_compiled() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return attend(x, x, x)

    torch.compiler.reset()
    layer = torch.compile(Layer(), backend="aot_eager", fullgraph=True)
    with attnplug.summary() as ran, torch.no_grad():
        layer(torch.randn(1, 2, 5, 8))
    assert [(row.module, row.kind, row.impl) for row in ran.rows] == [("Layer (compiled)", "compiled", "torch")]


def test_a_block_is_for_its_thread_and_start_for_the_process() -> None:
    def in_another_thread() -> None:
        thread = threading.Thread(target=attend, args=tensors())
        thread.start()
        thread.join()

    with attnplug.summary() as of_thread:
        in_another_thread()
    of_process = attnplug.summary().start()
    in_another_thread()
    of_process.stop()
    in_another_thread()
    assert (of_thread.calls, of_process.calls) == (0, 1)


def test_the_table_fits_a_terminal_and_groups_modules_that_differ_by_number() -> None:
    model = encoder(3)
    with attnplug.patch_torch(), attnplug.summary() as ran:
        model(torch.randn(1, 5, 16))
        attend(*tensors(), softcap=2.0)
    lines = str(ran).splitlines()
    assert lines[0] == "4 attention calls"
    assert "TransformerEncoder.layers.*.self_attn (3 modules)" in lines
    assert "         not torch: does not support softcap" in lines
    assert max(map(len, lines)) <= 80


def test_nothing_that_ran_is_said_so() -> None:
    with attnplug.summary() as ran:
        pass
    head, *ways_out = str(ran).splitlines()
    assert head == "0 attention calls: nothing ran while this summary was in place"
    assert "patch_torch()" in ways_out[0] and "start()" in ways_out[1]


def test_a_notebook_gets_a_table_in_which_nothing_is_markup() -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return attend(x, x, x)

    Odd.__name__ = "<b>"
    with attnplug.summary() as ran:
        Odd()(torch.randn(1, 2, 5, 8))
    shown = ran._repr_html_()
    assert re.findall(r"<td[^>]*>(.*?)</td>", shown)[:3] == ["&lt;b&gt;", "1", "torch"]
    assert "<b>" not in shown


def test_a_profile_gives_the_share_of_time_of_each_implementation() -> None:
    given = tensors(requires_grad=True)
    with attnplug.summary() as ran, profile(activities=[ProfilerActivity.CPU]) as profiled:
        attend(*given).sum().backward()
        attend(*tensors(), impl="math_ref")
    shares = ran.shares(profiled)
    assert set(shares) == {"torch", "math_ref"}
    assert shares["torch"].forward > 0 < shares["torch"].backward
    assert shares["math_ref"].backward == 0
    assert 0 < sum(share.share for share in shares.values()) <= 1
    assert "of the time: forward" in ran.table(profiled)


def test_a_profile_gives_the_share_of_time_of_each_module_and_kind_of_call_forward_and_backward() -> None:
    model = encoder(2)
    given = tensors(300, 300)
    with attnplug.patch_torch(), attnplug.summary() as ran, profile(activities=[ProfilerActivity.CPU]) as profiled:
        model(torch.randn(1, 5, 16)).sum().backward()
        attend(*given, impl="math_ref")
    shares = ran.shares_of_calls(profiled)
    assert set(shares) == {(row.module, row.kind, row.impl) for row in ran.rows}
    for number in (0, 1):
        each = shares[f"TransformerEncoder.layers.{number}.self_attn", "float32 E8 H2 Sq<=8 Sk<=8 grad", "torch"]
        assert each.forward > 0 < each.backward
    by_impl = ran.shares(profiled)
    assert by_impl["math_ref"].share == pytest.approx(shares["", "float32 E8 H2 Sq<=512 Sk<=512", "math_ref"].share)
    assert sum(each.share for each in shares.values()) == pytest.approx(sum(each.share for each in by_impl.values()))
    calls = {each.key for each in profiled.key_averages() if each.key.startswith("attnplug.call::")}
    assert calls == {f"attnplug.call::{kind}{f' in {module}' * bool(module)}" for module, kind, _ in shares}
    table = ran.table(profiled)
    assert re.search(r"\n      2 +\d+\.\d%  torch +cpu float32 E8 H2 Sq<=8 Sk<=8 grad\n", table)
    assert max(map(len, table.splitlines())) <= 80


def test_what_ran_before_the_summary_has_a_share_by_implementation_alone() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        attend(*tensors())
        with attnplug.summary() as ran:
            attend(*tensors(), impl="aten_math")
    assert set(ran.shares(profiled)) == {"torch", "aten_math"}
    assert [impl for *_, impl in ran.shares_of_calls(profiled)] == ["aten_math"]


@pytest.mark.gpu
def test_on_a_gpu_shares_are_of_the_time_of_its_kernels() -> None:
    given = tensors(64, requires_grad=True, device="cuda")
    attend(*given).sum().backward()  # CUDA is loaded
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with attnplug.summary() as ran, profile(activities=activities) as profiled:
        attend(*given, impl="aten_math").sum().backward()
        torch.cuda.synchronize()
    (share,) = ran.shares_of_calls(profiled).values()
    assert share.forward > 0 < share.backward
    assert 0 < share.share <= 1
    assert ran.shares(profiled)["aten_math"].share == pytest.approx(share.share)


def test_it_is_started_once_and_stopped_once() -> None:
    ran = attnplug.summary()
    with pytest.raises(attnplug.ScopeError, match="not started"):
        ran.stop()
    with ran, pytest.raises(attnplug.ScopeError, match="started already"):
        ran.start()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda ran: pickle.loads(pickle.dumps(ran))])
def test_a_copy_has_what_was_collected_and_collects_no_more(copied: Any) -> None:
    query, key, value = tensors()
    with attnplug.summary() as ran:
        attend(query, key, value)
        again = copied(ran)
        attend(query, key, value)
    assert again.calls == 1 and ran.calls == 2
    with again:  # and can be started itself
        attend(query, key, value)
    assert again.calls == 2 and again.rows == ran.rows
