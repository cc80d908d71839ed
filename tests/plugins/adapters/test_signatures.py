"""A library whose functions have changed is not called: its signatures are compared first."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import libraries

pytest.importorskip("attnplug_adapters", reason="attnplug-adapters is not installed")
from adapters_on_standins import standin
from attnplug_adapters import flash_attn2, flash_attn3, flash_attn4, flashinfer, hub_kernels, sage_attention, xformers
from attnplug_adapters.library import Adapter, differences, fits

RECORDED = Path(libraries.__file__).with_name("signatures.json")
PAGES = Path(__file__).parents[3] / "docs" / "adapters"
RELEASES: dict[str, dict[str, str]] = json.loads(RECORDED.read_text())
TOO_OLD = {"hub 0.13.0": RELEASES.pop("hub 0.13.0")}
INTERFACES: dict[str, tuple[type, ...]] = {
    "flash_attn2": flash_attn2.FlashAttn2.interfaces,
    "flash_attn3": flash_attn3.FlashAttn3.interfaces,
    "flash_attn4": flash_attn4.FlashAttn4.interfaces,
    "sage_attention": sage_attention.SageAttention.interfaces,
    "xformers": xformers.XFormers.interfaces,
    "flashinfer": flashinfer.FlashInfer.interfaces,
    "hub": (hub_kernels.Interface,),
}


def function(text: str) -> Any:
    """Return a function of this signature."""
    namespace: dict[str, Any] = {}
    exec(f"def function{text}: ...", {}, namespace)
    return namespace["function"]


def module(functions: dict[str, str]) -> types.ModuleType:
    """Return a module with functions, and methods of classes, of these signatures."""
    made = types.ModuleType("library")
    for name, text in functions.items():
        *classes, last = name.split(".")
        owner: Any = made
        for part in classes:
            if not hasattr(owner, part):
                setattr(owner, part, type(part, (), {}))
            owner = getattr(owner, part)
        setattr(owner, last, function(text))
    return made


@pytest.mark.parametrize("release", RELEASES)
def test_calls_fit_the_signatures_of_every_supported_release(release: str) -> None:
    found = module(RELEASES[release])
    assert not min((differences(found, interface) for interface in INTERFACES[release.split()[0]]), key=len)


@pytest.mark.parametrize("release", TOO_OLD)
def test_a_release_that_lacks_an_argument_does_not_fit(release: str) -> None:
    (reason,) = differences(module(TOO_OLD[release]), INTERFACES[release.split()[0]][0])
    assert "trust_remote_code" in reason


@pytest.mark.parametrize(
    ("name", "release"),
    [
        ("flash_attn2", "flash_attn2 2.8.3"),
        ("flash_attn3", "flash_attn3 source, 2026-08"),
        ("sage2", "sage_attention 2.2.0"),
        ("sage1", "sage_attention 1.0.6"),
        ("xformers", "xformers 0.0.33.post2"),
    ],
)
def test_the_stand_ins_have_the_signatures_of_the_release_that_they_stand_for(name: str, release: str) -> None:
    for called, text in RELEASES[release].items():
        found = inspect.signature(getattr(standin(name), called))
        bare = [parameter.replace(annotation=parameter.empty) for parameter in found.parameters.values()]
        assert bare == list(inspect.signature(function(text)).parameters.values())


@pytest.mark.parametrize("name", INTERFACES)
def test_page_and_module_name_the_releases_whose_signatures_are_recorded(name: str) -> None:
    recorded = [re.split(r"[ ,]+", release)[-1] for release in RELEASES if release.startswith(f"{name} ")]
    module = importlib.import_module(f"attnplug_adapters.{'hub_kernels' if name == 'hub' else name}")
    for text in (str(module.__doc__), (PAGES / f"{name}.md").read_text()):
        sentence = re.search(r"Written for (.*?)\.\s", text, re.S)
        assert sentence is not None
        written = re.findall(r"\b\d+[-.][\w.-]*\w", re.sub(r"\([^)]*\)", "", sentence[1]))
        assert all(any(version.startswith(end) for version in recorded) for end in written), (written, recorded)
        for end in (recorded[0], recorded[-1]):
            assert any(end.startswith(version) for version in written), (written, recorded)


class Library:
    @staticmethod
    def attend(q: Any, k: Any, scale: Any = None, causal: Any = False) -> Any: ...


class OneFunction(Adapter):
    interfaces = (Library,)


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("(q, k, scale=None, causal=False)", True),
        ("(q, k, mask=None, scale=None, causal=False)", True),
        ("(q, k, *, scale=None, causal=False, deterministic=False)", True),
        ("(q, k, causal=False, scale=None)", True),
        ("(q, k, scale=None, causal=False, **kwargs)", True),
        ("(k, q, scale=None, causal=False)", False),
        ("(q, k, scale=1.0, causal=False)", False),
        ("(q, k, scale=None, **kwargs)", False),
        ("(q, k, scale=None)", False),
        ("(q, k, mask, scale=None, causal=False)", False),
        ("(q, k, scale, causal=False)", False),
    ],
)
def test_a_change_matters_exactly_if_calls_would_mean_something_else(text: str, accepted: bool) -> None:
    found = module({"attend": text})
    assert fits(inspect.signature(found.attend), inspect.signature(Library.attend)) == accepted
    reasons = OneFunction(found).unavailable()
    assert (not reasons) == accepted
    if not accepted:
        assert "attend(q, k, scale=None, causal=False)" in reasons[0]  # what it was written for
        assert f"attend{text}" in reasons[0]  # and what was found


def test_a_function_that_is_gone_is_named() -> None:
    assert OneFunction(module({})).unavailable() == (
        "library has no attend; written for attend(q, k, scale=None, causal=False)",
    )


def test_a_library_that_does_not_import_is_a_reason_not_an_exception() -> None:
    (reason,) = OneFunction("no_such_library").unavailable()
    assert reason.startswith("no_such_library could not be imported: ModuleNotFoundError")


class TestRealPackages:
    """Where a package imports on this machine, its own signatures are compared."""

    def test_sageattention(self) -> None:
        library = pytest.importorskip("sageattention", reason="pip install sageattention would run this")
        assert not min((differences(library, item) for item in INTERFACES["sage_attention"]), key=len)
        assert not differences(library, sage_attention.Packed)

    def test_xformers(self) -> None:
        library = pytest.importorskip("xformers.ops", reason="pip install --no-deps xformers would run this")
        assert not differences(library, xformers.Interface)
        masks = library.fmha.attn_bias
        mask = masks.BlockDiagonalMask.from_seqlens([3, 4], [5, 9], device=torch.device("cpu"))
        assert type(mask.make_causal_from_bottomright()) is masks.BlockDiagonalCausalFromBottomRightMask
        assert mask.make_local_attention_from_bottomright(2)._window_size == 2
        assert isinstance(library.fmha.flash.FwOp.is_available(), bool)

    def test_flashinfer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUTE_DSL_CACHE_DIR", "")  # which its import sets
        library = pytest.importorskip("flashinfer", reason="pip install flashinfer-python would run this")
        assert not differences(library, flashinfer.Interface)

    def test_kernels(self) -> None:
        library = pytest.importorskip("kernels", reason="pip install kernels would run this")
        assert not differences(library, hub_kernels.Interface)
