"""`attnplug show` tells all that is known of one implementation, or of one plugin, without importing it."""

from __future__ import annotations

import attnplug


def test_it_tells_origin_versions_support_and_documentation(cli):
    text = cli("show", "math_ref").out
    facts = dict(line.strip().split(None, 1) for line in text.splitlines()[1:] if not line.startswith("   "))
    assert facts["family"] == "MATH" and facts["priority"] == "-100"
    assert facts["distribution"].startswith("attnplug-math-ref ")
    assert "entry point   math_ref = attnplug_math_ref\n" in text
    assert facts["kernel"] == "attnplug_math_ref.impl"
    assert f"attnplug {attnplug.__version__}" in facts["versions"]
    assert facts["documentation"] == "attnplug show math_ref --readme"
    assert "supports on   any device" in text and "SOFTCAP" in text


def test_json_tells_what_text_tells(cli):
    (shown,) = cli("show", "math_ref", "--json").data["implementations"]
    assert shown["entry_point"] == "math_ref" and shown["module"] == "attnplug_math_ref"
    assert shown["versions"]["attnplug"] == attnplug.__version__
    assert any(requirement.startswith("attnplug") for requirement in shown["requires"])


def test_an_entry_point_stands_for_all_that_it_brings(cli):
    shown = cli("show", "adapters", "--json").data["implementations"]
    assert {"flex", "hub", "xformers"} <= {each["name"] for each in shown}


def test_the_kernel_that_the_environment_asks_of_the_hub_says_what_is_supported(shell):
    done = shell("show", "hub", ATTNPLUG_HUB="kernels-community/flash-attn2@1")
    assert done.status == 0 and "ALIBI" in done.out


def test_readme_prints_the_description_of_the_distribution(cli):
    done = cli("show", "math_ref", "--readme")
    assert done.status == 0 and done.out.startswith("# attnplug-math-ref")


def test_what_a_program_registers_has_no_description(cli, register):
    register(name="mine")
    assert "this program" in cli("show", "mine").out
    done = cli("show", "mine", "--readme")
    assert (done.status, done.out) == (1, "") and "no description" in done.err


def test_neither_torch_nor_a_kernel_is_imported(shell):
    done = shell("show", "math_ref", options=("-X", "importtime"))
    modules = {line.rpartition("|")[2].strip() for line in done.err.splitlines()}
    assert done.status == 0 and "attnplug.cli.describe" in modules
    assert "torch" not in modules  # which the kernel imports


def test_a_name_that_is_not_there_is_told_the_closest(cli):
    done = cli("show", "math_rf")
    assert (done.status, done.out) == (2, "") and "did you mean 'math_ref'?" in done.err
