"""A report as a file, in the form that the file's name asks for; and whether it can be written, asked before."""

from __future__ import annotations

import csv
import io
import json
import re
from datetime import datetime, timezone
from pathlib import Path

from attnplug._arguments import as_path, expect
from attnplug.bench._errors import BenchError, needed
from attnplug.bench._report import Report

_LIBRARIES = {".json": (), ".csv": (), ".png": ("matplotlib",), ".html": ("matplotlib", "jinja2")}


def write(report: Report, path: str | Path) -> None:
    """Write a report.

    Args:
        report: what `run` returned.
        path: a name that ends in `.json` (all of it, with the environment), `.csv` (one line a record), `.html`
            (one page with table and plots, nothing beside it) or `.png` (the plots).

    Raises:
        BenchError: the name ends otherwise, a library is missing, or the file cannot be written.
    """
    expect("report", report, Report, "a Report, as run() returns")
    path = as_path("path", path)
    check_kind(path)
    try:
        path.write_bytes(_content(report, path.suffix.lower()))
    except OSError as error:
        raise BenchError(f"{path}: cannot be written: {error.strerror}") from error


def _content(report: Report, suffix: str) -> bytes:
    if suffix == ".json":
        return (json.dumps(report.as_dict(), indent=1) + "\n").encode()
    if suffix == ".csv":
        return _csv(report).encode()
    if suffix == ".png":
        from attnplug.bench._plots import picture

        return picture(report)
    from attnplug.bench._page import page

    return page(report).encode()


def _csv(report: Report) -> str:
    rows = report.rows()
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def ready(path: str, device: str) -> Path:
    """Return the path that results can be written to, before anything is measured.

    A folder that is spelled out must exist; those whose names are filled in are made.

    `{device}` in it stands for the name of the device, such as `nvidia-h200`, `{time}` for now, in UTC.

    Raises:
        BenchError: it cannot be written, or a library that it takes is missing.
    """
    now = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    filled = "{" in str(Path(path).parent)
    if "{device}" in path:
        from attnplug.bench._environment import device_name  # and PyTorch, which a wrong name need not wait for

        path = path.replace("{device}", _slug(device_name(device)))
    place = Path(path.replace("{time}", now))
    check_kind(place)
    new = not place.exists()
    try:
        if filled:
            place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("ab"):
            pass
        if new:
            place.unlink()
    except OSError as error:
        raise BenchError(f"{place}: cannot be written: {error.strerror}") from error
    return place


def check_kind(path: Path) -> None:
    """Raise unless the name of a file says a form that can be written here.

    Raises:
        BenchError: it ends otherwise, or a library is missing.
    """
    suffix = path.suffix.lower()
    if suffix not in _LIBRARIES:
        raise BenchError(f"{path}: expected a file that ends in {', '.join(_LIBRARIES)}")
    for library in _LIBRARIES[suffix]:
        needed(library, f"writing {path}")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
