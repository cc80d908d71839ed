"""Kernels of the Hub: pinned, asked for by name, behind the adapter of the library inside; nothing is downloaded."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

import attnplug
from adapters_on_standins import on_cpu, register, standin

attnplug_adapters = pytest.importorskip("attnplug_adapters", reason="attnplug-adapters is not installed")
from attnplug_adapters import hub_pins, specs
from attnplug_adapters.hub_kernels import Hub
from attnplug_adapters.hub_pins import Pinned, hub_spec

COMMIT = "0123456789abcdef" * 2 + "01234567"


class FakeHub(types.ModuleType):
    """The package `kernels`, with one repository in it."""

    def __init__(self, library: types.ModuleType) -> None:
        super().__init__("kernels")
        self.library = library
        self.asked: list[dict[str, Any]] = []

    def get_kernel(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        version: int | None = None,
        backend: str | None = None,
        user_agent: str | None = None,
        trust_remote_code: bool = False,
        check_arch: bool = True,
    ) -> types.ModuleType:
        self.asked.append({"repo_id": repo_id, "revision": revision, "version": version, "trust": trust_remote_code})
        package = types.ModuleType("flash_attn2_0123abc")
        package.flash_attn_interface = self.library
        return package


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    made = FakeHub(standin("flash_attn2"))
    monkeypatch.setitem(sys.modules, "kernels", made)
    for name, capabilities in hub_pins.CAPABILITIES.items():
        monkeypatch.setitem(hub_pins.CAPABILITIES, name, on_cpu(capabilities))
    return made


def test_a_kernel_that_is_asked_for_is_an_implementation_like_any_other(fake_hub: FakeHub) -> None:
    name = attnplug_adapters.hub("kernels-community/flash-attn2", version=1)
    assert name == "hub.flash-attn2" and name in attnplug.list_flash_attention_impls()
    assert fake_hub.asked == [
        {"repo_id": "kernels-community/flash-attn2", "revision": None, "version": 1, "trust": False}
    ]
    query, key = torch.randn(1, 2, 5, 16).half(), torch.randn(1, 2, 9, 16).half()
    options = {"is_causal": True, "causal_variant": attnplug.CausalVariant.LOWER_RIGHT}
    found = attnplug.scaled_dot_product_attention(query, key, key, **options, impl=name)
    expected = attnplug.scaled_dot_product_attention(query, key, key, **options, impl="math_ref")
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_several_kernels_may_be_there_at_once(fake_hub: FakeHub) -> None:
    first = attnplug_adapters.hub("kernels-community/flash-attn2", version=1)
    second = attnplug_adapters.hub("mine/flash-attn2", revision=COMMIT, name="mine", trust_remote_code=True)
    assert {first, second} <= set(attnplug.list_flash_attention_impls())
    assert fake_hub.asked[1] == {"repo_id": "mine/flash-attn2", "revision": COMMIT, "version": None, "trust": True}


def test_two_versions_of_one_repository_need_names(fake_hub: FakeHub) -> None:
    attnplug_adapters.hub("kernels-community/flash-attn2", version=1)
    with pytest.raises(attnplug.DuplicateImplementationError, match="hub.flash-attn2.*name="):
        attnplug_adapters.hub("kernels-community/flash-attn2", version=2)
    assert len(fake_hub.asked) == 1, "nothing is downloaded under a name that is taken"
    attnplug_adapters.hub("kernels-community/flash-attn2", version=2, name="second")


@pytest.mark.parametrize("name", ["torch", "flash_attn2", "", "no name", 3])
def test_a_name_that_cannot_be_had_is_refused_before_the_download(fake_hub: FakeHub, name: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="name"):
        attnplug_adapters.hub("kernels-community/flash-attn2", version=1, name=name)
    assert fake_hub.asked == []


@pytest.mark.parametrize(
    ("repository", "pin", "message"),
    [
        ("kernels-community/flash-attn2", {}, "give one of them"),
        ("kernels-community/flash-attn2", {"version": 1, "revision": COMMIT}, "give one of them"),
        ("kernels-community/flash-attn2", {"version": 0}, "from 1 on"),
        ("kernels-community/flash-attn2", {"revision": "main"}, "40 hexadecimal digits"),
        ("kernels-community/relu", {"version": 1}, "expected owner/name with the name one of flash-attn2"),
        ("flash-attn2", {"version": 1}, "expected owner/name"),
    ],
)
def test_code_that_is_not_pinned_is_not_even_downloaded(
    fake_hub: FakeHub, repository: str, pin: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attnplug_adapters.hub(repository, **pin)
    assert fake_hub.asked == []


@pytest.mark.parametrize("wrong", [{"repository": 3}, {"version": True}, {"version": "1"}, {"revision": 7}])
def test_arguments_of_other_types_are_named(fake_hub: FakeHub, wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"^{next(iter(wrong))}: expected "):
        attnplug_adapters.hub(**{"repository": "kernels-community/flash-attn2"} | wrong)
    assert fake_hub.asked == []


def test_a_kernel_with_other_functions_is_refused(fake_hub: FakeHub) -> None:
    fake_hub.library = types.ModuleType("flash_attn_interface")
    with pytest.raises(attnplug.PluginError, match="kernels-community/flash-attn2: flash_attn_interface has no _flash"):
        attnplug_adapters.hub("kernels-community/flash-attn2", version=1)


def test_without_the_package_the_error_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(ModuleNotFoundError, match="pip install kernels"):
        attnplug_adapters.hub("kernels-community/flash-attn2", version=1)


class TestEnvironment:
    def test_nothing_is_downloaded_unless_it_is_asked_for(
        self, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("ATTNPLUG_HUB", raising=False)
        assert "no kernel is selected: set ATTNPLUG_HUB=" in str(Hub().unavailable())
        assert fake_hub.asked == []

    @pytest.mark.parametrize(("pin", "version", "revision"), [("3", 3, None), (COMMIT, None, COMMIT)])
    def test_the_variable_names_repository_and_pin(
        self, monkeypatch: pytest.MonkeyPatch, pin: str, version: int | None, revision: str | None
    ) -> None:
        monkeypatch.setenv("ATTNPLUG_HUB", f"kernels-community/flash-attn3@{pin}")
        assert Pinned.from_environment() == Pinned("kernels-community/flash-attn3", version, revision)
        assert hub_spec().capabilities == hub_pins.CAPABILITIES["flash-attn3"]

    def test_the_kernel_is_downloaded_when_it_is_first_asked(
        self, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ATTNPLUG_HUB", "kernels-community/flash-attn2@2")
        kernel = Hub()
        assert fake_hub.asked == []
        assert not kernel.unavailable() and len(fake_hub.asked) == 1
        assert not kernel.unavailable() and len(fake_hub.asked) == 1

    @pytest.mark.parametrize("value", ["kernels-community/flash-attn2", "kernels-community/flash-attn2@main", "x@1"])
    def test_a_value_that_means_nothing_is_a_reason_that_names_the_variable(
        self, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, value: str
    ) -> None:
        monkeypatch.setenv("ATTNPLUG_HUB", value)
        assert str(Hub().unavailable()).startswith("ATTNPLUG_HUB: ")
        with pytest.warns(attnplug.PluginWarning, match="^ATTNPLUG_HUB: "):
            hub_spec()
        monkeypatch.setenv("ATTNPLUG_STRICT", "1")
        with pytest.raises(ValueError, match="^ATTNPLUG_HUB: "):
            hub_spec()
        assert fake_hub.asked == []

    @pytest.mark.parametrize(("library", "lengths_count"), [("flash-attn2", False), ("sage-attention", True)])
    def test_lengths_count_where_they_do_for_the_library_inside(
        self, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, library: str, lengths_count: bool
    ) -> None:
        fake_hub.library = standin("flash_attn2" if library == "flash-attn2" else "sage2")
        monkeypatch.setenv("ATTNPLUG_HUB", f"kernels-community/{library}@2")
        asked: list[int] = []

        class Asked(Hub):
            def supports(self, params: attnplug.SDPAParams) -> Any:
                asked.append(params.key.shape[-2])
                return super().supports(params)

        kernel = Asked()
        register(kernel, specs.FLASH_ATTN2 if library == "flash-attn2" else specs.SAGE_ATTENTION)
        for length in (70, 80, 70, 90):
            query, key = torch.randn(1, 2, 5, 64).half(), torch.randn(1, 2, length, 64).half()
            attnplug.scaled_dot_product_attention(query, key, key, impl="emulated")
        assert asked == ([70, 80, 90] if lengths_count else [70])

    def test_what_the_adapter_has_to_say_of_a_call_is_explained(
        self, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake_hub.library = standin("flash_attn3")
        monkeypatch.setenv("ATTNPLUG_HUB", "kernels-community/flash-attn3@2")
        register(Hub(), specs.FLASH_ATTN3)
        tensors = [torch.randn(1, 2, 9, 64).half() for _ in range(3)]
        options = {"seqused_k": torch.tensor([5], dtype=torch.int32), "impl": "emulated"}
        (candidate,) = (each for each in attnplug.explain(*tensors, **options).candidates if each.name == "emulated")
        assert candidate.accepted and candidate.notes[0].startswith("copies value")
