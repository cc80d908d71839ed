"""A report as a file: nothing is lost, nothing is hidden, and nothing is loaded from anywhere."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import sys
from dataclasses import replace

import matplotlib.image
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from attnplug import bench
from attnplug.bench import BenchError, Case, Record, Report, Timing


def test_json_holds_all_of_it_and_reads_back_as_the_same(report, tmp_path):
    bench.write(report, tmp_path / "all.json")
    assert Report.read(tmp_path / "all.json") == report
    data = json.loads((tmp_path / "all.json").read_text())
    assert {"cpu", "cores", "threads", "torch", "attnplug", "python", "implementations"} <= set(data["environment"])
    assert data["records"][0]["forward_tflops"] == report.records[0].forward_tflops
    assert data["baseline"] == "torch" and data["ceilings"][0]["dtype"] == "float32"


def test_json_names_neither_the_machine_nor_its_user(report, monkeypatch):
    import getpass
    import platform

    text = json.dumps(report.as_dict())
    assert platform.node() not in text
    assert getpass.getuser() == "root" or getpass.getuser() not in text


def test_csv_has_a_line_for_each_record_with_the_time_and_every_number(report, tmp_path):
    bench.write(report, tmp_path / "all.csv")
    lines = list(csv.DictReader(io.StringIO((tmp_path / "all.csv").read_text())))
    assert len(lines) == len(report)
    for line, record in zip(lines, report, strict=True):
        assert line["created"] == report.created and re.fullmatch(
            r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", line["created"]
        )
        assert (line["impl"], line["status"]) == (record.impl, record.status)
        assert (int(line["queries"]), line["backward"]) == (record.case.queries, str(record.case.backward))
        if record.status == "ran":
            assert float(line["forward_median"]) == record.forward.median
            assert float(line["forward_cold_p80"]) == record.forward_cold.p80
            assert float(line["forward_tflops"]) == record.forward_tflops
            assert int(line["memory"]) == record.memory
            assert line["correct"] == str(record.correct)
        else:
            assert line["forward_median"] == "" and line["reason"] == record.reason


def test_text_has_a_line_for_each_that_ran_and_says_who_did_not(report):
    text = str(report)
    ran = [record for record in report if record.status == "ran"]
    for record in ran:
        (line,) = [
            line for line in text.splitlines() if line.startswith(record.case.name) and f" {record.impl} " in line
        ]
        assert ("WRONG" in line) == (record.correct is False)
        assert (" fastest " in line or " tied " in line) == record.fastest
    assert "on_gpus declined: all: runs on cuda; the call is on cpu" in text
    assert "WRONG results: all_zeros in 3." in text
    assert report.environment["cpu"] in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "is not a report of attnplug bench"),
        ("{}", "is not a report of attnplug bench"),
        ('{"format": 99}', "has format 99; this attnplug reads 1"),
        ('{"format": 1}', "is a damaged report: KeyError"),
    ],
)
def test_a_file_that_is_no_report_is_an_error_that_names_it(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(BenchError, match=re.escape(message)) as caught:
        Report.read(tmp_path / "x.json")
    assert "x.json" in str(caught.value)


def drawn(report, tmp_path):
    bench.write(report, tmp_path / "plots.png")
    pixels = (matplotlib.image.imread(tmp_path / "plots.png")[..., :3] * 255).round().astype(int)
    return {tuple(colour) for colour in pixels.reshape(-1, 3)[::3].tolist()}, pixels.shape


def colour(code):
    return tuple(int(code[at : at + 2], 16) for at in (1, 3, 5))


@pytest.fixture
def plotted(monkeypatch):
    """What matplotlib is asked to plot: axes, horizontal and vertical values, and colour of each line."""
    lines, plot = [], Axes.plot

    def noted(axes, across, up, *style, **look):
        lines.append((axes, list(across), list(up), to_hex(look["color"])))
        return plot(axes, across, up, *style, **look)

    monkeypatch.setattr(Axes, "plot", noted)
    return lines


def test_plots_show_each_implementation_in_its_colour(report, tmp_path, plotted):
    seen, (height, width, _) = drawn(report, tmp_path)
    assert height > 700 and width > 1000
    colours = {line[-1] for line in plotted}
    assert len(report.impls) == 3 == len(colours)
    assert {colour(code) for code in colours} <= seen


def test_plots_of_nothing_are_a_picture_too(report, tmp_path):
    empty = Report(**{**report.__dict__, "records": ()})
    seen, _ = drawn(empty, tmp_path)
    assert (255, 255, 255) in seen


def test_each_point_of_a_plot_is_a_number_of_a_record(report, cases, tmp_path, plotted):
    bench.write(report, tmp_path / "plots.png")
    sweep = [line for line in plotted if line[1] == [case.keys for case in cases[:2]]]
    found = {(axes.get_ylabel(), tuple(up)) for axes, _, up, _ in sweep}
    expected = set()
    for impl in ("torch", "aten_math", "all_zeros"):
        records = [record for case in cases[:2] for record in report.of(case) if record.impl == impl]
        for direction in ("forward", "backward"):
            times = tuple(getattr(record, direction).median * 1e3 for record in records)
            rates = tuple(getattr(record, f"{direction}_tflops") for record in records)
            expected |= {("time, ms", times), ("TFLOP/s", rates)}
        expected.add(("peak memory beyond inputs, MiB", tuple(record.memory / 2**20 for record in records)))
    assert found == expected


def rows_of_plots(report, cases, tmp_path):
    """Return the titles of the rows of plots, and the names of the cases that are drawn each by itself."""
    timing = Timing(1e-3, 1e-3, 1e-3, 3)
    records = tuple(Record(case, "mine", "ran", correct=True, forward=timing, memory=1) for case in cases)
    bench.write(replace(report, records=records), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    titles = [title for title in re.findall("<h3>(.*?)</h3>", page) if title != "Single cases"]
    _, _, single = page.partition("<h3>Single cases</h3>")
    texts = re.findall("<text[^>]*>(.*?)</text>", single.partition("</svg>")[0])
    return titles, [case.name for case in cases if html.escape(case.name) in texts]


def test_cases_that_differ_in_length_alone_are_one_row_of_plots(report, tmp_path):
    by_length = [Case(queries=length, head_size=size) for size in (8, 16) for length in (64, 32)]
    same_tokens = [Case(batch=64 // length, queries=length, head_size=24) for length in (16, 32)]
    decode = [Case(queries=1, keys=length, batch=batch) for batch in (1, 2) for length in (32, 64)]
    single = [Case(queries=5, keys=7)]
    titles, alone = rows_of_plots(report, [*by_length, *same_tokens, *decode, *single], tmp_path)
    assert sorted(titles) == [
        "B1 H8 D16 float32",
        "B1 H8 D64 float32 Sq1",
        "B1 H8 D8 float32",
        "B2 H8 D64 float32 Sq1",
        "B4 to 2 H8 D24 float32",
    ]
    assert alone == [single[0].name]


def test_cases_of_equal_length_and_shape_are_no_line(report, tmp_path):
    twins = [Case(name=name, queries=8) for name in ("one", "another")]
    assert rows_of_plots(report, twins, tmp_path) == ([], ["one", "another"])


def test_the_page_loads_nothing_and_holds_the_report(report, tmp_path):
    bench.write(report, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!#)|url\((?!#)""", page) and "@import" not in page
    used = set(re.findall(r"""(?:href="#|url\(#)([^")]+)""", page))
    assert used and all(page.count(f' id="{name}"') == 1 for name in used)
    (embedded,) = re.findall(r'<script type="application/json" id="report">(.*?)</script>', page, re.DOTALL)
    assert Report.from_dict(json.loads(embedded)) == report
    assert "<masked" not in page and "&lt;masked &amp; alone&gt;" in page


@pytest.mark.parametrize("name", ["report.txt", "report", "report.jpg"])
def test_a_name_that_ends_in_nothing_known_is_an_error(report, tmp_path, name):
    with pytest.raises(BenchError, match=r"expected a file that ends in \.json, \.csv, \.png, \.html"):
        bench.write(report, tmp_path / name)


def test_a_place_that_cannot_be_written_is_an_error(report, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="cannot be written"):
        bench.write(report, tmp_path / "file" / "x.json")


@pytest.mark.parametrize(("name", "library"), [("x.png", "matplotlib"), ("x.html", "jinja2")])
def test_a_missing_library_is_an_error_with_the_way_to_get_it(report, tmp_path, monkeypatch, name, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BenchError, match=rf"needs {library}, not installed; pip install 'attnplug\[bench\]'"):
        bench.write(report, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_library_that_is_installed_but_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "yaml.py").write_text("import no_such_module_at_all\n")
    (tmp_path / "cases.yaml").write_text("[]")
    monkeypatch.delitem(sys.modules, "yaml", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        bench.read_cases(tmp_path / "cases.yaml")
