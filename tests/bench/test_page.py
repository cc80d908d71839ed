"""The page as a browser shows it: on a desktop and a phone, in light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import browser
from attnplug import bench
from attnplug.bench import Case, Noise, Record, Report, Timing
from browser import LOOKS, clipped, contrast, needs_browser, overflow, shown

pytestmark = needs_browser
UNITS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    with browser.browser() as found:
        yield found


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    bench.write(report, path)
    return path


@pytest.fixture(scope="module")
def large(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page as long, and with names as long, as they get: the sets of models, on four implementations."""
    cases = [case for name in ("laptop", "llama-3-8b", "sdxl") for case in bench.case_set(name, device="cpu")]
    impls = ("torch", "flash_triton", "sage_attention", "efficient_cuda")
    records = [
        Record(
            case.but(name=f"{case.name} of a model with a name that is long"),
            impl,
            "ran",
            correct=impl != "sage_attention",
            reason="" if impl != "sage_attention" else "out: largest error 1 at [0, 0, 0, 0], allowed 0.001",
            forward=Timing(1e-3 * (1 + at), 1e-3, 1e-2, 9),
            forward_cold=Timing(123.4e-3, 1e-3, 1e-2, 9),
            backward=Timing(1.23, 1.0, 2.0, 9) if case.backward else None,
            backward_cold=Timing(1.23, 1.0, 2.0, 9) if case.backward else None,
            memory=123 * 2**20,
            ratio=1.0 + at,
            fastest=at == 0,
            ceiling=report.ceilings[0],
        )
        for case in cases
        for at, impl in enumerate(impls)
    ]
    path = tmp_path_factory.mktemp("large") / "large.html"
    noise = Noise(1.5, 2, {"cpu": 0.2})
    bench.write(Report(tuple(records), report.environment, report.ceilings, "torch", report.created, noise=noise), path)
    return path


def table(tab: Any) -> tuple[list[str], list[dict[str, str]]]:
    """Return headings and cells of the results."""
    texts = (
        "[...document.querySelectorAll('#results tr')].map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    )
    headings, *rows = tab.evaluate(texts)
    return headings, [dict(zip(headings, row, strict=True)) for row in rows]


def heading(tab: Any, name: str) -> Any:
    return tab.locator("#results thead").get_by_role("button", name=name, exact=True)


def number(text: str) -> float:
    value, _, unit = text.partition(" ")
    return float(value) * UNITS[unit]


def test_the_numbers_in_a_browser_are_those_of_the_json(started, page, report, tmp_path):
    bench.write(report, tmp_path / "all.json")
    records = [each for each in json.loads((tmp_path / "all.json").read_text())["records"] if each["status"] == "ran"]
    with shown(started, page) as tab:
        _, rows = table(tab)
        below = tab.inner_text("body")
    assert len(rows) == len(records)
    for row, record in zip(rows, records, strict=True):
        assert (row["case"], row["implementation"]) == (record["case"]["name"], record["impl"])
        assert (row["verdict"] == "WRONG") == (not record["correct"])
        assert (row["verdict"] in ("fastest", "tied")) == record["fastest"]
        for header, name in (("forward", "forward"), ("fwd cold", "forward_cold"), ("bwd cold", "backward_cold")):
            if record[name] is None:
                assert row[header] == "-"
            else:
                assert number(row[header]) == pytest.approx(record[name]["median"], rel=6e-3)
        assert number(row["memory"]) == pytest.approx(record["memory"], rel=6e-3)
        assert float(row["ratio"]) == pytest.approx(record["ratio"], abs=6e-3)
        rates = [float(rate) for rate in row["TFLOP/s"].split(" / ")]
        expected = [record[name] for name in ("forward_tflops", "backward_tflops") if record[name] is not None]
        assert rates == pytest.approx(expected, rel=6e-3)
    assert "on_gpus, declined: all" in below and "runs on cuda; the call is on cpu" in below


def test_the_summary_has_wins_and_the_mean_of_ratios_of_each_implementation(started, page, report):
    with shown(started, page) as tab:
        rows = [row.locator("td").all_inner_texts() for row in tab.locator("#summary tbody tr").all()]
        first_heading = tab.locator("h2").first.inner_text()
    assert first_heading == "Summary"
    found = {name: numbers for name, *numbers in rows}
    for standing in report.standings():
        ratio = "-" if standing.ratio is None else f"{standing.ratio:.2f}"
        assert found[standing.impl] == [*map(str, (standing.alone, standing.tied, standing.right, standing.ran)), ratio]


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_nothing_is_clipped_and_everything_is_readable(started, large, width, scheme):
    with shown(started, large, width, scheme) as tab:
        assert overflow(tab) == 0
        assert clipped(tab) == []
        lines = [".fastest td", ".fastest td:nth-child(2)", ".WRONG td", ".right td", "#summary td", ".quiet", "dd"]
        assert {line: contrast(tab, line) >= 4.5 for line in lines} == dict.fromkeys(lines, True)
        dark = contrast(tab, "body") >= 4.5 and tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (dark != "rgb(255, 255, 255)") == (scheme == "dark")
        for at in (1, 2):  # verdict and implementation are seen without scrolling sideways
            box = tab.locator(f"#results tbody tr:first-child td:nth-child({at})").bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width


@pytest.mark.parametrize("width", [1280, 400])
def test_the_headings_stay_in_sight(started, large, width):
    with shown(started, large, width) as tab:
        tab.evaluate("document.querySelector('#results tbody tr:nth-child(40)').scrollIntoView()")
        top = tab.locator("#results thead").bounding_box()["y"] if width == 400 else None
        head = tab.locator("#results thead th").first.bounding_box()
        assert tab.evaluate("scrollY") > 500
        assert 0 <= (head["y"] if top is None else top) < 2


@pytest.mark.parametrize(
    ("header", "order"),
    [("forward", 1), ("memory", 1), ("ratio", 1), ("TFLOP/s", -1), ("of ceiling", -1)],
)
def test_a_click_on_a_heading_sorts_the_best_first_and_says_so(started, page, header, order):
    with shown(started, page) as tab:
        button = tab.get_by_role("button", name=header, exact=True)
        for sign, said in ((order, "best"), (-order, "worst")):
            button.click()
            sorted_by = tab.locator("#results thead th[aria-sort]")
            assert sorted_by.all_inner_texts() == [header]
            assert sorted_by.get_attribute("aria-sort") == ("ascending" if sign == 1 else "descending"), said
            _, rows = table(tab)
            values = [row[header].split(" / ")[0].rstrip("%") for row in rows]
            keys = [number(value) if " " in value else float(value) for value in values]
            assert keys == sorted(keys, reverse=sign == -1)


def test_what_was_not_measured_comes_last_in_either_order(started, page):
    with shown(started, page) as tab:
        for _ in range(2):
            heading(tab, "backward").click()
            _, rows = table(tab)
            measured = [row["backward"] != "-" for row in rows]
            assert measured == sorted(measured, reverse=True) and not all(measured)


def test_the_verdicts_sort_from_the_fastest_to_the_wrong(started, large):
    with shown(started, large) as tab:
        heading(tab, "verdict").click()
        _, rows = table(tab)
    verdicts = [row["verdict"] for row in rows]
    assert verdicts == sorted(verdicts, key=["fastest", "tied", "right", "WRONG"].index)
    assert set(verdicts) == {"fastest", "right", "WRONG"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_point_of_a_plot_has_a_tooltip_and_text_has_the_colour_of_the_page(started, page, report, scheme):
    with shown(started, page, scheme=scheme) as tab:
        tips = tab.locator(".plots svg title").all_text_contents()
        ink = tab.evaluate("getComputedStyle(document.body).color")
        drawn = tab.evaluate("[...document.querySelectorAll('.plots svg text')].map(t => getComputedStyle(t).fill)")
        widths = tab.evaluate("[...document.querySelectorAll('.plots svg')].map(s => s.getBoundingClientRect().width)")
    for record in report:
        if record.status == "ran":
            time = f"{record.forward.median * 1e6:.3g} µs"
            what = ", forward" if record.case.backward else ""
            assert record.forward.median > 1e-3 or f"{record.impl}{what}: {time}\n{record.case.name}" in tips
    assert drawn and set(drawn) == {ink}
    assert min(widths) > 300


def test_a_report_of_nothing_is_a_page_too(started, report, tmp_path):
    empty = Report(**{**report.__dict__, "records": ()})
    bench.write(empty, tmp_path / "empty.html")
    with shown(started, tmp_path / "empty.html") as tab:
        assert tab.locator("#results tbody tr").count() == 0 and tab.locator(".plots").count() == 0


def test_nobody_is_the_fastest_of_shrunk_cases(started, tmp_path):
    report = bench.run([Case(queries=128)], ["torch", "aten_math"], seconds=0.002, tiny=True)
    bench.write(report, tmp_path / "tiny.html")
    with shown(started, tmp_path / "tiny.html") as tab:
        _, rows = table(tab)
        assert [row["verdict"] for row in rows] == ["right", "right"]
        assert "none is called the fastest" in tab.inner_text("body")
