"""Installing a package takes no call away from what ran before: `torch`, attnplug's own, then everybody else's.

Each case runs in a new interpreter that finds fake installed distributions. What errors know of plugins that are not
installed is a private catalogue, which is held against the plugins themselves.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from packages import KERNEL, Site, plugin, spec

HIGHEST = {"priority": "10**9"}

SCRIPT = """
def ran(**kwargs):
    with attnplug.record() as calls:
        assert works(**kwargs)
    return calls[0].impl

report["order"] = [r.name for r in attnplug.list_impls() if r.status == "available"]
"""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A folder with an implementation of attnplug's own, of priority -100, and two of somebody else's, of 10**9."""
    site = Site(tmp_path / "site")
    site.install("attnplug-flash-triton", {"ours": plugin(spec("ours", priority="-100")), "ours_kernel": KERNEL})
    site.install("zz-fast", {"fast": plugin(spec("chunked", **HIGHEST)), "chunked_kernel": KERNEL})
    site.install("aa-fast", {"also": plugin(spec("zoomed", **HIGHEST)), "zoomed_kernel": KERNEL})
    return site


def test_no_priority_takes_a_call_from_torch_or_from_attnplug_s_own(site: Site) -> None:
    report = site.run(
        SCRIPT
        + """
report["ran"] = [ran(), ran(softcap=2.0), ran(impl="chunked")]
with attnplug.sdpa_kernel(attnplug.SDPBackend.MATH):
    report["family"] = [ran(), ran(softcap=2.0)]
with attnplug.sdpa_kernel(["chunked", "ours"]):
    report["scope"] = ran(softcap=2.0)
with attnplug.sdpa_kernel(["chunked", "ours"], set_priority=True):
    report["ordered_scope"] = ran(softcap=2.0)
attnplug.activate_flash_attention_impl("zoomed")
report["active"] = ran(softcap=2.0)
"""
    )
    assert report.ran == ["torch", "ours", "chunked"]
    assert report.family == ["aten_math", "ours"] and report.scope == "ours"
    assert report.ordered_scope == "chunked" and report.active == "zoomed"


def test_equal_priorities_go_by_distribution_and_then_by_name(site: Site) -> None:
    site.install("bb-two", {"two": plugin(spec("b_impl", **HIGHEST), spec("a_impl", **HIGHEST))})
    order = site.run(SCRIPT).order
    assert order[0] == "torch" and set(order[1:3]) == {"aten_flash", "aten_math"}
    assert order[3:] == ["ours", "zoomed", "a_impl", "b_impl", "chunked"]


def test_somebody_else_s_kernel_runs_by_itself_where_all_of_ours_decline(site: Site) -> None:
    report = site.run(SCRIPT + "report['ran'] = ran(softcap=2.0)", ATTNPLUG_LOAD="fast,also", ATTNPLUG_DISABLE="")
    assert report.ran == "zoomed"


def test_what_a_program_registers_stands_behind_attnplug_s_own_too(site: Site) -> None:
    report = site.run(
        SCRIPT
        + """
import chunked_kernel
attnplug.register_impl(attnplug.ImplSpec(
    name="of_the_program", kernel="chunked_kernel", backend=attnplug.SDPBackend.MATH,
    capabilities=attnplug.Capabilities(features=attnplug.Feature), priority=10**12))
report["ran"] = [ran(softcap=2.0)]
with attnplug.sdpa_kernel(["of_the_program", "chunked"]):
    report["ran"].append(ran(softcap=2.0))
"""
    )
    assert report.ran == ["ours", "of_the_program"]


def test_the_environment_beats_the_order_and_yields_to_scopes(site: Site) -> None:
    report = site.run(
        SCRIPT
        + """
report["ran"] = [ran(), ran(softcap=2.0)]
with attnplug.sdpa_kernel("ours"):
    report["ran"].append(ran())
""",
        ATTNPLUG_IMPL="chunked,ours",
    )
    assert report.ran == ["chunked", "chunked", "ours"]


# What is not installed ---------------------------------------------------------------------------------

WITHOUT_PLUGINS = "import importlib_metadata\nimportlib_metadata.entry_points = lambda **_: ()\n"


def test_a_known_name_that_is_not_installed_says_what_installs_it(tmp_path: Path) -> None:
    extras = {"math_ref": "math", "flash_triton": "triton", "efficient_cuda": "cuda", "cudnn": "cuda"}
    extras |= dict.fromkeys(("flash_attn2", "xformers", "flex"), "adapters")
    script = f"""{WITHOUT_PLUGINS}
report["said"] = {{
    name: [failure(call, name)["message"] for call in (attnplug.sdpa_kernel, attnplug.activate_flash_attention_impl)]
    for name in {list(extras)}
}}
report["near"] = failure(attnplug.sdpa_kernel, "flash_tritn")["message"]
"""
    report = Site(tmp_path).run(script, ATTNPLUG_DISABLE="")
    for name, extra in extras.items():
        for message in report.said[name]:
            assert f"implementation {name!r} is not installed: pip install 'attnplug[{extra}]'" in message
    assert "did you mean 'flash_triton', which is not installed: pip install 'attnplug[triton]'?" in report.near


def test_a_call_that_nothing_installed_supports_says_what_would_bring_an_implementation(tmp_path: Path) -> None:
    report = Site(tmp_path).run(
        f"""{WITHOUT_PLUGINS}
report["any"] = failure(sdpa, softcap=2.0)["message"]
report["impl"] = failure(sdpa, softcap=2.0, impl="aten_math")["message"]
with attnplug.sdpa_kernel(attnplug.SDPBackend.FLASH_ATTENTION):
    report["family"] = failure(sdpa, softcap=2.0)["message"]
with attnplug.sdpa_kernel(attnplug.SDPBackend.MATH):
    report["math"] = failure(sdpa, softcap=2.0)["message"]
""",
        ATTNPLUG_DISABLE="",
    )
    way_out = "'math_ref', which takes such calls, is not installed: pip install 'attnplug[math]'"
    assert report.any.endswith(way_out) and report.math.endswith(way_out)
    assert "which takes such calls" not in report.impl + report.family  # what is allowed would not take it either


def test_a_call_that_a_disabled_plugin_would_take_says_so(tmp_path: Path) -> None:
    report = Site(tmp_path).run(
        """
report["said"] = failure(sdpa, softcap=2.0)["message"]
attnplug.register_impl(attnplug.ImplSpec(name="math_ref", kernel=print, backend=None))
report["of_another"] = failure(sdpa, softcap=2.0)["message"]
"""
    )
    assert "'math_ref', which takes such calls, is disabled by ATTNPLUG_DISABLE" in report.said
    assert "which takes such calls" not in report.of_another  # the name is another's now, which says why it does not


def test_the_catalogue_of_known_names_says_what_the_plugins_say() -> None:
    import attnplug
    from attnplug._registry.catalogue import KNOWN

    records = {record.name: record for record in attnplug.list_impls()}
    for name, known in KNOWN.items():
        if known.spec is None:
            continue
        says, plugin = known.spec.capabilities, records[name].capabilities
        assert known.spec.backend == records[name].backend
        for part in plugin.alternatives:  # of which one may be stronger than what an error promises
            assert part.devices == says.devices or name == "flash_triton"
        assert says.features <= plugin.features and (says.dtypes or set()) <= (plugin.dtypes or set())
        assert name == "cudnn" or says.features == plugin.features, name
