"""A plugin that fails fails alone: it is listed with its exception, and nothing else notices.

Each case runs in a new interpreter that finds fake installed distributions, one of which is healthy.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from packages import HEAD, HOOK, Site, of_plugins, plugin, spec

RAISING_MODULES = {
    "raises": ("raise RuntimeError('no luck today')", "RuntimeError: no luck today"),
    "misses_a_module": ("import a_module_that_nobody_has", "ModuleNotFoundError: .*a_module_that_nobody_has"),
    "misses_a_name": ("from attnplug import hookimpel", "ImportError: cannot import name 'hookimpel'"),
    "no_python": ("def attnplug_register_impls(:", "SyntaxError: invalid syntax"),
    "exits": ("import sys; sys.exit('this plugin knows best')", "SystemExit: this plugin knows best"),
    "misses_a_library": (
        "import ctypes; ctypes.CDLL('libno_such_thing.so.7')",
        "OSError: libno_such_thing.so.7",
    ),
    "recurses": ("def f(): f()\nf()", "RecursionError"),
    "says_nothing": ("raise ValueError", "ValueError"),
    "says_much": ("raise ValueError('the first line\\nthe second line')", "ValueError: the first line"),
}

BAD_HOOKS = {
    "hook_raises": (f"{HEAD}{HOOK}    raise KeyError('gone')", "KeyError: 'gone'"),
    "hook_exits": (f"{HEAD}{HOOK}    raise SystemExit(3)", "SystemExit: 3"),
    "hook_gives_none": (f"{HEAD}{HOOK}    return None", "SpecError: .* returned None; return a list"),
    "hook_gives_text": (f"{HEAD}{HOOK}    return 'flash'", "SpecError: .* list of ImplSpec, got 'flash'"),
    "hook_gives_a_dict": (f"{HEAD}{HOOK}    return [dict(name='x')]", "SpecError: .* list of ImplSpec, got "),
    "hook_gives_some": (
        f"{HEAD}{HOOK}    return [{spec('never_seen')}, 3]",
        "SpecError: .* list of ImplSpec, got ",
    ),
    "hook_wants_more": (
        f"{HEAD}@hookimpl\ndef attnplug_register_impls(device): return []",
        "PluginValidationError: .*device",
    ),
    "no_hook": (HEAD, "SpecError: .* define attnplug_register_impls"),
    "unmarked_hook": ("def attnplug_register_impls(): return []", "SpecError: .* @attnplug.hookimpl"),
    "misspelt_hook": (
        f"{HEAD}@hookimpl\ndef attnplug_register_impl(): return []",
        "SpecError: misspelt_hook: 'attnplug_register_impl' is not a hook .*did you mean 'attnplug_register_impls'",
    ),
}

BAD_SPECS = {
    "bad_name": (
        "ImplSpec(name='a b', kernel='k', backend=None)",
        "SpecError: ImplSpec.name: 'a b' is not a name",
    ),
    "no_name": ("ImplSpec(kernel='k', backend=None)", "TypeError: .*'name'"),
    "bad_backend": (spec("x", backend="'FLASH'"), "SpecError: ImplSpec 'x'.backend: .*; got 'FLASH'"),
    "bad_number": (spec("x", backend="1"), "SpecError: ImplSpec 'x'.backend: .*; got 1"),
    "bad_feature": (
        spec("x", capabilities="Capabilities(features=['windw'])"),
        "SpecError: .*features: 'windw' .*WIND",
    ),
    "bad_dtype": (
        spec("x", capabilities="Capabilities(dtypes=['bfloat'])"),
        "SpecError: .*dtypes: .*mean 'bfloat16'",
    ),
    "bad_devices": (spec("x", capabilities="Capabilities(devices='cuda')"), "SpecError: .*devices: .*'cuda'"),
    "bad_path": (
        spec("x", kernel="pack/age.py"),
        "SpecError: ImplSpec 'x'.kernel: 'pack/age.py' is not a dotted path",
    ),
    "bad_priority": (
        spec("x", priority="'high'"),
        "SpecError: ImplSpec 'x'.priority: expected an int, got 'high'",
    ),
    "unknown_field": (spec("x", speed="3"), "TypeError: .*'speed'"),
}

BROKEN = RAISING_MODULES | BAD_HOOKS | {name: (plugin(source), reason) for name, (source, reason) in BAD_SPECS.items()}

LISTING = "report['records'] = listed(); listed()"
FAILURE = "report['failure'] = failure(attnplug.list_impls)"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A folder that holds one healthy plugin."""
    site = Site(tmp_path / "site")
    site.install_healthy()
    return site


@pytest.mark.parametrize("name", BROKEN)
def test_broken_plugin_is_listed_with_its_exception_and_hides_nothing(site: Site, name: str) -> None:
    source, reason = BROKEN[name]
    site.install("fake-broken", {name: source})
    report = site.run(LISTING)
    record = report.records.pop(name)
    assert record["status"] == "broken" and re.search(reason, record["reason"]), record
    assert (record["distribution"], record["version"]) == ("fake-broken", "1.0")
    assert report.records["healthy"]["status"] == "available"
    assert {"torch", "aten_flash", "aten_math"} < report.records.keys()
    assert [entry for entry in report.records.values() if entry["status"] == "broken"] == []
    (warning,) = of_plugins(report.warnings)
    assert name in warning and "fake-broken" in warning and re.search(reason, warning)


@pytest.mark.parametrize("name", BROKEN)
def test_strict_raises_what_broke_the_plugin(site: Site, name: str) -> None:
    source, reason = BROKEN[name]
    site.install("fake-broken", {name: source})
    report = site.run(FAILURE, ATTNPLUG_STRICT="1")
    assert "PluginError" in report.failure["kinds"] and "AttnplugError" in report.failure["kinds"]
    assert re.search(reason, report.failure["message"]) and "fake-broken" in report.failure["message"]
    assert reason.startswith(report.failure["cause"])
    assert of_plugins(report.warnings) == []


def test_calls_work_whatever_is_broken(site: Site) -> None:
    for name, (source, _) in BROKEN.items():
        site.install(f"fake-{name}", {name: source})
    report = site.run(
        """
        report["plain"] = works()
        report["healthy"] = works(impl="healthy"), works(impl="healthy", softcap=2.0)
        report["wrong_would_be_seen"] = not works(impl="healthy", scale=3.0)
        with attnplug.sdpa_kernel(["healthy"]), attnplug.record() as calls:
            report["scope"] = works()
        report["ran"] = [call.impl for call in calls]
        report["failure"] = failure(sdpa, impl="raises")
        report["records"] = listed()
        """
    )
    assert report.plain and all(report.healthy) and report.wrong_would_be_seen
    assert report.scope and report.ran == ["healthy"]
    assert "UnknownImplementationError" in report.failure["kinds"]
    assert {name for name, record in report.records.items() if record["status"] == "broken"} == BROKEN.keys()
    assert len(of_plugins(report.warnings)) == len(BROKEN)


def test_exception_that_cannot_be_printed_hides_nothing(site: Site) -> None:
    odd = "class Odd(Exception):\n    def __str__(self): raise TypeError\nraise Odd()"
    site.install("fake-odd", {"odd": odd})
    report = site.run(LISTING)
    assert report.records["odd"]["status"] == "broken" and "Odd" in report.records["odd"]["reason"]
    assert report.records["healthy"]["status"] == "available" and len(of_plugins(report.warnings)) == 1


@pytest.mark.parametrize("value", ["missing_module", "healthy:missing_attribute", "healthy.missing", "1 2 3", ""])
def test_entry_point_that_leads_nowhere_is_broken(site: Site, value: str) -> None:
    site.install("fake-lost", {}, {"lost": value})
    report = site.run(LISTING)
    assert report.records["lost"]["status"] == "broken" and report.records["lost"]["reason"]
    assert report.records["healthy"]["status"] == "available"
    assert len(of_plugins(report.warnings)) == 1


def test_a_hook_of_a_later_release_may_be_answered_if_it_is_optional(site: Site) -> None:
    later = "@hookimpl(optionalhook=True)\ndef attnplug_of_a_later_release(): return []\n"
    site.install("fake-later", {"later": plugin(spec("later")) + later})
    report = site.run(LISTING)
    assert report.records["later"]["status"] == "available" and of_plugins(report.warnings) == []


def test_plugin_whose_metadata_is_gone_hides_nothing(site: Site) -> None:
    """What an interrupted uninstall leaves behind."""
    site.install("fake-ghost", {"ghost": plugin(spec("ghost"))})
    (site.folder / "fake_ghost-1.0.dist-info" / "METADATA").unlink()
    report = site.run(LISTING)
    assert report.records["healthy"]["status"] == "available"


def test_keyboard_interrupt_in_a_plugin_reaches_the_user_and_the_next_call_starts_anew(site: Site) -> None:
    slow = "import os\nif os.environ.pop('INTERRUPT', None): raise KeyboardInterrupt\n"
    site.install("fake-slow", {"slow": slow + plugin(spec("slow"))})
    report = site.run("report['failure'] = failure(attnplug.list_impls); report['records'] = listed()", INTERRUPT="1")
    assert report.failure["kinds"][0] == "KeyboardInterrupt"
    assert report.records["slow"]["status"] == report.records["healthy"]["status"] == "available"
    assert of_plugins(report.warnings) == []


def test_contested_name_stays_with_the_first_distribution_and_both_are_named(site: Site) -> None:
    site.install("fake-b", {"loser": plugin(spec("contested"), spec("second_own"))})
    site.install("fake-a", {"winner": plugin(spec("contested"), spec("first_own"))})
    report = site.run(LISTING)
    assert report.records["contested"]["distribution"] == "fake-a"
    loser = report.records["loser"]
    assert (loser["status"], loser["distribution"]) == ("broken", "fake-b")
    (warning,) = of_plugins(report.warnings)
    for text in (loser["reason"], warning):
        assert all(part in text for part in ("DuplicateImplementationError", "contested", "fake-a", "fake-b")), text
    for own in ("first_own", "second_own", "healthy"):
        assert report.records[own]["status"] == "available"


def test_strict_raises_for_a_contested_name(site: Site) -> None:
    site.install("fake-b", {"loser": plugin(spec("contested"))})
    site.install("fake-a", {"winner": plugin(spec("contested"))})
    report = site.run(FAILURE, ATTNPLUG_STRICT="1")
    assert "PluginError" in report.failure["kinds"] and report.failure["cause"] == "DuplicateImplementationError"
    assert "fake-a" in report.failure["message"] and "fake-b" in report.failure["message"]


def test_no_plugin_takes_the_name_of_a_built_in(site: Site) -> None:
    site.install("a-thief", {"thief": plugin(spec("torch", priority="10**9"))})
    report = site.run(LISTING)
    assert report.records["torch"]["distribution"] == "attnplug"
    assert report.records["thief"]["status"] == "broken"
    assert next(iter(report.records)) == "torch"


def test_name_claimed_twice_by_one_plugin_is_reported_and_the_first_stays(site: Site) -> None:
    site.install("fake-twice", {"stutters": plugin(spec("twice"), spec("twice"))})
    report = site.run(LISTING)
    assert report.records["twice"]["status"] == report.records["healthy"]["status"] == "available"
    assert report.records["stutters"]["status"] == "broken"
    assert len(of_plugins(report.warnings)) == 1


def test_each_entry_point_of_a_distribution_stands_by_itself(site: Site) -> None:
    modules = {
        "one": plugin(spec("impl_one")),
        "two": plugin(spec("impl_two")),
        "three": "raise ValueError('three')",
    }
    site.install("fake-several", modules, {name: name for name in modules})
    report = site.run(LISTING)
    several = {name: r["status"] for name, r in report.records.items() if r["distribution"] == "fake-several"}
    assert several == {"impl_one": "available", "impl_two": "available", "three": "broken"}
    assert len(of_plugins(report.warnings)) == 1


def test_entry_point_may_name_an_object(site: Site) -> None:
    hook = f"    @hookimpl\n    def attnplug_register_impls(self): return [{spec('mine')}]\n"
    source = f"{HEAD}class Plugin:\n{hook}\nplugin = Plugin()\n"
    site.install("fake-object", {"holder": source}, {"object": "holder:plugin"})
    report = site.run(LISTING)
    assert report.records["mine"]["status"] == "available" and of_plugins(report.warnings) == []


def test_plugin_may_ask_the_registry_while_it_loads(site: Site) -> None:
    site.install("fake-asks", {"asks": "import attnplug\nattnplug.list_impls()\n" + plugin(spec("asked"))})
    report = site.run(LISTING)
    assert report.records["asked"]["status"] == report.records["healthy"]["status"] == "available"


def test_missing_requirement_makes_an_implementation_unavailable_not_broken(site: Site) -> None:
    needy = spec("needy", requires="('a_module_that_nobody_has', 'json', 'nobody.has.this')")
    site.install("fake-needy", {"needs": plugin(needy), "needy_kernel": "raise RuntimeError('imported in vain')"})
    report = site.run(
        """
        report["records"] = listed()
        report["failure"] = failure(sdpa, impl="needy")
        report["works"] = works(), works(impl="healthy")
        report["imported"] = "needy_kernel" in sys.modules
        """,
    )
    record = report.records["needy"]
    assert record["status"] == "unavailable"
    assert "a_module_that_nobody_has" in record["reason"] and "nobody.has.this" in record["reason"]
    assert "json" not in record["reason"]
    assert "NoImplementationError" in report.failure["kinds"]
    assert "a_module_that_nobody_has" in report.failure["message"]
    assert report.works == [True, True] and not report.imported and of_plugins(report.warnings) == []


def test_discovery_works_among_a_thousand_distributions(site: Site) -> None:
    for number in range(1000):
        broken = number % 100 == 0
        source = f"raise ValueError('number {number}')" if broken else plugin(spec(f"impl_{number}"))
        site.install(f"fake-{number}", {f"plugin_{number}": source})
    report = site.run(LISTING)
    status = [record["status"] for record in report.records.values()]
    assert status.count("broken") == 10 == len(of_plugins(report.warnings))
    assert status.count("available") >= 990 + 1
    assert report.records["healthy"]["status"] == "available"


# What is imported when ---------------------------------------------------------------------------------


def imported(site: Site, script: str) -> set[str]:
    """Return the names of the modules that `script` leaves imported in a new interpreter."""
    done = site.python(f"import sys, json\n{script}\nprint(json.dumps(sorted(sys.modules)))")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_attnplug_imports_no_torch_no_plugin_and_no_kernel(site: Site) -> None:
    modules = imported(site, "import attnplug")
    assert "attnplug" in modules
    assert not modules & {"torch", "numpy", "healthy", "healthy_kernel"}


def test_listing_imports_light_modules_only(site: Site) -> None:
    modules = imported(site, "import attnplug; attnplug.list_impls(); attnplug.list_flash_attention_impls()")
    assert "healthy" in modules
    assert not modules & {"torch", "numpy", "healthy_kernel"}


def test_kernel_is_imported_when_first_chosen_and_not_before(site: Site) -> None:
    site.install_healthy("other")
    report = site.run(
        """
        def kernels():
            return sorted({"healthy_kernel", "other_kernel"} & set(sys.modules))

        report["works"] = works(), works(is_causal=False)
        report["before"] = "torch" in sys.modules, "healthy" in sys.modules, kernels()
        report["healthy"] = works(impl="healthy")
        report["after"] = kernels()
        """
    )
    assert all(report.works) and report.before == [True, True, []]
    assert report.healthy and report.after == ["healthy_kernel"]


def test_forbidden_import_would_be_seen(site: Site) -> None:
    """The tests above can fail."""
    heavy = HEAD + "import heavy_kernel, torch\n" + HOOK + "    return []\n"
    site.install("fake-heavy", {"heavy": heavy, "heavy_kernel": ""})
    assert {"heavy", "heavy_kernel", "torch"} <= imported(site, "import attnplug; attnplug.list_impls()")


def test_importing_attnplug_registers_nothing_with_torch(site: Site) -> None:
    done = site.python(
        """
        import torch, torch.nn.attention as attention

        def state():
            operators = sorted(torch._C._dispatch_get_all_op_names())
            functional = torch.nn.functional.scaled_dot_product_attention
            return operators, functional, attention.list_flash_attention_impls()

        before = state()
        import attnplug
        attnplug.list_impls()
        assert state() == before, "something was registered"
        library = torch.library.Library("attnplug_seen", "DEF")
        library.define("it() -> ()")
        assert state() != before, "a registration would not be seen"
        """
    )
    assert done.returncode == 0, done.stderr
