"""Who decides, and what is said about it: precedence, scopes, threads, explain, record."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention as torch_attention

import attnplug
from attending import Q, formula, ran, register
from attnplug import Capabilities, Feature, ImplSpec, SDPAParams, SDPBackend


def test_installing_changes_nothing_by_itself() -> None:
    register("eager_beaver", priority=10**9)
    assert ran() == "torch"
    assert ran(impl="eager_beaver") == "eager_beaver"


def test_what_torch_cannot_do_goes_to_the_next_that_can() -> None:
    register("capped", priority=7, capabilities=Capabilities(features={Feature.SOFTCAP}))
    register("capped_too", priority=8, capabilities=Capabilities(features={Feature.SOFTCAP}))
    assert ran(softcap=5.0) == "math_ref"  # attnplug's own, whatever the others claim
    with attnplug.sdpa_kernel(["capped", "capped_too"]):
        assert ran(softcap=5.0) == "capped_too"


def test_replacing_takes_the_place_of_what_a_program_registered_and_of_nothing_else() -> None:
    def spec(name: str, value: float) -> ImplSpec:
        def forward(params: SDPAParams) -> tuple[torch.Tensor, None]:
            return torch.full_like(params.query, value), None

        return ImplSpec(name=name, kernel=forward, backend=SDPBackend.MATH)

    query = torch.ones(1, 1, 2, 8)
    for value in (1.0, 2.0, 3.0):  # as a notebook's cell does
        attnplug.register_impl(spec("cell", value), replace=True)
        assert (attnplug.scaled_dot_product_attention(query, query, query, impl="cell") == value).all()
    assert attnplug.list_flash_attention_impls().count("cell") == 1
    with pytest.raises(attnplug.DuplicateImplementationError, match="provided by attnplug-math-ref"):
        attnplug.register_impl(spec("math_ref", 1.0), replace=True)
    attnplug.activate_flash_attention_impl("cell")
    with pytest.raises(ValueError, match="'cell' is active"):
        attnplug.register_impl(spec("cell", 4.0), replace=True)
    with pytest.raises(TypeError, match="replace: expected a bool, got 1"):
        attnplug.register_impl(spec("other", 1.0), replace=1)


def test_impl_beats_scope_beats_activation() -> None:
    register("active")
    attnplug.activate_flash_attention_impl("active")
    assert ran() == "active"
    with attnplug.sdpa_kernel("aten_math"):
        assert ran() == "aten_math"
        assert ran(impl="aten_flash") == "aten_flash"
    attnplug.restore_flash_attention_impl()
    assert ran() == "torch"


@pytest.mark.parametrize("enum", [SDPBackend, torch_attention.SDPBackend])
def test_a_family_stands_for_its_implementations_and_leaves_torch_out(enum: Any) -> None:
    with attnplug.sdpa_kernel(enum.MATH):
        assert ran() == "aten_math"
    with attnplug.sdpa_kernel([enum.MATH, enum.FLASH_ATTENTION]):
        assert ran() == "aten_flash"
    with attnplug.sdpa_kernel([enum.MATH, enum.FLASH_ATTENTION], set_priority=True):
        assert ran() == "aten_math"
    with attnplug.sdpa_kernel([enum.MATH, "torch"]):
        assert ran() == "torch"
    with attnplug.sdpa_kernel([enum.MATH, "torch"], set_priority=True):
        assert ran() == "aten_math"


def test_activation_is_preferred_inside_a_scope_that_allows_it() -> None:
    attnplug.activate_flash_attention_impl("aten_math")
    with attnplug.sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        assert ran() == "aten_math"
    with attnplug.sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        assert ran() == "aten_flash"


def test_the_inner_scope_replaces_the_outer_and_leaving_restores_it() -> None:
    with attnplug.sdpa_kernel("aten_math"):
        with pytest.raises(KeyError), attnplug.sdpa_kernel("aten_flash"):
            assert ran() == "aten_flash"
            raise KeyError
        assert ran() == "aten_math"
    assert ran() == "torch"


def test_a_scope_decorates_and_nests_in_itself() -> None:
    @attnplug.sdpa_kernel("aten_math")
    def inner(depth: int) -> list[str]:
        return [ran(), *(inner(depth - 1) if depth else [])]

    assert inner(2) == ["aten_math"] * 3
    assert ran() == "torch"


@pytest.mark.parametrize(
    ("backends", "error", "message"),
    [
        ([], ValueError, "backends: got an empty list"),
        (3, TypeError, "backends: expected one of SDPBackend.MATH.*got 3; or the name"),
        (0, TypeError, "backends: expected one of SDPBackend.MATH.*got 0; or the name"),
        ([0], TypeError, "backends: expected one of SDPBackend.MATH.*got 0; or the name"),
        (["torch", None], TypeError, "backends: expected one of"),
        ([{}], TypeError, "backends: expected one of"),
        (SDPBackend.ERROR, TypeError, "backends: expected one of"),
        ("aten_maths", attnplug.UnknownImplementationError, "did you mean 'aten_math'"),
        ("math", attnplug.UnknownImplementationError, "'math' is a family: sdpa_kernel takes SDPBackend.MATH"),
    ],
)
def test_a_wrong_scope_is_an_error_before_it_is_entered(backends: Any, error: type[Exception], message: str) -> None:
    attnplug.sdpa_kernel(SDPBackend.MATH), attnplug.sdpa_kernel([SDPBackend.MATH])  # which 0 equals, and is not
    with pytest.raises(error, match=message):
        attnplug.sdpa_kernel(backends)


def test_a_set_is_a_scope_unless_its_order_would_count() -> None:
    with attnplug.sdpa_kernel({"aten_math", "aten_flash"}):
        assert ran() == "aten_flash"
    attnplug.sdpa_kernel({"aten_math"}, set_priority=True)
    for unordered in ({"aten_math", "aten_flash"}, frozenset({"aten_math", SDPBackend.FLASH_ATTENTION})):
        with pytest.raises(TypeError, match="backends: a set has no order, .*; pass a list"):
            attnplug.sdpa_kernel(unordered, set_priority=True)


def test_what_a_scope_allows_twice_is_asked_once() -> None:
    asked: list[SDPAParams] = []

    class Declining:
        forward = staticmethod(formula)

        @staticmethod
        def supports(params: SDPAParams) -> str:
            asked.append(params)
            return "declines"

    register("twice", kernel=Declining, backend=SDPBackend.CUDNN_ATTENTION)
    scope = attnplug.sdpa_kernel(["twice", SDPBackend.CUDNN_ATTENTION], set_priority=True)
    with scope, pytest.raises(attnplug.NoImplementationError, match="twice: declines"):
        ran()
    assert len(asked) == 1


def test_a_scope_never_falls_back_outside_itself() -> None:
    with (
        attnplug.sdpa_kernel([SDPBackend.FLASH_ATTENTION, "aten_math"]),
        pytest.raises(attnplug.NoImplementationError) as caught,
    ):
        attnplug.scaled_dot_product_attention(Q, Q, Q, softcap=2.0, window_size=(1, 0), return_lse=True)
    assert {"aten_flash", "aten_math"} <= set(caught.value.reasons)
    assert "torch" not in caught.value.reasons
    assert any("softcap" in reason for reason in caught.value.reasons["aten_math"])
    assert any("window_size" in reason for reason in caught.value.reasons["aten_math"])
    assert any("return_lse" in reason for reason in caught.value.reasons["aten_math"])
    assert "FLASH_ATTENTION, 'aten_math'" in str(caught.value)


def test_a_family_without_implementations_says_so_and_who_knows_more() -> None:
    with (
        attnplug.sdpa_kernel(SDPBackend.OVERRIDEABLE),
        pytest.raises(
            attnplug.NoImplementationError,
            match=r"\(sdpa_kernel\(\[OVERRIDEABLE\]\)\):\n  none that is installed.*attnplug doctor",
        ),
    ):
        attnplug.scaled_dot_product_attention(Q, Q, Q)


def test_scopes_belong_to_their_thread() -> None:
    seen: list[str] = []
    with attnplug.sdpa_kernel("aten_math"):
        thread = threading.Thread(target=lambda: seen.append(ran()))
        thread.start()
        thread.join()
        assert ran() == "aten_math"
    assert seen == ["torch"]


def test_many_threads_with_scopes_of_their_own_do_not_disturb_each_other() -> None:
    wrong: list[tuple[str, str]] = []

    def work(name: str) -> None:
        for _ in range(200):
            with attnplug.sdpa_kernel(name):
                got = ran()
                if got != name:
                    wrong.append((name, got))

    threads = [threading.Thread(target=work, args=(name,)) for name in ("torch", "aten_flash", "aten_math") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_activation_falls_back_and_says_so_once_per_reason() -> None:
    register("plain_only")
    attnplug.activate_flash_attention_impl("plain_only")
    with pytest.warns(attnplug.FallbackWarning, match=r"'plain_only' is preferred but does not support is_causal"):
        assert ran(is_causal=True) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ran(is_causal=True) == "torch"
        assert ran(is_causal=True, scale=0.5) == "torch"
    with pytest.warns(attnplug.FallbackWarning, match="dropout"):
        ran(dropout_p=0.1)


def test_of_reasons_that_hold_ever_new_sizes_not_all_are_remembered() -> None:
    """A server sees new lengths for as long as it runs."""
    kernel = SimpleNamespace(
        forward=formula, shape_dependent=True, supports=lambda params: f"the length is {params.query.shape[2]}"
    )
    register("picky", kernel=kernel)
    attnplug.activate_flash_attention_impl("picky")
    tensors = torch.zeros(1, 1, 2000, 1)

    def warned(lengths: range) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for length in lengths:
                attnplug.scaled_dot_product_attention(*(tensors[:, :, :size] for size in (length, 1, 1)))
        return len(caught)

    assert warned(range(8, 2000)) == 1992
    register("another")  # after which all is decided anew
    assert warned(range(8, 9)) == 1


def test_a_fallback_in_a_layer_of_pytorch_points_at_who_called_the_layer() -> None:
    register("plain_only_in_layers")
    attnplug.activate_flash_attention_impl("plain_only_in_layers")
    layer = torch.nn.MultiheadAttention(8, 2, dropout=0.1)
    with pytest.warns(attnplug.FallbackWarning, match="dropout") as warned:
        layer(Q[0], Q[0], Q[0], need_weights=False)
    assert {each.filename for each in warned} == {__file__}


def test_record_says_what_ran_and_who_was_passed_over() -> None:
    with attnplug.record() as outer:
        attnplug.scaled_dot_product_attention(Q, Q, Q)
        with attnplug.record() as inner:
            attnplug.scaled_dot_product_attention(Q, Q, Q, return_lse=True)
    attnplug.scaled_dot_product_attention(Q, Q, Q)
    assert [call.impl for call in outer] == ["torch", "aten_flash"]
    assert [call.impl for call in inner] == ["aten_flash"]
    assert outer[0].backend == SDPBackend.FLASH_ATTENTION  # what PyTorch itself chose
    assert inner[0].passed_over["torch"] == ("does not support return_lse",)
    assert "aten_flash" not in inner[0].passed_over


def test_what_was_recorded_can_leave_the_process() -> None:
    with attnplug.record() as calls:
        attnplug.scaled_dot_product_attention(Q, Q, Q, return_lse=True)
    assert pickle.loads(pickle.dumps(calls)) == copy.deepcopy(calls) == calls
    assert dataclasses.asdict(calls[0])["passed_over"] == calls[0].passed_over


def test_record_belongs_to_its_thread() -> None:
    with attnplug.record() as calls:
        thread = threading.Thread(target=ran)
        thread.start()
        thread.join()
    assert calls == []


def test_falling_back_to_math_warns_when_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 2, 4, 8)
    with attnplug.sdpa_kernel([SDPBackend.FLASH_ATTENTION, "aten_math"]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attnplug.scaled_dot_product_attention(query, query, query, dropout_p=0.1)
        monkeypatch.setattr(attnplug, "WARN_FOR_UNFUSED_KERNELS", True)
        for _ in range(2):
            with pytest.warns(UserWarning, match="aten_flash: does not support dropout"):
                attnplug.scaled_dot_product_attention(query, query, query, dropout_p=0.1)


def test_a_change_of_the_registry_is_seen_by_the_next_call() -> None:
    with attnplug.sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        register("first", priority=1)
        assert ran() == "first"
        register("second", priority=2)
        assert ran() == "second"
        attnplug.unregister_impl("second")
        assert ran() == "first"


@pytest.mark.parametrize("backends", ["mine", ["mine"]])
def test_a_scope_names_what_is_registered_when_it_is_made(backends: Any) -> None:
    register("mine")
    with attnplug.sdpa_kernel(backends):
        assert ran() == "mine"
    attnplug.unregister_impl("mine")
    with pytest.raises(attnplug.UnknownImplementationError, match="'mine'"):
        attnplug.sdpa_kernel(backends)


def test_names_are_unique_and_what_is_installed_stays() -> None:
    register("twice")
    with pytest.raises(
        attnplug.DuplicateImplementationError,
        match=r"'twice' of this program .* unregister_impl\('twice'\) first, or register with replace=True",
    ):
        register("twice")
    with pytest.raises(attnplug.DuplicateImplementationError, match="provided by attnplug; choose another name"):
        register("torch")
    with pytest.raises(ValueError, match="only implementations added with register_impl"):
        attnplug.unregister_impl("torch")
    with pytest.raises(attnplug.UnknownImplementationError, match="'none_such'"):
        attnplug.unregister_impl("none_such")
    with pytest.raises(TypeError, match="spec: expected an ImplSpec, got str"):
        attnplug.register_impl("torch")


def test_enums_have_pytorch_s_values() -> None:
    from torch.nn.attention.bias import CausalVariant

    for member in SDPBackend:
        assert int(member) == int(getattr(torch_attention.SDPBackend, member.name))
    for variant in attnplug.CausalVariant:
        assert int(variant) == int(CausalVariant[variant.name])


def test_the_first_parameters_are_pytorch_s_in_pytorch_s_order() -> None:
    mask = torch.zeros(4, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(Q, Q, Q, mask, 0.0, False, scale=0.5, enable_gqa=False)
    assert torch.equal(attnplug.scaled_dot_product_attention(Q, Q, Q, mask, 0.0, False, 0.5, False), expected)


def test_errors_survive_pickling() -> None:
    errors: list[attnplug.AttnplugError] = [
        attnplug.UnknownImplementationError("x", ["y", "z"], "impl"),
        attnplug.DuplicateImplementationError("x", "one", "another"),
        attnplug.NoImplementationError({"x": ("a", "b")}, "impl='x'"),
    ]
    for error in errors:
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error)


def test_a_kernel_may_ask_about_calls_while_it_is_imported(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "curious_kernel.py").write_text(
        "import torch, attnplug\n"
        "query = torch.zeros(1, 1, 2, 8)\n"
        "told = attnplug.explain(query, query, query, impl='curious')\n"
        "def forward(params):\n"
        "    return params.value, None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    attnplug.register_impl(ImplSpec(name="curious", kernel="curious_kernel", backend=None))
    assert ran(impl="curious") == "curious"
    import curious_kernel

    assert curious_kernel.told.candidates[-1].name and "is still being imported" in str(curious_kernel.told)


def test_two_threads_that_need_a_kernel_first_both_have_it(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_kernel.py").write_text(
        "import time\ntime.sleep(0.2)\ndef forward(params):\n    return params.value, None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    attnplug.register_impl(ImplSpec(name="slow", kernel="slow_kernel", backend=None))
    both = threading.Barrier(2)

    def call(_: int) -> str:
        both.wait()
        return ran(impl="slow")

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(call, range(2))) == ["slow", "slow"]
