"""What a kernel defines is what `Kernel` lists: a name that is nearly one of those, or a wrong type, is an error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import attnplug
from attnplug import ImplSpec, Kernel, SDPBackend

FORWARD = "def forward(params): return params.value.clone(), None\n"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Return a function that registers a module of this source as a kernel, and returns why it is broken."""
    monkeypatch.syspath_prepend(tmp_path)
    helpers = "def support(params): ...\ndef backwards(): ...\ncomposit = True\n"
    (tmp_path / "helpers_of_kernels.py").write_text(helpers)

    def load(source: str) -> str:
        (tmp_path / "strict_kernel.py").write_text(source)
        sys.modules.pop("strict_kernel", None)
        return broken("strict_kernel")

    yield load
    sys.modules.pop("strict_kernel", None)
    sys.modules.pop("helpers_of_kernels", None)


def broken(kernel: Any) -> str:
    attnplug.register_impl(ImplSpec(name="strict", kernel=kernel, backend=SDPBackend.MATH), replace=True)
    query = torch.ones(1, 1, 2, 8)
    try:
        with pytest.warns(attnplug.PluginWarning):
            attnplug.explain(query, query, query, impl="strict")
    except pytest.fail.Exception:  # it did not warn
        assert attnplug.explain(query, query, query, impl="strict").chosen == "strict"
    (record,) = (record for record in attnplug.list_impls() if record.name == "strict")
    assert record.remedy == ""  # no command mends a program
    return record.reason


@pytest.mark.parametrize(
    ("source", "wrong", "meant"),
    [
        ("def support(params): ...", "support", "supports"),
        ("def suports(params): ...", "suports", "supports"),
        ("def Supports(params): ...", "Supports", "supports"),
        ("support = lambda params: None", "support", "supports"),
        ("def backwards(params, *rest): ...", "backwards", "backward"),
        ("def backwrad(params, *rest): ...", "backwrad", "backward"),
        ("class Backward: ...", "Backward", "backward"),
        ("composit = True", "composit", "composite"),
        ("Composite = True", "Composite", "composite"),
        ("shape_dependant = True", "shape_dependant", "shape_dependent"),
        ("shapes_dependent = True", "shapes_dependent", "shape_dependent"),
        ("anyform = False", "anyform", "any_form"),
        ("def unavailible(): ...", "unavailible", "unavailable"),
        ("def Fake(params): ...", "Fake", "fake"),
        ("def familly(params): ...", "familly", "family"),
    ],
)
def test_a_misspelt_attribute_is_an_error_that_says_what_was_meant(
    load: Callable[[str], str], source: str, wrong: str, meant: str
) -> None:
    assert f"{wrong!r} is not an attribute of a kernel; did you mean {meant!r}?" in load(FORWARD + source)


def test_a_misspelt_forward_is_an_error_that_says_what_was_meant(load: Callable[[str], str]) -> None:
    assert "'Forward' is not an attribute of a kernel; did you mean 'forward'?" in load("class Forward: ...")


@pytest.mark.parametrize(
    "source",
    [
        "def forward_kernel(query): ...\ndef forward_dense(query): ...\ndef forwards(query): ...",
        "def backward_kernel(query): ...\ndef backward_query(query): ...",
        "def backward(params, *rest): ...\ndef backward_q(query): ...\ndef backwards(query): ...",
        "def supports(params): ...\ndef support(size): ...\ndef supported(size): ...",
        "def supported(size): ...",
        "def compose(one, other): ...\ndef composites(masks): ...",
        "def available(): ...\ndef make(shape): ...\ndef plan(shape): ...\ndef take(rows): ...\ndef register(): ...",
        "support, families, shapes = 3, ('a',), {}",
        "def _support(params): ...\n_composit = True",
        "from helpers_of_kernels import support, backwards",
        "import helpers_of_kernels as backwards",
    ],
)
def test_helpers_and_imports_of_other_names_are_the_author_s_business(load: Callable[[str], str], source: str) -> None:
    assert load(FORWARD + source) == ""


def test_objects_are_held_to_the_same_names() -> None:
    def forward(params: Any) -> Any:
        return params.value.clone(), None

    assert "'support' is not an attribute of a kernel" in broken(SimpleNamespace(forward=forward, support=print))

    class WithMethod:
        @staticmethod
        def forward(params: Any) -> Any:
            return forward(params)

        def backwards(self, params: Any) -> None:
            """Would be ignored."""

    assert "did you mean 'backward'?" in broken(WithMethod())
    assert "did you mean 'backward'?" in broken(WithMethod)
    assert broken(SimpleNamespace(forward=forward, name="mine", table={})) == ""


@pytest.mark.parametrize("flag", ["composite", "shape_dependent", "any_form"])
@pytest.mark.parametrize("value", ["'yes'", "1", "None"])
def test_a_flag_that_is_neither_true_nor_false_is_an_error(load: Callable[[str], str], flag: str, value: str) -> None:
    assert f"{flag} is {value}; expected True or False" in load(f"{FORWARD}{flag} = {value}")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("backward = True", "backward is True, which is not callable"),
        ("supports = 'always'", "supports is 'always', which is not callable"),
        ("family = 3", "family is 3, which is not callable"),
        ("def family(): ...", "family() cannot be called as family(params)"),
        ("def register_fn(name): ...", "register_fn(name) cannot be called as register_fn()"),
    ],
)
def test_a_function_of_another_form_is_an_error(load: Callable[[str], str], source: str, said: str) -> None:
    assert said in load(FORWARD + source)


def test_a_kernel_object_is_checked_too() -> None:
    kernel = Kernel(forward=lambda params: (params.value.clone(), None), composite="yes")
    assert "composite is 'yes'; expected True or False" in broken(kernel)
    assert broken(Kernel(forward=lambda params: (params.value.clone(), None))) == ""


@pytest.mark.parametrize("source", ["def forward(params, mask): ...", FORWARD + "def supports(): ..."])
def test_a_wrong_signature_is_found_where_the_function_is(load: Callable[[str], str], source: str) -> None:
    line = len(source.splitlines())
    assert load(source).endswith(f"strict_kernel.py, line {line})")


def test_no_place_in_attnplug_is_named_for_a_mistake_in_a_kernel(load: Callable[[str], str]) -> None:
    for source in ("", "forward = 3", FORWARD + "composite = 'yes'", FORWARD + "def support(params): ..."):
        reason = load(source)
        assert "SpecError" in reason and ", line " not in reason
