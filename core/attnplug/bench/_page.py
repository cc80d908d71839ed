"""One page that can be sent to a colleague: summary, table, plots and the numbers, nothing loaded from anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from attnplug.bench._figures import rows_of_plots
from attnplug.bench._plots import looks
from attnplug.bench._records import RAN, Record
from attnplug.bench._report import Report
from attnplug.bench._text import HEADERS, filled, reasons, row, standing_row

_ORDER = ("verdict", "implementation", "case")  # come first; the others keep their order
_VERDICTS = ("fastest", "tied", "right", "WRONG")
_LARGE_IS_GOOD = ("TFLOP/s", "of ceiling")
_SAYS = {
    "fastest": "cases in which it is the fastest, beyond the noise",
    "tied": "cases in which the noise does not tell it from the fastest",
    "right": "cases with a right result",
    "ran": "cases that it takes",
}


@dataclass(frozen=True)
class Column:
    """A column of the results.

    Attributes:
        title: what stands above it.
        kind: `text` or `number`.
        first: the order that a first click gives: `ascending`, or `descending` where large is good.
        at: its place in `HEADERS`.
    """

    title: str
    kind: str
    first: str
    at: int


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and the number or text that it is sorted by; an empty one stands for nothing measured."""

    text: str
    key: str


def page(report: Report) -> str:
    """Return the report as one HTML document."""
    import jinja2

    template = files("attnplug.bench").joinpath("page.html.jinja").read_text(encoding="utf-8")
    compiled = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    columns = _columns(report)
    ran = [record for record in report.records if record.status == RAN]
    return compiled.render(
        report=report,
        columns=columns,
        lines=[(report.verdict(record), _cells(report, record, columns)) for record in ran],
        standings=[standing_row(standing) for standing in report.standings()],
        says=_SAYS,
        reasons=reasons(report.records),
        conclusions=report.conclusions(),
        looks=looks(report),
        backward=any(case.backward for case in report.cases),
        plots=rows_of_plots(report),
        facts=list(_facts({**report.environment, **report.settings})),
        data=json.dumps(report.as_dict()).replace("<", "\\u003c"),  # nothing in it can end the element that holds it
    )


def _columns(report: Report) -> list[Column]:
    shown = [HEADERS[at] for at in filled(report.lines())]
    ordered = [*_ORDER, *(title for title in shown if title not in _ORDER)]
    return [
        Column(
            title,
            "text" if title in _ORDER else "number",
            "descending" if title in _LARGE_IS_GOOD else "ascending",
            HEADERS.index(title),
        )
        for title in ordered
    ]


def _cells(report: Report, record: Record, columns: list[Column]) -> list[Cell]:
    verdict = report.verdict(record)
    texts = row(record, verdict)
    place = report.cases.index(record.case)
    keys: dict[str, Any] = {
        "verdict": _VERDICTS.index(verdict),
        "case": place,
        "implementation": record.impl,
        "ratio": record.ratio,
        "forward": record.forward and record.forward.median,
        "backward": record.backward and record.backward.median,
        "fwd cold": record.forward_cold and record.forward_cold.median,
        "bwd cold": record.backward_cold and record.backward_cold.median,
        "TFLOP/s": record.forward_tflops,
        "of ceiling": record.forward_share,
        "memory": record.memory,
    }
    return [Cell(texts[column.at], _key(keys[column.title])) for column in columns]


def _key(value: Any) -> str:
    return "" if value is None else str(value)


def _facts(given: dict[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the environment's entries, those of mappings and lists each by itself, without what is not known."""
    for name, value in given.items():
        if isinstance(value, dict):
            yield from _facts(value, f"{name}: ")
        elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
            for each in value:
                yield from _facts(each, f"{name}: ")
        elif value is not None:
            said = ", ".join(map(str, value)) if isinstance(value, list) else value
            yield f"{within}{name}".replace("_", " "), said
