"""The environment variables do what they say; a value that means nothing is an error naming the variable.

Each case runs in a new interpreter, because the environment is read once. That nothing watches calls has no public
name, and is read where watchers are kept.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from packages import KERNEL, Site, of_plugins, plugin, spec

NAMES = """
report['names'] = sorted(
    name for name, r in listed().items() if r['distribution'] != 'attnplug' and r['status'] == 'available'
)
"""
FAILURE = "report['failure'] = failure(attnplug.list_impls)"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A folder that holds two healthy plugins, `healthy` and `other`, and one that raises."""
    site = Site(tmp_path / "site")
    site.install_healthy()
    site.install_healthy("other")
    site.install("fake-raises", {"raises": "raise RuntimeError('no luck today')"})
    return site


# ATTNPLUG_IMPL -----------------------------------------------------------------------------------------


def test_impl_is_an_order_of_preference_below_scopes_and_arguments(site: Site) -> None:
    report = site.run(
        """
        import torch
        query = torch.randn(1, 2, 5, 8)
        report["works"] = works()
        with attnplug.record() as calls:
            sdpa(softcap=2.0)
            sdpa(dropout_p=0.5, softcap=2.0)
            sdpa(impl="aten_math")
            with attnplug.sdpa_kernel("torch"):
                sdpa()
            attnplug.activate_flash_attention_impl("aten_flash")
            sdpa()
            attnplug.restore_flash_attention_impl()
            sdpa()
        report["ran"] = [call.impl for call in calls]
        report["chosen"] = attnplug.explain(query, query, query).chosen
        logsumexp, unrecorded = torch.logsumexp, []
        torch.logsumexp = lambda *args: unrecorded.append("other") or logsumexp(*args)  # which its kernel calls
        sdpa()
        report["unrecorded"] = unrecorded
        """,
        ATTNPLUG_IMPL=" other ,healthy",
    )
    assert report.works and report.chosen == "other" and report.unrecorded == ["other"]
    assert report.ran == ["other", "other", "aten_math", "torch", "aten_flash", "other"]


def test_preferred_implementation_that_cannot_take_a_call_is_passed_over_with_one_warning_a_reason(
    site: Site,
) -> None:
    report = site.run(
        """
        with attnplug.record() as calls:
            sdpa()
            sdpa(softcap=2.0)
            sdpa(softcap=2.0, seed=1)
            sdpa(softcap=3.0)
            sdpa(window_size=(1, 0))
        report["ran"] = [call.impl for call in calls]
        report["passed_over"] = calls[1].passed_over["aten_flash"]
        """,
        ATTNPLUG_IMPL="aten_flash,healthy",
    )
    assert report.ran == ["aten_flash", "healthy", "healthy", "healthy", "healthy"]
    fallbacks = [message for category, message in report.warnings if category == "FallbackWarning"]
    assert len(fallbacks) == 2, fallbacks
    assert all("aten_flash" in message and "healthy" in message for message in fallbacks)
    assert "softcap" in fallbacks[0] and "window_size" in fallbacks[1]
    assert any("softcap" in reason for reason in report.passed_over)


def test_unknown_preferred_implementation_is_an_error_of_every_call(site: Site) -> None:
    report = site.run(
        """
        import torch
        query = torch.randn(1, 2, 5, 8)
        report["failures"] = [
            failure(sdpa),
            failure(sdpa),
            failure(sdpa, impl="torch"),
            failure(attnplug.explain, query, query, query),
            failure(attnplug.activate_flash_attention_impl, "healthy"),
        ]
        """,
        ATTNPLUG_IMPL="torch,helthy",
    )
    for failure in report.failures:
        assert {"UnknownImplementationError", "AttnplugError", "ValueError"} <= set(failure["kinds"])
        for part in ("ATTNPLUG_IMPL", "'helthy'", "'healthy'", "aten_math"):
            assert part in failure["message"]


def test_variables_set_to_nothing_change_nothing(site: Site) -> None:
    report = site.run(
        """
        report["works"] = works()
        with attnplug.record() as calls:
            sdpa()
        report["ran"] = [call.impl for call in calls]
        report["records"] = listed()
        """,
        ATTNPLUG_IMPL=" ",
        ATTNPLUG_DISABLE="",
        ATTNPLUG_STRICT="",
        ATTNPLUG_TRACE="",
    )
    assert report.works and report.ran == ["torch"] and report.stderr == ""
    assert report.records["raises"]["status"] == "broken"
    assert {"healthy", "other"} <= report.records.keys()


# ATTNPLUG_LOAD and ATTNPLUG_DISABLE ---------------------------------------------------------------------

LOADED = NAMES + "report['imported'] = sorted({'healthy', 'other', 'raises'} & set(sys.modules))"


@pytest.mark.parametrize(
    ("value", "loaded"),
    [("healthy", ["healthy"]), ("other, healthy", ["healthy", "other"]), ("", []), (" ", [])],
)
def test_load_names_the_only_plugins_that_are_imported(site: Site, value: str, loaded: list[str]) -> None:
    report = site.run(LOADED, ATTNPLUG_LOAD=value)
    assert report.names == report.imported == loaded
    assert of_plugins(report.warnings) == []


@pytest.mark.parametrize(
    ("value", "loaded"),
    [("raises", ["healthy", "other"]), ("raises,other", ["healthy"]), ("other , healthy,raises", [])],
)
def test_disabled_plugin_is_never_imported(site: Site, value: str, loaded: list[str]) -> None:
    report = site.run(LOADED, ATTNPLUG_DISABLE=value, ATTNPLUG_LOAD="healthy,other,raises")
    assert report.names == report.imported == loaded
    assert of_plugins(report.warnings) == []


def test_disabled_plugin_is_not_imported_by_calls_either(site: Site) -> None:
    report = site.run(
        """
        report["works"] = works(), works(impl="other"), works(softcap=2.0)
        report["failure"] = failure(sdpa, impl="healthy")
        report["imported"] = "healthy" in sys.modules or "healthy_kernel" in sys.modules
        """,
        ATTNPLUG_DISABLE="healthy,raises",
        ATTNPLUG_LOAD="healthy,other",
    )
    assert all(report.works) and not report.imported
    assert "UnknownImplementationError" in report.failure["kinds"]
    assert "'healthy' is disabled by ATTNPLUG_DISABLE. Available: " in report.failure["message"]


def test_plugin_that_the_environment_leaves_out_is_listed_with_the_variable_and_named_in_suggestions(
    site: Site,
) -> None:
    report = site.run(
        """
        report["records"] = listed()
        report["said"] = [
            failure(sdpa, impl=name)["message"] for name in ("healthy", "helthy", "raises", "math_ref", "cudnn")
        ]
        report["names"] = attnplug.list_flash_attention_impls()
        """,
        ATTNPLUG_DISABLE="healthy,math_ref,flash_triton",
        ATTNPLUG_LOAD="healthy,other,math_ref",
    )
    for name, reason in (
        ("healthy", "disabled by ATTNPLUG_DISABLE"),
        ("math_ref", "disabled by ATTNPLUG_DISABLE"),
        ("raises", "not among the plugins of ATTNPLUG_LOAD"),
        ("efficient_cuda", "not among the plugins of ATTNPLUG_LOAD"),
    ):
        assert (report.records[name]["status"], report.records[name]["reason"]) == ("unavailable", reason)
    assert not {"healthy", "math_ref", "raises"} & set(report.names)
    healthy, misspelt, raises, math_ref, cudnn = report.said
    assert "implementation 'healthy' is disabled by ATTNPLUG_DISABLE" in healthy
    assert "did you mean 'healthy', which is disabled by ATTNPLUG_DISABLE?" in misspelt
    assert "implementation 'raises' is not among the plugins of ATTNPLUG_LOAD" in raises
    assert "implementation 'math_ref' is disabled by ATTNPLUG_DISABLE" in math_ref
    assert "'cudnn' belongs to the plugin 'efficient_cuda', which is not among the plugins of ATTNPLUG_LOAD" in cudnn


def test_unknown_name_in_load_is_an_error_with_the_closest_match(site: Site) -> None:
    report = site.run(FAILURE, ATTNPLUG_LOAD="other,helthy")
    assert {"ConfigError", "AttnplugError", "ValueError"} <= set(report.failure["kinds"])
    for part in ("ATTNPLUG_LOAD", "'helthy'", "mean 'healthy'", "installed", "other", "raises"):
        assert part in report.failure["message"]


def test_load_means_entry_points_not_implementations(site: Site) -> None:
    report = site.run(FAILURE, ATTNPLUG_LOAD="torch")
    assert "ConfigError" in report.failure["kinds"] and "'torch'" in report.failure["message"]
    report = site.run(FAILURE, ATTNPLUG_LOAD="cudnn")
    assert "did you mean 'efficient_cuda', which has this implementation?" in report.failure["message"]


@pytest.mark.parametrize("strict", ["0", "1"])
def test_unknown_name_in_disable_is_one_warning_with_the_closest_match(site: Site, strict: str) -> None:
    values = {
        "ATTNPLUG_DISABLE": "raises,helthy",
        "ATTNPLUG_LOAD": "healthy,other",
        "ATTNPLUG_STRICT": strict,
    }
    report = site.run(f"attnplug.list_impls()\n{NAMES}", **values)
    (warning,) = of_plugins(report.warnings)
    assert all(part in warning for part in ("ATTNPLUG_DISABLE", "'helthy'", "'healthy'"))
    assert report.names == ["healthy", "other"]


# ATTNPLUG_STRICT and ATTNPLUG_TRACE ---------------------------------------------------------------------


def test_strict_0_is_as_unset(site: Site) -> None:
    report = site.run("report['records'] = listed()", ATTNPLUG_STRICT="0", ATTNPLUG_TRACE="0")
    assert report.records["raises"]["status"] == "broken" and len(of_plugins(report.warnings)) == 1


def test_strict_raises_at_the_first_call_and_at_the_next(site: Site) -> None:
    report = site.run(
        "report['failures'] = [failure(sdpa), failure(sdpa, impl='torch'), failure(attnplug.list_impls)]",
        ATTNPLUG_STRICT="1",
    )
    for failure in report.failures:
        assert {"PluginError", "AttnplugError", "RuntimeError"} <= set(failure["kinds"])
        assert failure["cause"] == "RuntimeError" and "no luck today" in failure["message"]


def test_strict_raises_for_a_broken_kernel_at_each_call_that_needs_it(site: Site) -> None:
    site.install("fake-kernel", {"lacks": plugin(spec("lacks", kernel="no_such_kernel"))})
    report = site.run(
        """
        report["failures"] = [failure(sdpa, impl="lacks"), failure(sdpa, impl="lacks"), failure(sdpa, impl="lacks")]
        report["works"] = works()
        """,
        ATTNPLUG_STRICT="1",
        ATTNPLUG_LOAD="lacks",
    )
    assert report.works
    for failure in report.failures:
        assert failure["kinds"][0] == "PluginError" and failure["cause"] == "ModuleNotFoundError"
        assert "'lacks' (fake-kernel)" in failure["message"]


def test_strict_says_nothing_when_all_plugins_are_sound(site: Site) -> None:
    report = site.run(NAMES, ATTNPLUG_STRICT="1", ATTNPLUG_LOAD="healthy,other")
    assert report.names == ["healthy", "other"] and report.warnings == []


def test_trace_logs_each_decision_on_stderr_with_who_was_passed_over(site: Site) -> None:
    report = site.run(
        """
        sdpa()
        sdpa()
        sdpa(softcap=2.0)
        sdpa(impl="aten_math")
        """,
        ATTNPLUG_TRACE="1",
        ATTNPLUG_LOAD="healthy",
    )
    lines = [line for line in report.stderr.splitlines() if "attnplug" in line]
    assert len(lines) == 4, report.stderr
    for line, ran in zip(lines, ("torch", "torch", "healthy", "aten_math"), strict=True):
        assert ran in line and "(1, 2, 5, 8)" in line and "float32" in line
    assert "softcap" in lines[2] and "aten_flash" in lines[2]


# ATTNPLUG_VERIFY ----------------------------------------------------------------------------------------

WRONG = KERNEL.replace("@ params.value", "@ params.value * 1.01")


def test_verify_names_a_rate_at_which_every_thread_is_verified(site: Site) -> None:
    site.install("fake-wrong", {"wrong": plugin(spec("wrong")), "wrong_kernel": WRONG})
    report = site.run(
        """
        import threading
        sdpa(impl="healthy")
        thread = threading.Thread(target=sdpa, kwargs={"impl": "wrong"})
        thread.start()
        thread.join()
        """,
        ATTNPLUG_VERIFY="1",
        ATTNPLUG_DISABLE="",
    )
    (mismatch,) = [message for category, message in report.warnings if category == "MismatchWarning"]
    assert "wrong, held against math_ref: out: largest error" in mismatch


def test_verify_without_its_reference_is_an_error_of_every_call(site: Site) -> None:
    report = site.run("report['failures'] = [failure(sdpa), failure(sdpa)]", ATTNPLUG_VERIFY="0.5")
    for failure in report.failures:
        assert failure["message"].startswith("ATTNPLUG_VERIFY: implementation 'math_ref' is disabled")


def test_verify_0_is_as_unset(site: Site) -> None:
    report = site.run(
        """
        from attnplug._selection.state import process
        report["works"] = works()
        report["watchers"] = len(process.watchers)
        """,
        ATTNPLUG_VERIFY="0",
    )
    assert report.works and report.watchers == 0


# Values that mean nothing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ATTNPLUG_STRICT", "yes"),
        ("ATTNPLUG_STRICT", "2"),
        ("ATTNPLUG_STRICT", " "),
        ("ATTNPLUG_TRACE", "on"),
        ("ATTNPLUG_TRACE", "-1"),
        ("ATTNPLUG_VERIFY", "yes"),
        ("ATTNPLUG_VERIFY", "1.5"),
        ("ATTNPLUG_VERIFY", "nan"),
        ("ATTNPLUG_IMPL", "torch,,healthy"),
        ("ATTNPLUG_IMPL", ","),
        ("ATTNPLUG_LOAD", "healthy,"),
        ("ATTNPLUG_LOAD", "healthy;other"),
        ("ATTNPLUG_DISABLE", ",healthy"),
    ],
)
def test_meaningless_value_is_an_error_naming_variable_and_value(site: Site, variable: str, value: str) -> None:
    report = site.run(
        "report['failures'] = [failure(attnplug.list_impls), failure(attnplug.list_impls)]",
        **{variable: value},
    )
    for failure in report.failures:
        assert {"ConfigError", "AttnplugError", "ValueError"} <= set(failure["kinds"])
        assert failure["message"].startswith(variable) and repr(value) in failure["message"]


@pytest.mark.parametrize(
    "wrong, right", [("ATTNPLUG_DISABEL", "ATTNPLUG_DISABLE"), ("ATTNPLUG_IMPLS", "ATTNPLUG_IMPL")]
)
def test_misspelt_variable_is_an_error_with_the_closest_match(site: Site, wrong: str, right: str) -> None:
    report = site.run(FAILURE, **{wrong: "healthy"})
    assert "ConfigError" in report.failure["kinds"]
    assert wrong in report.failure["message"] and repr(right) in report.failure["message"]


def test_wrong_environment_is_an_error_of_every_call_too(site: Site) -> None:
    report = site.run(
        """
        report["failures"] = [
            failure(sdpa),
            failure(sdpa, impl="torch"),
            failure(attnplug.sdpa_kernel, "torch"),
            failure(attnplug.activate_flash_attention_impl, "torch"),
        ]
        """,
        ATTNPLUG_TRACE="on",
    )
    for failure in report.failures:
        assert "ConfigError" in failure["kinds"] and "ATTNPLUG_TRACE" in failure["message"]
