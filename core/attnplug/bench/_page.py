"""One page that can be sent to a colleague: table, plots and the numbers themselves, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import json
from importlib.resources import files

from attnplug.bench._plots import picture
from attnplug.bench._records import RAN
from attnplug.bench._report import Report
from attnplug.bench._text import HEADERS, reasons, row


def page(report: Report) -> str:
    """Return the report as one HTML document."""
    import jinja2

    template = files("attnplug.bench").joinpath("page.html.jinja").read_text(encoding="utf-8")
    compiled = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    return compiled.render(
        report=report,
        headers=HEADERS,
        lines=[(record, row(record)) for record in report.records if record.status == RAN],
        reasons=reasons(report.records),
        conclusions=report.conclusions(),
        plots=base64.b64encode(picture(report, "svg")).decode("ascii"),
        data=_embedded(report),
    )


def _embedded(report: Report) -> str:
    """Return the report's JSON so that nothing in it can end the element that holds it."""
    return json.dumps(report.as_dict()).replace("<", "\\u003c")
