"""What a terminal or a notebook shows of attnplug's objects is meant to be read there.

All tables are laid out by one private function, which one test asks for widths that no object would have.
"""

from __future__ import annotations

import html
import re

import pytest
import torch

import attnplug
from attnplug import Capabilities, ImplSpec, SDPAParams, SDPBackend, bench
from attnplug._tables import table
from attnplug.testing import check_impl
from attnplug.tuning import choices_from


@pytest.fixture
def query():
    return torch.randn(2, 8, 16, 64)


@pytest.fixture
def odd():
    """An implementation whose reason holds what HTML and terminals would take for their own."""
    spec = ImplSpec(name="odd", kernel=print, backend=None, capabilities=Capabilities(), requires=("<b>&[red]",))
    attnplug.register_impl(spec)
    yield
    attnplug.unregister_impl("odd")


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


def test_explanations_records_and_reports_fit_into_80_columns(query):
    explanation = attnplug.explain(query, query, query, softcap=30.0)
    report = check_impl("torch", device="cpu", dtype="float32", checks=["check_scale", "check_values"])
    for shown in (explanation, attnplug.list_impls(), report):
        assert widest(repr(shown)) <= 80, shown
    assert repr(explanation) == str(explanation) and repr(report) == str(report)
    assert repr(report).startswith("torch on cpu, quick: PASSED; 2 passed")


def test_what_was_recorded_is_a_table_and_still_a_list(query):
    with attnplug.record() as calls:
        attnplug.scaled_dot_product_attention(query, query, query)
        attnplug.scaled_dot_product_attention(query, query, query, softcap=30.0, impl="math_ref")
    assert calls == list(calls) and isinstance(calls, list)
    assert [line.split()[0] for line in repr(calls).splitlines()[1:]] == ["torch", "math_ref"]
    assert repr(calls[1]) == "RecordedCall(impl='math_ref', backend=MATH, device='cpu')"
    many = type(calls)(calls * 30)
    assert repr(many).endswith("... and 10 calls more") and "10 calls more" in many._repr_html_()


def test_a_recording_of_nothing_says_what_may_be_missing():
    with attnplug.record() as calls:
        torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 2, 4, 8))
    for shown in (repr(calls), calls._repr_html_()):
        assert "no call was seen" in shown and "patch_torch()" in shown


def test_completion_offers_public_names_alone():
    import attnplug.testing  # which is one of them from now on

    assert set(dir(attnplug)) - set(attnplug.__all__) <= {
        "bench",
        "builtin",
        "cli",
        "integrations",
        "testing",
        "tuning",
    }
    assert {"testing", *attnplug.__all__} <= set(dir(attnplug))


def test_measured_choices_captures_and_reports_are_tables(query):
    with attnplug.capture() as cases:
        attnplug.scaled_dot_product_attention(query, query, query)
    report = bench.run(cases, ["torch"], seconds=0.001, tiny=True)
    choices = choices_from(bench.run(cases, ["torch", "aten_math"], seconds=0.001))
    for shown, word in ((cases, "case"), (report, "torch"), (choices, "is now")):
        assert repr(shown) == str(shown) and word in repr(shown)
        assert word in shown._repr_html_() and "<table>" in shown._repr_html_()
    for shown in (attnplug.verify(0.0, "torch"), attnplug.summary()):
        assert repr(shown) == str(shown)


def test_a_list_of_records_is_a_table_and_still_a_list():
    records = attnplug.list_impls()
    assert records == list(records) and isinstance(records, list)
    rows = [line.split()[0] for line in repr(records).splitlines()[1:] if not line.startswith(" ")]
    assert rows == [record.name for record in records]


def test_html_holds_the_same_words_and_escapes_them(query, odd):
    for shown in (
        attnplug.explain(query, query, query),
        attnplug.list_impls(),
        SDPAParams(query, query, query, softcap=3.0),
        check_impl("torch", device="cpu", dtype="float32", checks=["check_scale"]),
    ):
        page = shown._repr_html_()
        assert "<b>" not in page and page.count("<table>") == page.count("</table>") == 1
        text = html.unescape(re.sub(r"<[^>]+>", " ", page))
        words = set(re.findall(r"\w{3,}", repr(shown))) - {"SDPAParams"}
        assert words <= set(re.findall(r"\w{3,}", text)), shown


def test_params_show_what_a_call_has_and_no_numbers(query):
    sinks = torch.zeros(8, requires_grad=True)
    assert repr(SDPAParams(query, query, query, None, 0.0, True, window_size=(64, 0), sinks=sinks)) == (
        "SDPAParams(\n"
        "  query=float32[2, 8, 16, 64],\n"
        "  key=float32[2, 8, 16, 64],\n"
        "  value=float32[2, 8, 16, 64],\n"
        "  is_causal=True,\n"
        "  window_size=(64, 0),\n"
        "  sinks=float32[8] requires_grad,\n"
        ")"
    )
    short = torch.zeros(1, 1, 2, 4, device="meta", dtype=torch.float16)
    assert repr(SDPAParams(short, None, None)) == "SDPAParams(query=float16[1, 1, 2, 4] meta, key=None, value=None)"


def test_scopes_and_handles_say_what_they_hold():
    scope = attnplug.sdpa_kernel([SDPBackend.MATH, "torch"], set_priority=True)
    assert repr(scope) == "sdpa_kernel([MATH, 'torch'], set_priority=True)"
    binding = attnplug.bind(torch.nn.Linear(2, 2), "aten_math")
    assert repr(binding) == "<BindingHandle: removed>"  # its module is gone
    module = torch.nn.Linear(2, 2)
    binding = attnplug.bind(module, "aten_math")
    assert repr(binding) == "<BindingHandle: Linear in sdpa_kernel(['aten_math'])>"
    binding.remove()
    assert repr(binding) == "<BindingHandle: removed>"
    with attnplug.patch_torch() as patch:
        assert repr(patch) == "<PatchHandle: in place>"
    assert repr(patch) == "<PatchHandle: removed>"


@pytest.mark.parametrize("width", [20, 33, 47, 60, 80, 120, None])
def test_a_table_of_any_width_holds_every_word_whole(width):
    headers = ("name", "family", "status", "reason")
    rows = [
        ("one", "FLASH_ATTENTION", "available", ""),
        ("another", "-", "broken", "OSError: no such file (in /a/path/that/is/longer/than/some/terminals.py, line 3)"),
        (
            "third",
            "MATH",
            "unavailable",
            "needs flash_attn_interface, not installed (pip install fa3-fwd; or build it)",
        ),
    ]
    text = table(headers, rows, width, ("family",))
    words = text.replace(":", " ").split()
    for row in rows:
        for cell in (row[0], *row[2:]):
            assert [word for word in cell.replace(":", " ").split() if word not in words] == []
    if width is not None:
        assert all(len(line) <= width or len(line.split()) == 1 for line in text.splitlines())


def test_a_compiled_function_sees_the_nearest_miss_as_eager_code_does(query):
    def ask(query):
        return attnplug.explain(query, query, query, softcap=30.0, impl="aten_flash")

    eager, compiled = ask(query), torch.compile(ask, fullgraph=True, backend="eager")(query)
    assert (eager.nearest, eager.remedy) == (compiled.nearest, compiled.remedy)
    assert eager.remedy == "impl='math_ref'"
