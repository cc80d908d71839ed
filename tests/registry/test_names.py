"""A name of two distributions is listed twice, and an error where it is used; each can be left out.

Each case runs in a new interpreter that finds fake installed distributions.
"""

from __future__ import annotations

import pytest

from packages import KERNEL, Site, of_plugins, plugin, spec

LISTING = "report['records'] = listed(); listed()"
FAILURE = "report['failure'] = failure(attnplug.list_impls)"
CONTESTED = """
report["records"] = [(r.name, r.distribution, r.status, r.reason) for r in attnplug.list_impls()]
report["failures"] = [
    failure(sdpa, impl="contested"),
    failure(attnplug.sdpa_kernel, "contested"),
    failure(attnplug.activate_flash_attention_impl, "contested"),
]
report["names"] = attnplug.list_flash_attention_impls()
report["works"] = works(), works(impl="healthy")
"""


def test_name_of_two_distributions_is_listed_twice_and_an_error_where_it_is_used(site: Site) -> None:
    site.install("fake-b", {"second": plugin(spec("contested"), spec("second_own"))})
    site.install("fake-a", {"first": plugin(spec("contested"), spec("first_own"))})
    report = site.run(CONTESTED)
    claims = [record for record in report.records if record[0] == "contested"]
    assert [(distribution, status) for _, distribution, status, _ in claims] == [
        ("fake-a", "broken"),
        ("fake-b", "broken"),
    ]
    (warning,) = of_plugins(report.warnings)
    settled = "until one is left out, with ATTNPLUG_DISABLE=first or ATTNPLUG_DISABLE=second"
    for text in (warning, *(reason for *_, reason in claims), *(each["message"] for each in report.failures)):
        assert all(part in text for part in ("'contested'", "fake-a", "fake-b", settled)), text
    assert all(failure["kinds"][0] == "DuplicateImplementationError" for failure in report.failures)
    assert "contested" not in report.names and {"first_own", "second_own", "healthy"} <= set(report.names)
    assert all(report.works)


@pytest.mark.parametrize(
    "setting", [{"ATTNPLUG_DISABLE": "first"}, {"ATTNPLUG_LOAD": "second,healthy", "ATTNPLUG_DISABLE": ""}]
)
def test_the_environment_settles_a_contested_name(site: Site, setting: dict[str, str]) -> None:
    for name, distribution in (("first", "fake-a"), ("second", "fake-b")):
        site.install(distribution, {name: plugin(spec("contested")), f"{name}_kernel": KERNEL})
    (site.folder / "contested_kernel.py").write_text(KERNEL)
    report = site.run("report['works'] = works(impl='contested'); report['records'] = listed()", **setting)
    assert report.works and report.records["contested"]["distribution"] == "fake-b"
    assert of_plugins(report.warnings) == []


def test_of_two_plugins_of_one_name_each_can_be_left_out_by_its_distribution(site: Site) -> None:
    """What a fork of a package does that keeps the names: its entry point is called as the other one's."""
    for distribution in ("fake-a", "fake-b"):
        module = f"of_{distribution[-1]}"
        site.install(distribution, {module: plugin(spec("contested"))}, {"contested": module})
    report = site.run(CONTESTED)
    message = report.failures[0]["message"]
    assert "ATTNPLUG_DISABLE=fake-a:contested or ATTNPLUG_DISABLE=fake-b:contested" in message
    script = "report['records'] = [(r.name, r.distribution, r.status) for r in attnplug.list_impls()]"
    report = site.run(script, ATTNPLUG_DISABLE="fake-a:contested")
    records = [tuple(record[1:]) for record in report.records if record[0] == "contested"]
    assert records == [("fake-b", "available"), ("fake-a", "unavailable")] and of_plugins(report.warnings) == []


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


def test_name_claimed_twice_by_one_plugin_makes_it_broken_and_hides_nothing(site: Site) -> None:
    site.install("fake-twice", {"stutters": plugin(spec("twice"), spec("twice"))})
    report = site.run(LISTING)
    assert report.records["healthy"]["status"] == "available" and "twice" not in report.records
    assert "returned two ImplSpecs named 'twice'" in report.records["stutters"]["reason"]
    assert len(of_plugins(report.warnings)) == 1
