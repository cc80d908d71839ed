"""`use_choices`: what was measured decides where nothing stronger does, and says so where it does not."""

from __future__ import annotations

import json
import warnings
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import attnplug
from attnplug import ChoicesError, ChoicesWarning, FallbackWarning, ImplSpec, SDPBackend
from attnplug.bench import Case
from measured import fastest, in_use

CASE = Case(heads=2, queries=1, keys=16, head_size=8)
query = torch.randn(1, 2, 1, 8)


def keys(length: int) -> torch.Tensor:
    return torch.randn(1, 2, length, 8)


def ran(call=None, length: int = 16, **options) -> str:
    """Return what ran for a call of PyTorch's function, if no other is given."""
    with attnplug.record() as calls:
        (call or F.scaled_dot_product_attention)(query, keys(length), keys(length), **options)
    return calls[0].impl


def test_a_measured_call_runs_what_was_the_fastest_in_pytorchs_function_too():
    with in_use(fastest((CASE, "aten_math"))):
        assert ran() == ran(attnplug.scaled_dot_product_attention) == "aten_math"
        assert ran(length=9) == "aten_math"  # of the same kind
    assert ran(attnplug.scaled_dot_product_attention) == "torch"


def test_without_a_recording_the_same_runs():
    """The quick route, which a recording leaves, must decide the same: a kernel of the test's own counts."""
    ran_with = []

    def forward(params):
        ran_with.append(tuple(params.key.shape))
        return torch.softmax(params.scale * params.query @ params.key.mT, -1) @ params.value, None

    attnplug.register_impl(ImplSpec(name="mine", kernel=forward, backend=None))
    with in_use(fastest((CASE, "mine"), (CASE.but(keys=32), "torch"))):
        for length in (16, 12, 17, 33, 16):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ChoicesWarning)
                attnplug.scaled_dot_product_attention(query, keys(length), keys(length))
    assert ran_with == [(1, 2, length, 8) for length in (16, 12, 16)]


def test_a_choice_that_declines_some_lengths_is_asked_about_each():
    """Lengths of one kind, without a recording: 15 falls to PyTorch's function, and must not take 16 along."""
    ran_with = []

    class Even:
        shape_dependent = True

        @staticmethod
        def supports(params):
            return "an odd number of keys" if params.key.shape[2] % 2 else None

        @staticmethod
        def forward(params):
            ran_with.append(params.key.shape[2])
            return torch.softmax(params.scale * params.query @ params.key.mT, -1) @ params.value, None

    attnplug.register_impl(ImplSpec(name="even", kernel=Even, backend=None))
    with in_use(fastest((CASE, "even"))), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        for length in (15, 15, 16, 15, 16, 14):
            attnplug.scaled_dot_product_attention(query, keys(length), keys(length))
    assert ran_with == [16, 16, 14]


@pytest.mark.parametrize("wanted", [False, True])
def test_a_choice_that_depends_on_the_deterministic_mode_is_asked_in_each(wanted):
    ran_in = []

    class Picky:
        @staticmethod
        def supports(params):
            return "" if torch.are_deterministic_algorithms_enabled() is wanted else "not in this mode"

        @staticmethod
        def forward(params):
            ran_in.append(torch.are_deterministic_algorithms_enabled())
            return torch.softmax(params.scale * params.query @ params.key.mT, -1) @ params.value, None

    attnplug.register_impl(ImplSpec(name="picky", kernel=Picky, backend=None))
    try:
        with in_use(fastest((CASE, "picky"))), warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            for mode in (not wanted, wanted, not wanted, wanted):
                torch.use_deterministic_algorithms(mode)
                attnplug.scaled_dot_product_attention(query, keys(16), keys(16))
    finally:
        torch.use_deterministic_algorithms(False)
    assert ran_in == [wanted, wanted]


BIG = Case(batch=2, heads=4, queries=64, keys=64, head_size=32)
QKV = tuple(torch.randn(3, 2, 4, 64, 32))
CAUSAL = {"is_causal": True}
NARROW = QKV[2][..., :16].contiguous()


@pytest.mark.parametrize(
    ("case", "impl", "measured", "other"),
    [
        (BIG.but(causal=True), "aten_math", (QKV, CAUSAL), ((QKV[0], *(each[:, :, :60] for each in QKV[1:])), CAUSAL)),
        (BIG, "aten_math", (QKV, {}), ((QKV[0].clone().requires_grad_(), *QKV[1:]), {})),
        (BIG.but(value_head_size=16), "math_ref", ((*QKV[:2], NARROW), {}), (QKV, {})),
    ],
    ids=["unequal lengths", "gradients", "values of another size"],
)  # fmt: skip
def test_kinds_are_told_apart_without_a_recording_too(case, impl, measured, other):
    """What ran is told by its bits: each of these has another order of summation than PyTorch's function."""
    attend = attnplug.scaled_dot_product_attention
    with in_use(fastest((case, impl))), warnings.catch_warnings():
        warnings.simplefilter("ignore", ChoicesWarning)
        for (given, options), name in ((other, "torch"), (measured, impl)) * 2:
            assert torch.equal(attend(*given, **options), attend(*given, **options, impl=name))


def test_autocast_is_decided_by_the_dtype_that_kernels_get_without_a_recording_too():
    attend = attnplug.scaled_dot_product_attention
    with in_use(fastest((BIG.but(dtype="bfloat16"), "aten_math"))), warnings.catch_warnings():
        warnings.simplefilter("ignore", ChoicesWarning)
        for around, impl in ((nullcontext(), "torch"), (torch.autocast("cpu", torch.bfloat16), "aten_math")) * 2:
            with around:
                assert torch.equal(attend(*QKV), attend(*QKV, impl=impl))


def test_of_several_tables_that_hold_here_what_was_measured_last_counts():
    def measured(impl, day, **versions):
        (table,) = fastest((CASE, impl)).tables
        choices = tuple(replace(one, created=day) for one in table.choices)
        return replace(table, versions={**table.versions, **versions}, choices=choices)

    older, newer = measured("aten_math", "2026-01-01"), measured("aten_flash", "2026-01-02", **{"gone-kernels": "1.0"})
    for tables in ((older, newer), (newer, older)):
        with in_use(attnplug.Choices(tables)):
            assert ran() == "aten_flash"


def test_who_decides_is_stronger_in_the_order_of_the_documentation(monkeypatch):
    attention = attnplug.scaled_dot_product_attention
    with in_use(fastest((CASE, "aten_math"))):
        assert ran(attention, impl="aten_flash") == "aten_flash"
        with attnplug.sdpa_kernel(["aten_flash", "aten_math"], set_priority=True):
            assert ran(attention) == "aten_flash"
        with attnplug.sdpa_kernel(["torch", "aten_flash", "aten_math"]):
            assert ran(attention) == "aten_math"  # among what the scope allows
        with attnplug.sdpa_kernel(["torch", "aten_flash"]):
            assert ran(attention) == "torch"
        attnplug.activate_flash_attention_impl("aten_flash")
        assert ran(attention) == "aten_flash"
        attnplug.restore_flash_attention_impl()
        assert ran(attention) == "aten_math"


def test_the_families_that_pytorchs_own_scope_enables_bound_the_choice():
    with in_use(fastest((CASE, "aten_math"))):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            assert ran() == "aten_math"
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            assert ran() == "torch"


def test_a_call_of_another_kind_runs_in_the_default_order_with_the_reason_and_one_warning():
    with in_use(fastest((CASE, "aten_math"))):
        with pytest.warns(ChoicesWarning) as warned:
            assert [ran(length=length) for length in (17, 33, 8, 17)] == ["torch"] * 4
        explained = attnplug.explain(query, keys(17), keys(17))
    assert explained.chosen == "torch"
    assert explained.measured.startswith(
        "no measured choice: calls of this kind were not measured (float32 D8, B·H ≤2, S ≤1x32)"
    )
    assert explained.measured in " ".join(str(explained).split())
    (warning,) = (each for each in warned if each.category is ChoicesWarning)
    assert "given once" in str(warning.message) and warning.filename == __file__


def test_kinds_differ_by_all_that_a_kernel_may_be_fast_or_slow_for():
    more = {
        "dtype": dict(query=query.double(), key=keys(16).double(), value=keys(16).double()),
        "gradients": dict(query=query.clone().requires_grad_()),
        "causal": dict(is_causal=True),
        "mask": dict(attn_mask=torch.ones(1, 16, dtype=torch.bool)),
        "head size": dict(query=query[..., :4], key=keys(16)[..., :4]),
        "batch": {name: torch.randn(2, 2, length, 8) for name, length in (("query", 1), ("key", 16), ("value", 16))},
        "dropout": dict(dropout_p=0.1),
        "grouping": dict(query=query.repeat(1, 1, 1, 1), key=keys(16)[:, :1], value=keys(16)[:, :1], enable_gqa=True),
    }  # fmt: skip
    with in_use(fastest((CASE, "aten_math"))), warnings.catch_warnings():
        warnings.simplefilter("ignore", ChoicesWarning)
        plain = dict(query=query, key=keys(16), value=keys(16))
        assert attnplug.explain(**plain).chosen == "aten_math"
        assert attnplug.explain(**plain | {"scale": 3.0}).chosen == "aten_math"  # of which no time depends
        for what, changed in more.items():
            assert attnplug.explain(**plain | changed).chosen != "aten_math", what


def test_mistakes_in_arguments_have_the_same_words_while_choices_are_in_use():
    with in_use(fastest((CASE, "aten_math"))):
        attnplug.scaled_dot_product_attention(query, keys(16), keys(16))
        for wrong in (keys(15), keys(16).double(), keys(16)[..., :4], torch.randn(1, 3, 16, 8)):
            with pytest.raises((ValueError, TypeError), match="key|value"):
                attnplug.scaled_dot_product_attention(query, wrong, keys(16))
    with in_use(fastest((CASE, "aten_flash"))), torch.no_grad():
        for _ in range(3):  # then a call like this one is answered at once
            attnplug.scaled_dot_product_attention(query, keys(16), keys(16))
        with pytest.raises(TypeError, match="value: expected a torch.Tensor, got ndarray"):
            attnplug.scaled_dot_product_attention(query, keys(16), keys(16).numpy())


def test_autocast_is_decided_by_the_dtype_that_kernels_get():
    with in_use(fastest((CASE.but(dtype="bfloat16"), "aten_math"))), torch.autocast("cpu", torch.bfloat16):
        assert ran() == "aten_math"


def test_a_choice_that_declines_is_passed_over_and_said():
    class Picky:
        shape_dependent = True

        @staticmethod
        def supports(params):
            return "takes 16 keys alone" if params.key.shape[2] != 16 else None

        @staticmethod
        def forward(params):
            return torch.softmax(params.scale * params.query @ params.key.mT, -1) @ params.value, None

    attnplug.register_impl(ImplSpec(name="picky", kernel=Picky, backend=None))
    with in_use(fastest((CASE, "picky"))):
        assert ran() == "picky"
        with pytest.warns(FallbackWarning, match="'picky' is preferred but takes 16 keys alone; 'torch' runs instead"):
            assert ran(length=15) == "torch"
        with attnplug.record() as calls:
            attnplug.scaled_dot_product_attention(query, keys(15), keys(15))
    assert calls[0].passed_over == {"picky": ("takes 16 keys alone",)}


@pytest.mark.parametrize("packed", [False, True])
def test_a_decode_loop_decides_once_for_each_choice_and_never_stalls_at_a_power_of_two(packed):
    asked = []

    class Counting:
        composite = True

        @staticmethod
        def supports(params):
            asked.append(params.max_k if packed else params.key.shape[2])

        @staticmethod
        def forward(params):
            return params.query * 0, None

    capabilities = attnplug.Capabilities(features=frozenset({attnplug.Feature.VARLEN}))
    attnplug.register_impl(ImplSpec(name="counting", kernel=Counting, backend=None, capabilities=capabilities))
    starts = torch.tensor([0, 1], dtype=torch.int32)

    def step(length):
        if packed:
            given = torch.randn(1, 2, 8), torch.randn(length, 2, 8), torch.randn(length, 2, 8)
            return attnplug.varlen_attn(*given, starts, starts * length, 1, length)
        return attnplug.scaled_dot_product_attention(query, keys(length), keys(length))

    case = Case(heads=2, head_size=8, lengths_q=(1,)) if packed else CASE
    sizes = {8: "counting", 16: "counting", 32: "math_ref", 64: "math_ref", 128: "counting"}
    measured = [
        (case.but(keys=size) if not packed else case.but(lengths_q=(1,), lengths_k=(size,)), impl)
        for size, impl in sizes.items()
    ]
    with in_use(fastest(*measured)), attnplug.record() as calls:
        for length in range(5, 129):
            step(length)
    assert [call.impl for call in calls] == ["counting"] * 12 + ["math_ref"] * 48 + ["counting"] * 64
    assert asked == [5]  # coming back to a choice finds its decision


def test_a_choice_that_is_not_registered_any_more_is_no_choice_and_said():
    attnplug.register_impl(ImplSpec(name="mine", kernel=lambda params: None, backend=None))
    choices = fastest((CASE, "mine"))
    attnplug.unregister_impl("mine")
    with in_use(choices), pytest.warns(ChoicesWarning, match="'mine' was the fastest, and is not registered here"):
        assert ran() == "torch"


def test_a_change_of_the_registry_is_seen_by_calls_that_were_decided_before():
    def forward(params):
        return torch.zeros_like(params.query), None

    choices = fastest((CASE, "aten_math"), (CASE.but(keys=32), "torch"))
    with in_use(choices):
        assert ran() == "aten_math"
        attnplug.register_impl(ImplSpec(name="mine", kernel=forward, backend=SDPBackend.MATH))
        assert ran() == "aten_math"
        attnplug.use_choices(fastest((CASE, "mine")))
        assert ran() == "mine"


def test_what_was_in_use_before_is_no_longer_and_restoring_ends_all():
    attnplug.use_choices(fastest((CASE, "aten_math")))
    attnplug.use_choices(fastest((CASE, "aten_flash")))
    assert ran() == "aten_flash"
    attnplug.restore_choices()
    assert ran(attnplug.scaled_dot_product_attention) == "torch"
    with pytest.warns(UserWarning, match="no choices are in use"):
        attnplug.restore_choices()


def test_what_is_wrong_with_choices_changes_nothing(tmp_path):
    with in_use(fastest((CASE, "aten_math"))):
        with pytest.raises(ChoicesError, match="there is no such file"):
            attnplug.use_choices(tmp_path / "none.json")
        with pytest.raises(TypeError, match="expected Choices, the path of a file or 'auto', got int"):
            attnplug.use_choices(3)
        assert ran() == "aten_math"


def changed(choices: attnplug.Choices, path, **fields) -> str:
    """Save choices whose first table has other fields."""
    choices.save(path)
    given = json.loads(path.read_text())
    for name, value in fields.items():
        given["tables"][0][name] = {**given["tables"][0][name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(given))
    return str(path)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"device": "Abacus 3000"}, r"were measured on Abacus 3000 \(.*\), and this is "),
        ({"capability": "none"}, r"were measured on .* \(none\), and this is "),
        ({"versions": {"torch": "1.0"}}, r"were measured with torch 1.0, here is .*; measure again: attnplug tune"),
        ({"versions": {"triton": None, "cudnn": "9"}}, r"measured with cudnn 9, here is (none|\d{5})"),
        ({"versions": {"attnplug": "9.9"}}, r"measured with attnplug 9.9, here is "),
    ],
)
def test_choices_of_another_machine_or_version_do_not_hold_and_the_reason_is_said_once(tmp_path, fields, reason):
    path = changed(fastest((CASE, "aten_math")), tmp_path / "choices.json", **fields)
    if "triton" in str(fields):
        pytest.importorskip("triton")
    with in_use(path):
        with pytest.warns(ChoicesWarning, match=reason) as warned:
            assert ran() == ran() == ran(length=99) == "torch"
        assert path in attnplug.explain(query, keys(16), keys(16)).measured
    assert [each.category for each in warned].count(ChoicesWarning) == 1


def test_a_distribution_that_is_no_longer_installed_does_not_void_what_others_won(tmp_path):
    path = changed(fastest((CASE, "aten_math")), tmp_path / "choices.json", versions={"gone-kernels": "1.0"})
    with in_use(path):
        assert ran() == "aten_math"
