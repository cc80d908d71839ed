"""A headless browser, where there is one: what a page looks like can only be asked of something that lays it out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")
PROGRAM = next(filter(None, map(shutil.which, PROGRAMS)), None)
LOOKS = [(width, scheme) for width in (1280, 400) for scheme in ("light", "dark")]
"""Widths in pixels, of a desktop's window and a phone, and the two colour schemes."""

needs_browser = pytest.mark.skipif(PROGRAM is None, reason=f"needs a browser, one of {', '.join(PROGRAMS)}")

# Elements with text that reach beyond the window and cannot be scrolled to within an element of their own.
_CLIPPED = """
() => {
  const inside = element => {
    for (let parent = element.parentElement; parent; parent = parent.parentElement) {
      if (getComputedStyle(parent).overflowX !== "visible" && parent !== document.body) return true;
    }
    return false;
  };
  const text = element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  return [...document.body.querySelectorAll("*")]
    .filter(element => text(element) && element.checkVisibility() && !inside(element))
    .filter(element => { const box = element.getBoundingClientRect(); return box.width && box.right > innerWidth + 1; })
    .map(element => element.textContent.trim().slice(0, 60));
}
"""


@contextmanager
def browser() -> Iterator[Any]:
    """Start the browser."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven with playwright")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@contextmanager
def shown(started: Any, page: Path | str, width: int = 1280, scheme: str = "light", height: int = 900) -> Iterator[Any]:
    """Show a page; what it writes to the console as an error fails the test."""
    context = started.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    tab = context.new_page()
    tab.set_default_timeout(60_000)  # of what never comes; a loaded machine takes its time
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(page.as_uri() if isinstance(page, Path) else page)
    yield tab
    context.close()
    assert errors == []


def overflow(tab: Any) -> int:
    """Return by how many pixels the page is wider than its window."""
    return int(tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def clipped(tab: Any) -> list[str]:
    """Return texts that reach beyond the window, where no element around them scrolls."""
    return list(tab.evaluate(_CLIPPED))


def contrast(tab: Any, selector: str) -> float:
    """Return the contrast of an element's text and what lies behind it, as WCAG 2 defines it: 4.5 is readable."""
    colours = tab.evaluate(
        """selector => {
          const element = document.querySelector(selector);
          const back = element => getComputedStyle(element).backgroundColor;
          let behind = element;
          while (behind && /, 0\\)|transparent/.test(back(behind))) behind = behind.parentElement;
          return [getComputedStyle(element).color, behind ? back(behind) : "rgb(255, 255, 255)"];
        }""",
        selector,
    )
    first, second = sorted((_luminance(each) for each in colours), reverse=True)
    return (first + 0.05) / (second + 0.05)


def _luminance(colour: str) -> float:
    channels = [float(each) / 255 for each in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (each / 12.92 if each <= 0.03928 else ((each + 0.055) / 1.055) ** 2.4 for each in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
