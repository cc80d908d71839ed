"""Measured choices under `torch.compile` and `torch.export`."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

import attnplug
from attnplug import ChoicesWarning
from attnplug.bench import Case
from measured import fastest, in_use

STEP = Case(heads=2, queries=1, keys=8, head_size=8)
CHOICES = fastest(
    (STEP, "torch"),
    (STEP.but(keys=16), "torch"),
    (STEP.but(keys=32), "aten_flash"),
    (STEP.but(keys=64), "aten_flash"),
    (STEP.but(keys=128), "aten_math"),
)
query = torch.randn(1, 2, 1, 8)


def keys(length: int) -> torch.Tensor:
    return torch.randn(1, 2, length, 8)


def test_a_compiled_decode_loop_is_compiled_again_only_where_the_choice_is_another():
    counter = CompileCounter()

    def step(query, key):
        return F.scaled_dot_product_attention(query, key, key) + 1

    compiled, compilations = torch.compile(step, backend=counter, fullgraph=True), []
    with in_use(CHOICES), torch.no_grad():
        for length in (5, 6, 7, 8, 9, 16, 17, 30, 32, 33, 64, 65, 66, 128, 5, 40, 100):
            before = counter.frame_count
            compiled(query, keys(length))
            compilations += [length] * (counter.frame_count - before)
    # Once as it is, once for any length, and once for each other choice.
    assert compilations == [5, 6, 17, 65]


def test_packed_sequences_that_grow_are_compiled_again_only_where_the_choice_is_another():
    class Simple:
        composite = True

        @staticmethod
        def forward(params):
            return params.query * 0, None

    capabilities = attnplug.Capabilities(features=frozenset({attnplug.Feature.VARLEN}))
    for name in ("one", "other"):
        attnplug.register_impl(attnplug.ImplSpec(name=name, kernel=Simple, backend=None, capabilities=capabilities))
    case = Case(heads=2, head_size=8, lengths_q=(1, 1), lengths_k=(8, 8))
    grown = {size: case.but(keys=size, lengths_k=(size, size)) for size in (8, 16, 32, 64)}
    choices = fastest(*((case, "other" if size == 32 else "one") for size, case in grown.items()))
    starts, counter, compilations = torch.tensor([0, 1, 2], dtype=torch.int32), CompileCounter(), []

    def step(packed, key, key_starts, longest):
        return attnplug.varlen_attn(packed, key, key, starts, key_starts, 1, longest) + 1

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    with in_use(choices), torch.no_grad():
        for length in (5, 6, 8, 9, 16, 17, 30, 33, 60, 5, 20):
            before = counter.frame_count
            compiled(torch.randn(2, 2, 8), torch.randn(2 * length, 2, 8), starts * length, length)
            compilations += [length] * (counter.frame_count - before)
    assert compilations == [5, 6, 17, 33]


def test_a_compiled_function_runs_what_the_eager_one_runs():
    def attend(query, key):
        return attnplug.scaled_dot_product_attention(query, key, key)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with in_use(CHOICES), torch.no_grad():
        for length in (5, 9, 17, 64, 65, 128):
            names = []
            for call in (attend, compiled):
                with attnplug.record() as calls:
                    call(query, keys(length))
                names += [call.impl for call in calls]
            assert len(names) == 2 and names[0] == names[1], (length, names)


def test_a_change_of_the_choices_is_seen_by_code_that_was_compiled_before():
    compiled = torch.compile(lambda query, key: F.scaled_dot_product_attention(query, key, key), backend="aot_eager")

    def ran() -> str:
        with attnplug.record() as calls:
            compiled(query, keys(20))
        return calls[0].impl

    with torch.no_grad():
        with in_use(CHOICES):
            assert ran() == "aten_flash"
        with in_use(fastest((STEP.but(keys=32), "aten_math"))):
            assert ran() == "aten_math"


def test_a_compiled_call_that_was_not_measured_warns_once():
    compiled = torch.compile(attnplug.scaled_dot_product_attention, backend="eager")
    with in_use(CHOICES), pytest.warns(ChoicesWarning, match=r"not measured \(float64 D8\)") as warned:
        [compiled(query.double(), *[keys(length).double()] * 2) for length in (3, 4, 5)]
    assert [each.category for each in warned].count(ChoicesWarning) == 1


class Step(torch.nn.Module):
    def forward(self, query, key):
        return attnplug.scaled_dot_product_attention(query, key, key)


def operators(program) -> str:
    found = [program.graph, *(module.graph for module in program.graph_module.modules() if hasattr(module, "graph"))]
    return " ".join(str(node.target) for graph in found for node in graph.nodes)


def test_an_exported_program_has_the_choice_for_its_lengths_and_none_that_depends_on_a_free_one():
    with in_use(CHOICES), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ChoicesWarning)
        fixed = torch.export.export(Step(), (query, keys(40)))
        free = torch.export.export(
            Step(), (query, keys(40)), dynamic_shapes={"query": None, "key": {2: torch.export.Dim("keys", min=2)}}
        )
    assert "flash_attention_for_cpu" in operators(fixed)
    assert "flash_attention_for_cpu" not in operators(free)
    free.module()(query, keys(99))
