"""A plugin that fails fails alone: it is listed with its exception, and nothing else notices.

Each case runs in a new interpreter that finds fake installed distributions, one of which is healthy.
"""

from __future__ import annotations

import json
import re
from textwrap import dedent

import pytest

import attnplug
from packages import HEAD, HOOK, KERNEL, Site, of_plugins, plugin, spec

RAISING_MODULES = {
    "raises": ("raise RuntimeError('no luck today')", "RuntimeError: no luck today"),
    "misses_a_module": ("import a_module_that_nobody_has", "ModuleNotFoundError: .*a_module_that_nobody_has"),
    "misses_a_name": ("from attnplug import hookimpel", "ImportError: cannot import name 'hookimpel'"),
    "no_python": ("def attnplug_register_impls(:", "SyntaxError: invalid syntax"),
    "exits": ("import sys; sys.exit('this plugin knows best')", "SystemExit: this plugin knows best"),
    "panics": (  # as extensions written in Rust do
        "class PanicException(BaseException): ...\nraise PanicException('called `unwrap()` on a None')",
        "PanicException: called `unwrap",
    ),
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


def test_an_entry_point_that_names_no_module_is_told_as_what_is_wrong(site: Site) -> None:
    site.install("fake-broken", {"my_attn": plugin(spec("mine"))}, {"misnamed": "my_atn:plugin"})
    reason = site.run(LISTING).records["misnamed"]["reason"]
    assert reason == "ModuleNotFoundError: No module named 'my_atn'; its entry point is misnamed = my_atn:plugin"


@pytest.mark.parametrize("imported", ["import no_such", "importlib.import_module('no_such')"])
def test_a_module_that_a_plugin_imports_and_is_not_there_is_told_with_the_place_of_the_import(
    site: Site, imported: str
) -> None:
    site.install("fake-broken", {"my_attn": f"import importlib\n{imported}"}, {"mine": "my_attn"})
    reason = site.run(LISTING).records["mine"]["reason"]
    assert re.fullmatch(r"ModuleNotFoundError: No module named 'no_such' \(in .*my_attn\.py, line 2\)", reason)


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


@pytest.mark.parametrize("name", BAD_SPECS)
def test_a_wrong_declaration_is_found_in_the_file_of_the_plugin(site: Site, name: str) -> None:
    site.install("fake-broken", {name: BROKEN[name][0]})
    assert re.search(rf"\(in [^()]*\b{name}\.py, line \d+\)", site.run(LISTING).records[name]["reason"])


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


def test_entry_point_of_somebody_else_that_means_nothing_hides_no_plugin(site: Site) -> None:
    """Some releases of importlib-metadata raise for it when they list entry points."""
    site.install("fake-console", {}, {})
    (site.folder / "fake_console-1.0.dist-info" / "entry_points.txt").write_text("[console_scripts]\nx = 1 2 3\n")
    refusing = """
        import importlib_metadata

        def refuse(**_):
            raise ValueError("Invalid object reference")

        importlib_metadata.entry_points = refuse
        """
    for script in ("", refusing):
        report = site.run(f"{dedent(script)}\n{LISTING}")
        assert report.records["healthy"]["status"] == "available" and of_plugins(report.warnings) == []


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


def test_entry_point_that_names_a_class_or_a_function_is_told_to_name_the_module(site: Site) -> None:
    hook = f"    @hookimpl\n    def attnplug_register_impls(self): return [{spec('mine')}]\n"
    source = f"{HEAD}class Plugin:\n{hook}\n{HOOK}    return [{spec('mine')}]\n"
    entry_points = {"by_class": "holder:Plugin", "by_function": "holder:attnplug_register_impls"}
    site.install("fake-object", {"holder": source}, entry_points)
    records = site.run(LISTING).records
    for name, kind in (("by_class", "a class"), ("by_function", "a function")):
        assert records[name]["status"] == "broken"
        assert f"the entry point names {kind}, {entry_points[name]}; name the module" in records[name]["reason"]
    assert "mine" not in records and records["healthy"]["status"] == "available"


# A plugin for a later attnplug -------------------------------------------------------------------------

LATER = {
    "feature": ("Feature.FOURTH_DERIVATIVES", "Feature of attnplug"),
    "field": ("Capabilities(planets=('mars',))", "unexpected keyword argument 'planets'"),
    "dtype": ("Capabilities(dtypes=('float4_e2m1',))", "unknown dtype 'float4_e2m1'"),
    "name": ("__import__('attnplug').WormHole", "'WormHole'"),
}


@pytest.mark.parametrize("used", LATER)
@pytest.mark.parametrize("needs", ["attnplug>=9.1,<10", "attnplug", None])
def test_plugin_for_a_later_attnplug_is_told_so_with_both_versions(site: Site, used: str, needs: str | None) -> None:
    source, said = LATER[used]
    site.install("fake-later", {"later": f"{HEAD}{source}\n{plugin(spec('later'))}"})
    if needs is not None:
        with (site.folder / "fake_later-1.0.dist-info" / "METADATA").open("a") as metadata:
            metadata.write(f"Requires-Dist: numpy>=2\nRequires-Dist: attnplug-math-ref>=7\nRequires-Dist: {needs}\n")
    report = site.run(LISTING + "; report['version'] = attnplug.__version__")
    reason = report.records["later"]["reason"]
    assert said in reason
    if needs == "attnplug>=9.1,<10":
        assert f"fake-later 1.0 needs attnplug {needs[8:]}, and this is {report.version}" in reason
    else:
        assert f"this is attnplug {report.version}, and fake-later 1.0 may be written for a later one" in reason
    (warning,) = of_plugins(report.warnings)
    assert reason in warning


def test_plugin_for_this_attnplug_is_not_told_of_others(site: Site) -> None:
    site.install("fake-fits", {"fits": "raise RuntimeError('no luck')"})
    with (site.folder / "fake_fits-1.0.dist-info" / "METADATA").open("a") as metadata:
        metadata.write(f"Requires-Dist: attnplug>={attnplug.__version__},<9\n")
    reason = site.run(LISTING).records["fits"]["reason"]
    assert "no luck" in reason and "needs attnplug" not in reason and "later" not in reason


# What plugins write reaches terminals ------------------------------------------------------------------


def test_what_a_plugin_prints_is_not_among_what_the_command_line_prints(site: Site) -> None:
    chatty = "print('welcome')\nimport sys\nsys.stdout.write('to chatty')\n"
    site.install("fake-chatty", {"chatty": chatty + plugin(spec("chatty")), "chatty_kernel": chatty + KERNEL})
    for arguments in (["list", "--json"], ["explain", "--query", "1,2,4,8", "--impl", "chatty", "--json"]):
        done = site.python(f"import sys; from attnplug.cli import main; sys.exit(main({arguments}))")
        assert done.returncode == 0 and "chatty" in json.dumps(json.loads(done.stdout))
        assert done.stderr.count("welcome") == (1 if "list" in arguments else 2)


def test_escapes_of_a_plugin_reach_no_terminal_and_what_is_long_is_cut(site: Site) -> None:
    raising = "raise ValueError('\\x1b[2J\\x1b]0;title\\x07\\x9b31m' + 'x' * 2_000_000)"
    site.install("fake-\x1b[31mred", {"loud": raising}, {"loud\x1b[5m": "loud"})
    site.install("fake-blank", {"blank": "raise ValueError('a' + ' ' * 20_000 + 'b')"})
    kernel = "def forward(params): ...\ndef supports(params): return ['\\x1b[8m' + 'y' * 2_000_000, 'short\\r']\n"
    site.install("fake-quiet", {"quiet": plugin(spec("quiet")), "quiet_kernel": kernel})
    report = site.run(
        """
        records = attnplug.list_impls()
        report["texts"] = [text for r in records for text in (r.name, r.distribution, r.version, r.reason)]
        report["texts"].append(failure(sdpa, impl="quiet")["message"])
        report["texts"] += [message for _, message in caught]
        """
    )
    for text in report.texts:
        assert len(text) < 5000
        assert all(line.isprintable() for line in text.split("\n")), text[:200]
    assert any("\\x1b[2J" in text and "(cut: 2,000,0" in text for text in report.texts)
    assert any("(cut: 20,0" in text for text in report.texts)
    assert any("\\x1b[8m" in text and "short" in text for text in report.texts)
    assert any("fake-\\x1b[31mred" in text for text in report.texts)


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


def test_plugin_installed_while_the_process_runs_needs_a_restart_which_the_error_says(site: Site) -> None:
    """As in a notebook, where the line that installs it comes after the call that missed it."""
    site.install("fake-late", {"late": plugin(spec("late")), "late_kernel": KERNEL})
    metadata = site.folder / "fake_late-1.0.dist-info"
    metadata.rename(site.folder / "not_yet")
    report = site.run(
        f"""
        import os

        report["before"] = failure(sdpa, impl="late")
        os.rename({str(site.folder / "not_yet")!r}, {str(metadata)!r})
        report["after"] = [failure(sdpa, impl="late"), failure(attnplug.sdpa_kernel, "late")]
        report["other"] = failure(sdpa, impl="lite")
        """
    )
    assert report.before["message"].startswith("impl: unknown implementation 'late'")
    for failure, where in zip(report.after, ("impl", "backends"), strict=True):
        installed = "implementation 'late' was installed after this process had looked for plugins; restart it."
        assert failure["message"].startswith(f"{where}: {installed}")
    assert "did you mean 'late', which was installed after" in report.other["message"]


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


WARNS = """
import warnings
import attnplug

def lines(script):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(script, "the_user_s_file.py", "exec"), {"__name__": "the_program"})
    return [[w.filename, w.lineno, w.category.__name__] for w in caught if w.category is not DeprecationWarning]

"""


def test_warnings_point_at_the_user_s_line(site: Site) -> None:
    """And not into attnplug, nor into PyTorch, through which some calls come."""
    site.install("fake-broken", {"broken": "raise ValueError"})
    site.install("fake-lost", {"lost": plugin(spec("lost", kernel="no_such_module"))})
    report = site.run(
        WARNS
        + """
report["lines"] = lines(
'''import attnplug, torch
query = torch.randn(1, 2, 4, 8)
attnplug.list_impls()
attnplug.can_use_impl("lost", attnplug.SDPAParams(query, query, query))
attnplug.activate_flash_attention_impl("aten_math")
attnplug.scaled_dot_product_attention(query, query, query, softcap=3.0)
torch.nn.functional.scaled_dot_product_attention(query, query, query)
attnplug.restore_flash_attention_impl()
attnplug.restore_flash_attention_impl()
''')
""",
        ATTNPLUG_LOAD="broken,lost,healthy",
    )
    assert {place for place, _, _ in report.lines} == {"the_user_s_file.py"}
    assert [line for _, line, kind in report.lines if kind == "PluginWarning"] == [3, 4]
    assert [line for _, line, kind in report.lines if kind == "FallbackWarning"] == [6]
    assert [line for _, line, kind in report.lines if kind == "UserWarning"] == [9]


def test_an_unknown_name_says_which_broken_plugin_may_have_it(site: Site) -> None:
    site.install("fake-broken", {"broken": "raise OSError('no such library')\n"})
    report = site.run("report['failures'] = [failure(sdpa, impl='quickest'), failure(sdpa, impl='healthyy')]")
    unknown, misspelt = (each["message"] for each in report.failures)
    assert "'quickest'. Plugin 'broken', which may have it, is installed but broken: OSError" in unknown
    assert "did you mean 'healthy'" in misspelt and "may have it" not in misspelt
