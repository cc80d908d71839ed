"""The documentation as a browser shows it, on a desktop and a phone, in light and dark."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import browser
from browser import LOOKS, clipped, contrast, needs_browser, overflow, shown

pytest.importorskip("mkdocs", reason="the documentation is built with mkdocs")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    with browser.browser() as found:
        yield found


# What scrolls sideways within a page, though the window is a desktop's.
_SCROLLS = """
[...document.querySelectorAll(".md-content *")]
  .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX !== "visible")
  .map(e => e.textContent.trim().slice(0, 60))
"""


@needs_browser
@pytest.mark.slow
def test_no_page_is_wider_than_its_window_and_a_desktop_shows_code_and_tables_whole(started, site):
    for page in sorted(site.rglob("*.html")):
        with shown(started, page) as tab:
            assert (page.name, tab.evaluate(_SCROLLS)) == (page.name, [])
            for width, scheme in LOOKS:
                tab.set_viewport_size({"width": width, "height": 900})
                tab.emulate_media(color_scheme=scheme)
                assert tab.evaluate("innerWidth") == width
                assert (page.name, width, scheme, overflow(tab), clipped(tab)) == (page.name, width, scheme, 0, [])


@needs_browser
def test_the_names_of_features_stay_where_the_table_scrolls(started, site):
    with shown(started, site / "implementations.html", 400) as tab:
        table = tab.locator(".matrix table")
        before = table.locator("td").first.bounding_box()
        moved = table.evaluate(
            """table => {
              let scroller = table;
              while (scroller.scrollWidth <= scroller.clientWidth + 1) scroller = scroller.parentElement;
              scroller.scrollLeft = 200;
              return scroller.scrollLeft;
            }"""
        )
        assert moved == 200, "a phone sees a part of the table"
        assert 0 <= table.locator("td").first.bounding_box()["x"] <= before["x"]
        assert table.locator("td").nth(1).bounding_box()["x"] < before["x"] + before["width"]


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_home_page_makes_its_point_before_one_scrolls(started, site, scheme):
    with shown(started, site / "index.html", scheme=scheme) as tab:
        assert tab.locator(".language-python").first.bounding_box()["y"] < 300
        assert "does not support softcap" in tab.locator(".language-text").first.inner_text()
        boxes = [figure.bounding_box() for figure in tab.locator(".side-by-side svg").all()]
        assert len(boxes) == 2 and boxes[0]["y"] == boxes[1]["y"] and all(box["y"] < 600 for box in boxes)
        assert tab.locator(".bars title").count() == 12
        assert contrast(tab, "figcaption") >= 4.5
        ink, text = tab.evaluate(
            """[getComputedStyle(document.querySelector("p")).color,
                getComputedStyle(document.querySelector("figure svg .ink")).fill]"""
        )
        assert ink == text, "the picture's text has the colour of the page's"


def test_the_page_for_what_is_not_found_works_in_any_folder(site):
    page = (site / "404.html").read_text()
    links = [link for link in re.findall(r'(?:href|src)="([^"#?]+)', page) if not link.startswith("https:")]
    assert len(links) > 20
    assert [link for link in links if link.startswith("/") or not (site / link).exists()] == []


def test_pictures_of_the_documentation_are_small():
    images = list((ROOT / "docs/images").iterdir())
    assert images
    assert {image.name: image.stat().st_size for image in images if image.stat().st_size > 200_000} == {}
