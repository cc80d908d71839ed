"""What a case costs by arithmetic, which cases there are by name, and cases from files."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnplug import bench
from attnplug.bench import BenchError, Case

SIZES = st.integers(1, 12)


def test_forward_counts_two_products_and_the_softmax_for_each_pair():
    case = Case(batch=2, heads=4, kv_heads=2, queries=3, keys=5, head_size=8, value_head_size=16)
    # Each of 2 * 4 * 3 * 5 pairs: 8 products and sums for its score, 2 for the softmax, 16 for the values.
    assert case.forward_flops == 120 * (2 * 8 + 2 + 2 * 16)
    assert case.backward_flops == 2.5 * 120 * 50


@pytest.mark.parametrize(
    ("fields", "pairs"),
    [
        ({"queries": 4}, 16),
        ({"queries": 4, "causal": True}, 1 + 2 + 3 + 4),
        ({"queries": 2, "keys": 4, "causal": True}, 1 + 2),
        ({"queries": 2, "keys": 4, "causal": True, "causal_variant": "LOWER_RIGHT"}, 3 + 4),
        ({"queries": 4, "keys": 2, "causal": True, "causal_variant": "LOWER_RIGHT"}, 0 + 0 + 1 + 2),
        ({"queries": 4, "window": (1, 0)}, 1 + 2 + 2 + 2),
        ({"queries": 4, "window": (-1, 1)}, 2 + 3 + 4 + 4),
        ({"queries": 4, "mask": "boolean"}, 16),
    ],
)
def test_pairs_are_what_causality_and_window_leave(fields, pairs):
    assert Case(**fields).pairs == pairs


@given(
    SIZES, SIZES, st.booleans(), st.sampled_from(["UPPER_LEFT", "LOWER_RIGHT"]), st.integers(-1, 9), st.integers(-1, 9)
)
def test_pairs_are_those_of_a_mask_written_out(queries, keys, causal, variant, left, right):
    position = torch.arange(queries)[:, None] + (keys - queries if variant == "LOWER_RIGHT" else 0)
    j = torch.arange(keys)
    seen = (j <= position) | (not causal)
    seen &= (j >= position - left) | (left < 0)
    seen &= (j <= position + right) | (right < 0)
    case = Case(queries=queries, keys=keys, causal=causal, causal_variant=variant, window=(left, right))
    assert case.pairs == int(seen.expand(queries, keys).sum())


def test_what_a_case_costs_is_known_at_once_however_long_it_is():
    """A length in a file may be anything; who counts its queries one by one never ends."""
    long, wide = 10**12, 10**9
    case = Case(batch=long, heads=1, queries=long, head_size=1, window=(wide - 1, 0))
    assert case.pairs == wide * (wide + 1) // 2 + (long - wide) * wide
    assert case.forward_flops == case.pairs * long * 6
    assert case.forward_bytes == 4 * 4 * long**2
    packed = Case(lengths_q=(long, 3), lengths_k=(2 * long, 5), causal=True)
    assert packed.pairs == long * (long + 1) // 2 + long**2 + (3 + 4 + 5)


def test_sequences_that_differ_in_length_count_each_for_itself():
    case = Case(heads=4, kv_heads=2, head_size=8, lengths_q=(2, 4), lengths_k=(4, 2), causal=True, dtype="float16")
    assert (case.batch, case.queries, case.keys, case.causal_variant) == (2, 4, 4, "LOWER_RIGHT")
    assert case.pairs == (3 + 4) + (0 + 0 + 1 + 2)
    assert case.forward_flops == 4 * case.pairs * (2 * 8 + 2 + 2 * 8)
    assert case.forward_bytes == 2 * (2 * 4 * 6 * 8 + 2 * 2 * 6 * 8)
    padded = Case(batch=2, heads=1, queries=3, head_size=8, used=(1, 3))
    assert padded.pairs == 3 * 1 + 3 * 3
    assert padded.forward_bytes == 4 * (2 * 2 * 3 * 8 + 2 * (1 + 3) * 8)


def test_what_follows_from_lengths_follows_where_they_are_changed():
    case = Case(heads=1, lengths_q=(2, 4), lengths_k=(4, 9))
    assert case.but(lengths_q=(3, 3, 8)) == Case(heads=1, lengths_q=(3, 3, 8))
    assert case.but(dtype="float16").lengths_k == (4, 9)
    large = Case(lengths_q=(640, 1280, 64), used=(1, 1280, 64), page_size=16)
    assert large.shrunk().lengths_q == (10, 20) and large.shrunk().used == (1, 20)


def test_the_density_of_a_long_causal_case_is_a_half():
    full, causal = (Case(queries=16384, causal=causal).forward_flops for causal in (False, True))
    assert causal / full == pytest.approx(0.5, rel=1e-4)


def test_bytes_are_each_tensor_once():
    case = Case(batch=2, heads=4, kv_heads=2, queries=3, keys=5, head_size=8, value_head_size=16, dtype="bfloat16")
    query, key, value, out = 2 * 4 * 3 * 8, 2 * 2 * 5 * 8, 2 * 2 * 5 * 16, 2 * 4 * 3 * 16
    assert case.forward_bytes == 2 * (query + key + value + out)
    # Inputs, out, its gradient and lse in; three gradients out.
    assert case.backward_bytes == 2 * (2 * (query + key + value) + 2 * out) + 4 * 2 * 4 * 3
    masked = case.but(mask="boolean")
    assert masked.forward_bytes - case.forward_bytes == 2 * 3 * 5
    assert case.but(mask="additive").forward_bytes - case.forward_bytes == 2 * 2 * 3 * 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": 0}, "batch: expected a number from 1 on, got 0"),
        ({"heads": 2.0}, "heads: expected a number from 1 on, got 2.0"),
        ({"queries": True}, "queries: expected a number"),
        ({"heads": 8, "kv_heads": 3}, "kv_heads: expected a divisor of heads (8), got 3"),
        ({"mask": "bool"}, "mask: expected one of '', 'boolean', 'additive', got 'bool'"),
        ({"causal": "yes"}, "causal: expected true or false, got 'yes'"),
        ({"causal_variant": "lower"}, "causal_variant: expected one of 'UPPER_LEFT', 'LOWER_RIGHT'"),
        ({"window": 3}, "window: expected two numbers from -1 on, such as [256, 0], got 3"),
        ({"window": (-2, 0)}, "window: expected two numbers"),
        ({"dtype": "int8"}, "dtype: expected one of 'float16'"),
        ({"device": "abacus"}, "device: 'abacus' is not a device; examples: cpu, cuda"),
        ({"name": 3}, "name: expected text, got 3"),
        ({"mask_dims": "bhq"}, "mask_dims: expected each letter of 'bhqk', or 1 where the mask broadcasts, got 'bhq'"),
        (
            {"mask": "boolean", "backward": True, "mask_gradient": True},
            "mask_gradient: needs mask='additive' and backward",
        ),
        ({"sinks": True, "sinks_gradient": True}, "sinks_gradient: needs sinks and backward"),
        (
            {"lengths_q": (2, -1)},
            "lengths_q: expected a number from 0 on for each sequence, such as [5, 3, 8], got (2, -1)",
        ),
        ({"lengths_q": 3}, "lengths_q: expected a number from 0 on for each sequence"),
        ({"lengths_q": (0, 0)}, "lengths_q: all sequences are empty"),
        ({"lengths_q": (2, 1), "lengths_k": (3,)}, "lengths_k: expected a number for each of 2 sequences, got (3,)"),
        ({"lengths_q": (2, 1), "queries": 1}, "queries: expected at least the longest sequence's, 2, got 1"),
        ({"lengths_q": (2, 1), "mask": "boolean"}, "mask: packed sequences have none"),
        ({"lengths_k": (2, 1)}, "lengths_k: is for packed sequences, which lengths_q makes"),
        ({"page_size": 16}, "page_size: is for packed sequences, which lengths_q makes"),
        ({"lengths_q": (2,), "page_size": 0}, "page_size: expected a number from 1 on, got 0"),
        ({"keys": 4, "used": (5,)}, "used: expected numbers from 0 to 4, the keys that a sequence has, got 5"),
        ({"batch": 2, "used": (1,)}, "used: expected a number for each of 2 sequences, got (1,)"),
    ],
)
def test_a_wrong_field_is_an_error_that_names_it(fields, message):
    with pytest.raises(BenchError, match=re.escape(message)):
        Case(**fields)


def test_a_case_that_is_changed_is_described_anew_but_keeps_a_name_that_was_given():
    assert Case(heads=2, queries=4).but(queries=8).name == "B1 H2 S8 D64 float32"
    assert Case(heads=2, kv_heads=1, queries=4).but(heads=4, keys=8).label() == "B1 H4/1 S4x8 D64 float32"
    assert Case(name="mine", queries=4).but(queries=8).name == "mine"


@pytest.mark.parametrize("name", bench.SETS)
def test_every_set_has_cases_on_the_asked_device_that_run_when_shrunk(name):
    cases = bench.case_set(name, device="cuda:1", dtype="float16")
    assert cases and len({case.name for case in cases}) == len(cases)
    assert all((case.device, case.dtype) == ("cuda:1", "float16") for case in cases)
    assert all(case.shrunk().forward_flops < 1e9 and case.shrunk().backward == case.backward for case in cases)


def test_the_grid_of_pytorch_is_the_one_of_its_benchmark():
    cases = bench.case_set("pytorch", device="cuda")
    assert {(case.batch, case.queries, case.causal) for case in cases} == set(
        product((1, 8, 16), (128, 256, 512, 1024, 8192), (True, False))
    )
    assert {(case.heads, case.heads * case.head_size, case.dtype) for case in cases} == {(16, 2048, "bfloat16")}


def test_the_cases_for_kernel_authors_hold_tokens_and_channels_constant():
    cases = [case for case in bench.case_set("kernels") if case.queries > 1]
    assert {(case.batch * case.queries, case.heads * case.head_size) for case in cases} == {(16384, 2048)}
    assert {(case.head_size, case.causal, case.queries) for case in cases} == set(
        product((64, 128, 256), (True, False), (512, 1024, 2048, 4096, 8192, 16384))
    )
    assert all(case.backward for case in cases)


@pytest.mark.parametrize(
    ("model", "sizes"),
    [("gpt2", (12, 12, 64)), ("minilm", (12, 12, 32)), ("llama-3-8b", (32, 8, 128)), ("whisper", (20, 20, 64))],
)
def test_models_have_the_heads_that_transformers_knows_them_by(model, sizes):
    assert {(case.heads, case.kv_heads, case.head_size) for case in bench.case_set(model)} == {sizes}


def test_an_unknown_set_is_an_error_with_the_closest_one():
    with pytest.raises(BenchError, match=r"there is no 'whispr'; did you mean 'whisper'\? the sets are laptop"):
        bench.case_set("whispr")


YAML = """
defaults: {heads: 4, kv_heads: 2, head_size: 32, dtype: float32, device: cpu}
cases:
  - {name: sweep, length: [64, 128], causal: [true, false], backward: true}
  - {name: decode, queries: 1, keys: 512, window: [[64, 0], [-1, 0]]}
  - {name: packed, lengths_q: [[3, 5], [8]]}
"""
TOML = """
[defaults]
heads = 4
kv_heads = 2
head_size = 32
dtype = "float32"
device = "cpu"

[[cases]]
name = "sweep"
length = [64, 128]
causal = [true, false]
backward = true

[[cases]]
name = "decode"
queries = 1
keys = 512
window = [[64, 0], [-1, 0]]

[[cases]]
name = "packed"
lengths_q = [[3, 5], [8]]
"""


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_yaml_and_toml_say_the_same_cases(tmp_path):
    common = dict(heads=4, kv_heads=2, head_size=32)
    expected = [
        Case(queries=length, causal=causal, backward=True, **common)
        for length, causal in product((64, 128), (True, False))
    ]
    expected += [Case(queries=1, keys=512, window=window, **common) for window in ((64, 0), (-1, 0))]
    expected += [Case(lengths_q=lengths, **common) for lengths in ((3, 5), (8,))]
    from_yaml = bench.read_cases(written(tmp_path, "mine.yaml", YAML))
    assert [case.but(name="") for case in from_yaml] == expected
    assert from_yaml == bench.read_cases(written(tmp_path, "mine.toml", TOML))
    assert from_yaml[0].name == "sweep B1 H4/2 S64 D32 causal float32 fwd+bwd"


@pytest.mark.parametrize(
    ("defaults", "case", "lengths"),
    [
        ("length: 64", "queries: 1, keys: 512", (1, 512)),
        ("length: 64", "queries: 1", (1, 64)),
        ("length: 64", "keys: 512", (64, 512)),
        ("queries: 1, keys: 512", "length: 64", (64, 64)),
        ("keys: 512", "queries: 1", (1, 512)),
        ("length: 64", "heads: 2", (64, 64)),
        ("length: 64", "lengths_q: [100, 200]", (200, 200)),
        ("queries: 1024, keys: 64", "lengths_q: [100, 200]", (200, 200)),
        ("queries: 1024", "lengths_q: [100, 200], queries: 512", (512, 200)),
        ("lengths_q: [100, 200]", "keys: 512", (200, 512)),
        ("lengths_q: [100, 200]", "lengths_q: null, length: 64", (64, 64)),
    ],
)
def test_what_a_case_says_of_its_lengths_comes_before_what_the_defaults_say(tmp_path, defaults, case, lengths):
    text = f"defaults: {{{defaults}, device: cpu}}\ncases: [{{{case}}}]"
    (found,) = bench.read_cases(written(tmp_path, "mine.yaml", text))
    assert (found.queries, found.keys) == lengths


def test_device_and_dtype_from_outside_win(tmp_path):
    cases = bench.read_cases(written(tmp_path, "mine.yaml", YAML), device="cuda", dtype="float16")
    assert {(case.device, case.dtype) for case in cases} == {("cuda", "float16")}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "cases: [{heads: 4, quries: 8}]", "case 1: no field 'quries'; did you mean 'queries'?"),
        ("a.yaml", "cases: [{heads: 4, lenght: 8}]", "case 1: no field 'lenght'; did you mean 'length'?"),
        ("a.yaml", "cases: [{length: 8, keys: 16}]", "case 1: length: sets queries and keys at once; leave out keys"),
        (
            "a.yaml",
            "cases: [{length: 8, lengths_q: [5, 8]}]",
            "case 1: length: packed sequences have those of lengths_q",
        ),
        (
            "a.yaml",
            "{defaults: {lengths_q: [5, 8]}, cases: [{length: 8}]}",
            "case 1: length: packed sequences have those of lengths_q; leave out one of the two",
        ),
        ("a.yaml", "cases: [{heads: 4}, {heads: 0}]", "case 2: heads: expected a number from 1 on, got 0"),
        ("a.yaml", "cases: [heads]", "case 1: expected fields such as heads and queries, got 'heads'"),
        ("a.yaml", "cases: [{heads: [2, two]}]", "case 1: heads: expected a number from 1 on, got 'two'"),
        ("a.yaml", "[1, 2]", "expected a list called 'cases', got list"),
        ("a.yaml", "case: []", "expected a list called 'cases', got the fields case"),
        ("a.yaml", "cases: []", "has no cases"),
        ("a.yaml", "cases: []\ndefault: {}", "expected 'cases' and 'defaults', got 'default'"),
        ("a.yaml", "cases: [", "is not YAML"),
        ("a.toml", "cases = [", "is not TOML"),
        ("a.json", "{}", "holds no captured cases; attnplug.capture() and save() make such files"),
        ("a.txt", "{}", "expected a file that ends in .yaml, .yml"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_file_case_and_field(tmp_path, name, text, message):
    with pytest.raises(BenchError, match=re.escape(message)) as caught:
        bench.read_cases(written(tmp_path, name, text))
    assert name in str(caught.value)


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(BenchError, match="cannot be read"):
        bench.read_cases(tmp_path / "none.yaml")
