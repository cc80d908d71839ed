"""`attnplug.capture()`: the calls of a program, as cases that can be measured."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

import attnplug
from attnplug import bench
from attnplug.bench import BenchError, Case, Cases

query = torch.randn(2, 4, 6, 8)
key = torch.randn(2, 2, 9, 8)


def names(cases: Cases) -> dict[str, int]:
    return {case.name: count for case, count in cases.items()}


def test_calls_of_pytorch_and_of_attnplug_are_counted_and_equal_ones_are_one_case():
    with attnplug.capture() as cases:
        for _ in range(3):
            F.scaled_dot_product_attention(query, query, query, is_causal=True)
        attnplug.scaled_dot_product_attention(query, query, query, is_causal=True)
        attnplug.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    assert names(cases) == {"B2 H4 S6 D8 causal float32": 4, "B2 H4/2 S6x9 D8 float32": 1}


def test_what_is_called_outside_the_block_is_not_captured_and_nothing_stays_patched():
    before = F.scaled_dot_product_attention
    with attnplug.capture() as cases:
        pass
    F.scaled_dot_product_attention(query, query, query)
    assert F.scaled_dot_product_attention is before
    assert len(cases) == 0 and str(cases) == "no calls"


def test_a_case_says_all_that_a_call_asks_for():
    sinks, slopes = torch.randn(4), torch.rand(4)
    with attnplug.capture() as cases:
        attnplug.scaled_dot_product_attention(
            query.double(),
            key.double(),
            key.double(),
            torch.ones(6, 9, dtype=torch.bool),
            is_causal=True,
            enable_gqa=True,
            causal_variant=attnplug.CausalVariant.LOWER_RIGHT,
            window_size=(3, -1),
            softcap=2.0,
            sinks=sinks.double(),
            alibi_slopes=slopes,
            return_lse=True,
        )
    (case,) = cases
    assert case == Case(
        batch=2,
        heads=4,
        kv_heads=2,
        queries=6,
        keys=9,
        head_size=8,
        causal=True,
        causal_variant="LOWER_RIGHT",
        mask="boolean",
        mask_dims="11qk",
        window=(3, -1),
        softcap=2.0,
        sinks=True,
        alibi=True,
        lse=True,
        dtype="float64",
    )


def test_masks_for_each_of_one_head_and_for_all_of_it_are_one_case():
    with attnplug.capture() as cases:
        for mask in (torch.zeros(2, 1, 6, 6), torch.zeros(2, 1, 1, 6).expand(2, 1, 6, 6)):
            attnplug.scaled_dot_product_attention(query[:, :1], query[:, :1], query[:, :1], mask)
    assert [(case.mask_dims, count) for case, count in cases.items()] == [("b1qk", 2)]


@pytest.mark.parametrize("wanting", [True, False])
def test_a_call_that_needs_gradients_is_a_case_with_backward(wanting):
    leaf = query.clone().requires_grad_()
    with attnplug.capture() as cases, torch.set_grad_enabled(wanting):
        F.scaled_dot_product_attention(leaf, query, query, dropout_p=0.25)
    (case,) = cases
    assert case.backward is wanting and case.dropout == 0.25


def test_fewer_and_more_dimensions_and_autocast_are_what_the_kernel_gets():
    with attnplug.capture() as cases, torch.autocast("cpu", torch.bfloat16):
        F.scaled_dot_product_attention(query[0], query[0], query[0])
        F.scaled_dot_product_attention(query[None], query[None], query[None])
    assert list(names(cases)) == ["B1 H4 S6 D8 bfloat16", "B2 H4 S6 D8 bfloat16"]


def test_what_no_case_describes_is_left_out_and_said():
    nested = torch.nested.nested_tensor([torch.randn(4, 3, 8), torch.randn(4, 5, 8)])
    with attnplug.capture() as cases:
        attnplug.scaled_dot_product_attention(nested, nested, nested)
        F.scaled_dot_product_attention(query, query, query, dropout_p=1.0)
    assert len(cases) == 0
    assert str(cases).splitlines() == [
        "left out, 1 calls: with nested tensors, whose sizes cannot be read without waiting for the device",
        "left out, 1 calls: that drop everything",
    ]


STARTS = torch.tensor([0, 2, 2, 6], dtype=torch.int32)
PACKED = torch.randn(6, 4, 8)
USED = torch.tensor([1, 0, 4], dtype=torch.int32)


def packed(**more):
    """Return the arguments of a call of three sequences, one of which is empty."""
    sequences = dict(cu_seq_q=STARTS, cu_seq_k=STARTS, max_q=4, max_k=4)
    return dict(query=PACKED, key=PACKED, value=PACKED) | sequences | more


def test_packed_sequences_are_cases_with_the_length_of_each():
    with attnplug.capture() as cases:
        attnplug.varlen_attn(**packed(), is_causal=True)
        attnplug.varlen_attn(**packed(max_k=7, seqused_k=USED))
    assert list(cases) == [
        Case(heads=4, head_size=8, lengths_q=(2, 0, 4), causal=True),
        Case(heads=4, head_size=8, lengths_q=(2, 0, 4), keys=7, used=(1, 0, 4)),
    ]
    assert list(names(cases)) == ["B3 H4 S4 D8 packed6 causal float32", "B3 H4 S4x7 D8 packed6 used5 float32"]


def test_pages_without_starts_of_keys_are_a_case():
    pages, table = torch.randn(6, 2, 4, 8), torch.arange(6, dtype=torch.int32).reshape(3, 2)
    with attnplug.capture() as cases:
        attnplug.varlen_attn(**packed(key=pages, value=pages, cu_seq_k=None, seqused_k=USED, block_table=table))
    (case,) = cases
    assert case == Case(
        heads=4, head_size=8, lengths_q=(2, 0, 4), lengths_k=(1, 0, 4), used=(1, 0, 4), page_size=2, keys=4
    )


def test_every_case_has_the_kind_of_the_call_that_it_was_captured_from():
    """Else what is measured would not be found again: `explain` names the kind of the call itself."""
    leaf = query.clone().requires_grad_()
    calls = [
        dict(query=query, key=query, value=query, is_causal=True),
        dict(query=query, key=key, value=key, enable_gqa=True, attn_mask=torch.zeros(6, 9)),
        dict(query=query, key=key, value=torch.randn(2, 2, 9, 16), enable_gqa=True, is_causal=True),
        dict(query=query.half(), key=query.half(), value=query.half(), dropout_p=0.5),
        dict(query=query, key=query, value=query, softcap=1.0, window_size=(2, 0), return_lse=True),
        dict(
            query=query.clone().requires_grad_(),
            key=query,
            value=query,
            sinks=torch.randn(4, requires_grad=True),
            alibi_slopes=torch.rand(4),
        ),
        dict(query=leaf, key=leaf, value=leaf, attn_mask=torch.zeros(1, 4, 6, 6, requires_grad=True)),
        dict(query=query, key=query, value=query, is_causal=True, seqused_k=torch.tensor([3, 6], dtype=torch.int32)),
    ]
    for call in calls:
        with attnplug.capture() as cases:
            attnplug.scaled_dot_product_attention(**call)
        (choice,) = choices = attnplug.tuning.choices_from([ran(case) for case in cases])
        attnplug.use_choices(choices)
        explained = attnplug.explain(**call).measured
        attnplug.restore_choices()
        assert explained == f"measured choice: torch ({choice.kind})"


@pytest.mark.parametrize(
    "more", [{}, {"is_causal": True, "return_lse": True}, {"seqused_k": USED}, {"sinks": torch.randn(4)}]
)
def test_a_packed_call_runs_what_was_chosen_for_its_case(more):
    with attnplug.capture() as cases:
        attnplug.varlen_attn(**packed(**more), impl="math_ref")
    (case,) = cases
    attnplug.use_choices(attnplug.tuning.choices_from([ran(case, "math_ref")]))
    with attnplug.record() as calls, warnings.catch_warnings():
        warnings.simplefilter("error", attnplug.ChoicesWarning)  # that nothing was measured for it
        attnplug.varlen_attn(**packed(**more))
    attnplug.restore_choices()
    assert calls[0].impl == "math_ref"


def ran(case: Case, impl: str = "torch") -> bench.Record:
    timing = bench.Timing(1.0, 1.0, 1.0, 3)
    return bench.Record(case, impl, "ran", correct=True, forward=timing, backward=timing)


def test_results_and_random_numbers_are_those_without_the_block():
    def drop():
        torch.manual_seed(3)
        return F.scaled_dot_product_attention(query, query, query, dropout_p=0.5)

    expected = drop()
    with attnplug.capture():
        found = drop()
    assert torch.equal(found, expected)


def test_compiled_functions_are_seen_and_not_compiled_again():
    counted = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda query: F.scaled_dot_product_attention(query, query, query), backend=counted)
    compiled(query)
    with attnplug.capture() as cases:
        compiled(query)
        compiled(query[:, :, :3])
    compiled(query)
    assert list(names(cases)) == ["B2 H4 S6 D8 float32", "B2 H4 S3 D8 float32"] and counted.frame_count == 1


def test_a_block_that_an_exception_leaves_keeps_what_was_called():
    with pytest.raises(KeyboardInterrupt), attnplug.capture() as cases:
        F.scaled_dot_product_attention(query, query, query)
        raise KeyboardInterrupt
    assert sum(cases.values()) == 1


def test_a_block_is_entered_once():
    block = attnplug.capture()
    with block, pytest.raises(attnplug.ScopeError, match="entered already"):
        block.__enter__()
    with pytest.raises(attnplug.ScopeError, match="was not entered"):
        block.__exit__()


def test_nn_modules_with_a_fast_path_of_their_own_are_seen():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.no_grad(), attnplug.capture() as cases:
        layer(torch.randn(2, 5, 8))
    assert list(names(cases)) == ["B2 H2 S5 D4 float32"]


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=16,
        vocab_size=32, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_an_unmodified_model_that_generates_is_captured_with_each_length(llama):
    tokens = torch.ones(1, 5, dtype=torch.long)
    with attnplug.capture() as cases:
        llama.generate(tokens, attention_mask=tokens, max_new_tokens=4, do_sample=False)
    assert names(cases) == {
        "B1 H4/2 S5 D4 causal float32": 2,
        **{f"B1 H4/2 S1x{length} D4 float32": 2 for length in (6, 7, 8)},
    }


def test_an_unmodified_model_in_training_is_captured_with_its_gradients(llama):
    tokens = torch.ones(2, 5, dtype=torch.long)
    with attnplug.capture() as cases:
        llama(tokens, labels=tokens).loss.backward()
    llama.zero_grad()
    assert names(cases) == {"B2 H4/2 S5 D4 causal float32 fwd+bwd": 2}


def test_saved_cases_are_read_back_and_by_bench(tmp_path):
    with attnplug.capture() as cases:
        F.scaled_dot_product_attention(query, query, query)
        F.scaled_dot_product_attention(query, query, query)
        F.scaled_dot_product_attention(query, query, query, dropout_p=1.0)
        attnplug.varlen_attn(**packed())
    path = cases.save(tmp_path / "calls.json")
    for read in (Cases.load(path), bench.read_cases(path)):
        assert read == cases and read.left_out == cases.left_out == {"that drop everything": 1}
    assert [case.dtype for case in bench.read_cases(path, dtype="bfloat16")] == ["bfloat16"] * 2
    assert json.loads(path.read_text())["format"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "holds no captured cases"),
        ('{"format": 2, "cases": []}', "has format 2; this attnplug reads 1; capture again"),
        ('{"format": 1, "cases": [{"headz": 2}]}', "case 1: no field 'headz'; did you mean 'heads'?"),
        ('{"format": 1, "cases": [{"count": 0}]}', "case 1: count: expected a number from 1 on, got 0"),
        ('{"format": 1, "cases": [3]}', "case 1: expected fields"),
    ],
)
def test_a_file_that_holds_no_cases_is_an_error_that_says_why(tmp_path, content, message):
    path = tmp_path / "calls.json"
    path.write_text(content)
    with pytest.raises(BenchError, match=r"calls\.json") as raised:
        bench.read_cases(path)
    assert message in str(raised.value)


def test_a_file_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    with pytest.raises(BenchError, match="ends in .json"):
        Cases().save(tmp_path / "calls.yaml")
    with pytest.raises(BenchError, match="cannot be written"):
        Cases().save(tmp_path / "no" / "calls.json")


def test_captures_are_added_up():
    one, other = Cases([Case(queries=4)]), Cases([Case(queries=4), Case(queries=8)])
    other.left_out["with seqused_k"] += 2
    one.update(other)
    assert sorted(one.values()) == [1, 2] and one.left_out == {"with seqused_k": 2}


def test_a_capture_inside_compiled_code_is_refused_and_leaves_nothing():
    def captured(query):
        with attnplug.capture():
            return F.scaled_dot_product_attention(query, query, query)

    before, query = F.scaled_dot_product_attention, torch.randn(1, 2, 16, 8)
    with pytest.raises(attnplug.ScopeError, match="entered in compiled code; enter it around the call") as refused:
        torch.compile(captured, backend="eager")(query)
    assert F.scaled_dot_product_attention is before, refused  # which keeps alive what was being entered
    with attnplug.capture() as cases:
        F.scaled_dot_product_attention(query, query, query)
    assert cases.total() == 1
