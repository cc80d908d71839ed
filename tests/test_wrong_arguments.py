"""Every public function and class refuses what it cannot use: the error names the argument and what came."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import attnplug
from attnplug import Capabilities, Choices, ImplSpec, SDPBackend, bench
from attnplug.testing import Call, assert_right, check_impl, check_impls, parametrize_with_checks
from attnplug.tuning import choices_from

Q = torch.randn(1, 2, 4, 8)
PACKED, STARTS = torch.randn(4, 2, 8), torch.tensor([0, 2, 4], dtype=torch.int32)
NESTED = torch.nested.nested_tensor([torch.ones(2, 3)])
ARRAY = np.ones(3)
HUGE = 10**30
attend = partial(attnplug.scaled_dot_product_attention, Q, Q, Q)
pack = partial(attnplug.varlen_attn, cu_seq_q=STARTS, cu_seq_k=STARTS, max_q=2, max_k=2)
packed = partial(pack, PACKED, PACKED, PACKED)
spec = partial(ImplSpec, name="x", kernel="x", backend=SDPBackend.MATH)
right = partial(assert_right, dict(query=Q, key=Q, value=Q))


@pytest.mark.parametrize(
    ("call", "argument", "values"),
    [
        (attend, "attn_mask", [NESTED, ARRAY, "causal"]),
        (attend, "softcap", ["30", None, True, float("nan"), HUGE]),
        (attend, "dropout_p", ["0.1", 2, None]),
        (partial(attend, softcap=1.0), "scale", ["1", HUGE, [1.0]]),
        (attend, "sinks", [NESTED, [0.0, 0.0]]),
        (attend, "alibi_slopes", [NESTED, 1.0]),
        (partial(pack, key=PACKED, value=PACKED), "query", [NESTED, None]),
        (packed, "block_table", ["pages", ARRAY, torch.ones(2)]),
        (packed, "max_q", [HUGE, -1, 2.0, None]),
        (packed, "max_k", [HUGE, "2"]),
        (partial(attnplug.register_flash_attention_impl, register_fn=print), "impl", [[], 7, None]),
        (attnplug.activate_flash_attention_impl, "impl", ["nope", None, []]),
        (attnplug.unregister_impl, "name", ["nope", None, ARRAY]),
        (attnplug.use_choices, "choices", ["", 7, ARRAY]),
        (Choices.load, "path", ["", 7, b"x"]),
        (Choices(()).save, "path", ["", 7, b"x"]),
        (partial(attnplug.verify, 0.5), "seed", [[], 0.5, True, None]),
        (partial(attnplug.verify, 0.5), "on_mismatch", ["shout", ARRAY, None]),
        (attnplug.summary().shares, "profile", [None, "trace.json"]),
        (attnplug.instrument, "meter_provider", ["otel", torch.ones(3), ARRAY]),
        (partial(attnplug.instrument, None), "tracer_provider", ["otel", int]),
        (attnplug.compute_capability, "device", ["gpu", "", None, HUGE]),
        (spec, "kernel", [3.5, [], "not a path", None]),
        (spec, "requires", ["triton", torch.tensor(1.0), NESTED, 7]),
        (Capabilities, "devices", ["cpu", torch.tensor(1.0), 7]),
        (Capabilities, "features", [NESTED, ["speed"], "CAUSAL"]),
        (bench.Case, "mask", [ARRAY, "triangle", None]),
        (bench.Case, "causal_variant", [ARRAY, 1]),
        (bench.run, "cases", [7, [7], []]),
        (partial(bench.run, "laptop"), "impls", [7, ["nope"], [[]]]),
        (partial(bench.run, "laptop"), "seconds", ["1", 0, None]),
        (partial(bench.run, "laptop"), "caches", ["warm", 7, ["hot"], [[]]]),
        (bench.case_set, "name", [7, [], "nope"]),
        (bench.read_cases, "path", [7, "", None]),
        (bench.Report.read, "path", [7, "", None]),
        (bench.Cases.load, "path", [7, "", None]),
        (bench.Cases().save, "path", [7, "", None]),
        (partial(bench.compare, None), "after", [None]),
        (partial(bench.write, None), "path", [None]),
        (attnplug.tune, "cases", [7, [7], "nope"]),
        (partial(attnplug.tune, "laptop"), "impls", [7, [7], "nope"]),
        (partial(attnplug.tune, "laptop"), "seconds", ["1", 0, None]),
        (choices_from, "report", [7, ["x"], NESTED]),
        (partial(choices_from, []), "counts", [7, {"x": 1}, ARRAY]),
        (check_impl, "name", ["nope", [], None]),
        (partial(check_impl, "torch"), "device", ["gpu", HUGE]),
        (partial(check_impl, "torch"), "dtype", ["int8", 7]),
        (partial(check_impl, "torch"), "level", [ARRAY, "deep"]),
        (partial(check_impl, "torch"), "checks", [7, "check_values", ["nope"], [[]], torch.ones(3)]),
        (partial(check_impl, "torch"), "workers", [-1, HUGE, "2", 1.5]),
        (partial(check_impl, "torch"), "timeout", [0, "9", None]),
        (check_impls, "names", ["torch", 7]),
        (parametrize_with_checks, "name", ["nope", [], None]),
        (partial(parametrize_with_checks, "torch"), "expected_failures", [7, ["check_values"], {"nope": ""}]),
        (partial(parametrize_with_checks, "torch"), "timeout", [-1, "9"]),
        (right, "out", [None, "x"]),
        (partial(right, Q), "lse", [7]),
        (partial(right, Q), "gradients", [7, {"query": 7}, {"sinks": Q}]),
        (partial(right, Q, gradients={"query": Q}), "grad_out", [None, 7]),
        (partial(assert_right, out=Q), "arguments", [None, {}, {"qurey": Q}, [Q]]),
        (Call().check, "impl", ["nope", 7, ARRAY]),
        (Call().params, "inputs", [None, "x"]),
        (Call().run, "impl", ["nope", 7]),
    ],
)
def test_a_wrong_argument_is_named(call: Callable[..., Any], argument: str, values: list[Any]) -> None:
    others = {"after": "before", "path": "report", "name": "set", "cases": "set"}  # asked for before, or called so
    for value in values:
        with pytest.raises((TypeError, ValueError)) as caught:
            call(**{argument: value})
        said = str(caught.value)
        assert argument in said or said.startswith(others.get(argument, argument))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        *((name, [-1, "2", 2.5, None, HUGE, True]) for name in ("batch", "heads", "queries", "keys", "head_size")),
        ("kv_heads", [-1, "2"]),
        ("page_size", [0, "16"]),
        ("dtype", ["int8", None, torch.float32]),
        ("device", ["gpu", [], HUGE]),
        ("mask", ["triangle", True, None]),
        ("mask_dims", ["xy", None]),
        ("causal_variant", ["MIDDLE", 1, []]),
        ("alibi", [True, "x"]),
        ("sinks", [1, torch.ones(3)]),
        ("used", ["x", 7, (-1,), (1.5,)]),
        ("lengths_q", [(1, 2), 7, "x"]),
        ("gradients", ["query", ("qurey",), ("sinks",)]),
        *((name, ["odd", None, []]) for name in ("values", "layout", "mask_layout", "numbers_layout")),
        ("seed", [None, "x", 0.5]),
    ],
)
def test_a_wrong_field_of_a_call_is_named_when_it_is_made(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises((TypeError, ValueError), match=field):
            Call(**{field: value}).check("torch")


@pytest.fixture
def group() -> Iterator[Any]:
    if not dist.is_available():
        pytest.skip("PyTorch is built without torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_wrong_argument_of_what_cuts_sequences_is_named(group: Any) -> None:
    cut = partial(attnplug.parallel.shard_sequence, group=group)
    join = partial(attnplug.parallel.unshard_sequence, group=group)
    positions = partial(attnplug.parallel.sequence_positions, group=group)
    module = partial(attnplug.parallel.context_parallel, torch.nn.Identity(), group)
    for call, argument, values in (
        (cut, "tensor", [None, "x", NESTED]),
        (partial(cut, Q), "dim", [4, -5, "2", None]),
        (partial(cut, Q), "is_causal", [1, torch.ones(3)]),
        (join, "tensor", [None, NESTED]),
        (partial(join, Q), "length", ["8", 1.5]),
        (positions, "length", [None, "8", -1, HUGE]),
        (partial(positions, 8), "device", ["gpu", [], HUGE]),
        (module, "method", [[], "rings"]),
        (module, "is_causal", [1, None]),
    ):
        for value in values:
            with pytest.raises((TypeError, ValueError), match=argument):
                call(**{argument: value})


def test_arguments_of_numpy_are_numbers(tmp_path: Path) -> None:
    assert attnplug.verify(0.5, "torch", seed=np.int64(3)).seed == 3
    assert Call(heads=np.int64(2), seed=np.int32(1)).make().arguments["query"].shape[1] == 2
    assert Choices(()).save(tmp_path / "choices.json").exists()


def test_what_a_call_holds_is_shown_whatever_it_is() -> None:
    shown = repr(attnplug.SDPAParams(NESTED, ARRAY, np.float64(1), scale=np.float64(2)))
    assert "float32[nested]" in shown and "scale=np.float64(2.0)" in shown.replace("scale=2.0", "scale=np.float64(2.0)")
