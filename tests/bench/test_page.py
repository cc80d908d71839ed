"""The page as a browser shows it: its numbers are those of the JSON, and clicking a heading sorts by them."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from attnplug import bench

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
UNITS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"needs a browser, one of {', '.join(BROWSERS)}")


def shown(page: Path, tmp_path: Path) -> str:
    """Return the document after its scripts have run."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout


def table(document: str) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of the results."""
    (found,) = re.findall(r'<table id="results">(.*?)</table>', document, re.DOTALL)
    headers, *rows = [
        [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in re.findall(r"<tr.*?</tr>", found, re.DOTALL)
    ]
    return headers, rows


def number(text: str) -> float:
    value, _, unit = text.partition(" ")
    return float(value) * UNITS[unit]


def test_the_numbers_in_a_browser_are_those_of_the_json(report, tmp_path):
    bench.write(report, tmp_path / "page.html")
    bench.write(report, tmp_path / "all.json")
    records = [each for each in json.loads((tmp_path / "all.json").read_text())["records"] if each["status"] == "ran"]
    document = shown(tmp_path / "page.html", tmp_path)
    headers, rows = table(document)
    assert len(rows) == len(records)
    for cells, record in zip(rows, records, strict=True):
        row = dict(zip(headers, cells, strict=True))
        assert (row["case"], row["implementation"]) == (record["case"]["name"], record["impl"])
        assert row["correct"] == ("yes" if record["correct"] else "WRONG")
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
    assert "on_gpus, declined: all" in document and "runs on cuda; the call is on cpu" in document


@pytest.mark.parametrize("header", ["forward", "memory", "ratio"])
def test_a_click_on_a_heading_sorts_by_the_number_not_by_its_text(report, tmp_path, header):
    bench.write(report, tmp_path / "page.html")
    headers, rows = table((tmp_path / "page.html").read_text())
    column = headers.index(header)
    page = tmp_path / "clicked.html"
    click = f'<script>document.querySelectorAll("#results th")[{column}].click()</script></body>'
    page.write_text((tmp_path / "page.html").read_text().replace("</body>", click))
    _, after = table(shown(page, tmp_path))

    def key(row: list[str]) -> float:
        return float(row[column]) if header == "ratio" else number(row[column])

    assert [key(row) for row in after] == sorted(map(key, rows))


def test_plots_are_shown(report, tmp_path):
    bench.write(report, tmp_path / "page.html")
    title = "document.title = `wide ${document.images[0].naturalWidth}`"
    probe = f"<script>document.images[0].decode().then(() => {title})</script></body>"
    page = tmp_path / "probed.html"
    page.write_text((tmp_path / "page.html").read_text().replace("</body>", probe))
    assert int(re.findall(r"<title>wide (\d+)</title>", shown(page, tmp_path))[0]) > 500
