"""The plots as elements of a page: text that follows the page's font and colours, and a tooltip at each point."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from attnplug.bench._cases import Case
from attnplug.bench._plots import PANELS, Panel, draw_dots, draw_lines, groups, looks, points, rows_height
from attnplug.bench._records import Record
from attnplug.bench._report import Report
from attnplug.bench._text import seconds, size

_INK = "#010203"  # stands for the page's own colour of text, in what matplotlib draws
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_WIDTH, _HEIGHT = 4.4, 3.1


@dataclass(frozen=True)
class Row:
    """Plots side by side of the same cases.

    Attributes:
        title: what the cases have in common.
        plots: an SVG element each.
    """

    title: str
    plots: list[str]


def rows_of_plots(report: Report) -> list[Row]:
    """Return a row for each group of cases that differ in length alone, and one for those that are by themselves."""
    sweeps, singles = groups(report.cases)
    rows = [
        Row(title, [_svg(report, cases, panel, number, at, single=False) for at, panel in enumerate(PANELS)])
        for number, (title, cases) in enumerate(sweeps.items())
    ]
    if singles:
        plots = [_svg(report, singles, panel, len(rows), at, single=True) for at, panel in enumerate(PANELS)]
        rows.append(Row("Single cases", plots))
    return rows


def _svg(report: Report, cases: list[Case], panel: Panel, number: int, at: int, single: bool) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    height = rows_height(report, cases) if single else _HEIGHT
    inks = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    settings: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"{number}-{at}",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(inks | settings):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        ax = figure.subplots()
        draw = draw_dots if single else draw_lines
        draw(ax, report, cases, panel, looks(report))
        ax.set_title(panel.title, fontsize=10, loc="left")
        for axis in ax.xaxis, ax.yaxis:
            axis.label.set_visible(axis.label.get_text() != panel.title)
        buffer = io.BytesIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _inline(buffer.getvalue(), _tips(report, cases, panel), f"p{number}-{at}-", panel.title)


def _tips(report: Report, cases: list[Case], panel: Panel) -> dict[str, list[str]]:
    """Return for each line, by the id that it was given, what its points say."""
    return {
        f"{impl} {direction}": [_tip(record, direction, panel) for record in records]
        for impl, direction, records in points(report, cases, panel)
    }


def _tip(record: Record, direction: str, panel: Panel) -> str:
    value = panel.value(record, direction)
    assert value is not None
    if panel is PANELS[0]:
        said = seconds(value / 1e3)
    elif panel is PANELS[1]:
        said = f"{value:.3g} TFLOP/s"
    else:
        said = size(value * 2**20)
    what = f", {direction}" if record.case.backward and len(panel.directions) > 1 else ""
    return f"{record.impl}{what}: {said}\n{record.case.name}"


def _inline(drawn: bytes, tips: dict[str, list[str]], prefix: str, label: str) -> str:
    """Return what matplotlib drew as an element that a page can hold many of."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(drawn)
    for name in ("width", "height"):
        del root.attrib[name]
    root.set("role", "img")
    root.set("aria-label", label)
    for group in list(root.iter(f"{{{_SVG}}}g")):
        found = tips.get(group.get("id", ""))
        if found is not None:
            for mark, tip in zip(_marks(group), found, strict=True):
                ElementTree.SubElement(mark, f"{{{_SVG}}}title").text = tip
    text = ElementTree.tostring(root, encoding="unicode").replace(_INK, "currentColor")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    return _only_used_ids(text, prefix)


def _marks(group: ElementTree.Element) -> Iterator[ElementTree.Element]:
    """Return the markers of a line: the elements that use its one shape."""
    return group.iter(f"{{{_SVG}}}use")


def _only_used_ids(text: str, prefix: str) -> str:
    """Keep the ids that something in the picture refers to, made distinct from those of the page's other pictures."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", text)
