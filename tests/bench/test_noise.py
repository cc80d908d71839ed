"""What disturbs a run is measured and said, and differences within it are ties.

What looks at the machine, and what ranks records, is private: `bench.run` would give both a noise that no test knows.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from attnplug import bench
from attnplug.bench import Case, Noise, Record, Report, Timing
from attnplug.bench._noise import Watch
from attnplug.bench._records import ranked
from attnplug.cli import main

CASE = Case(heads=2, queries=8, head_size=8)


class Slowing:
    """A clock on which each look takes longer than the one before."""

    buffer_bytes = 0

    def __init__(self, *seconds: float) -> None:
        self.left = [each for each in seconds for _ in range(3)]

    def warm(self, call, calls):
        return self.left.pop(0)


def test_a_processor_that_slows_down_is_noticed():
    watch = Watch({"cpu": Slowing(1.0, 1.1, 1.3)})
    for _ in range(3):
        watch.look("cpu")
    noise = watch.found()
    assert noise.drift["cpu"] == pytest.approx(0.3)
    assert noise.loud and "the pace of cpu changed by 30%" in str(noise)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not say what their processors do")
def test_other_programs_are_noticed_and_ones_own_work_is_not():
    def busy(seconds: float) -> str:
        return f"import time\nend = time.time() + {seconds}\nwhile time.time() < end: pass"

    watch = Watch({})
    exec(busy(0.5))
    alone = watch.found().others
    if alone is None:
        pytest.skip("this system's counters stand still")
    watch = Watch({})
    subprocess.run([sys.executable, "-c", busy(0.5)], check=True)
    disturbed = watch.found().others
    assert disturbed > 0.4, "another program kept a processor busy for most of this time"
    assert Noise(disturbed, 2).loud and f"kept {disturbed:.1f} of 2 cores busy" in str(Noise(disturbed, 2))


def test_only_a_quiet_run_of_steady_pace_is_not_called_loud():
    assert not Noise(0.1, 8, {"cpu": 0.02}).loud and Noise(0.1, 8, {"cpu": 0.06}).loud
    assert "quiet machine" not in str(Noise(0.1, 8, {"cpu": 0.02}))


def test_a_report_says_its_noise_and_keeps_it_in_a_file(report, tmp_path):
    bench.write(report, tmp_path / "r.json")
    assert Report.read(tmp_path / "r.json").noise == report.noise
    assert set(report.noise.drift) == {"cpu"} and report.noise.drift["cpu"] >= 0
    assert "Noise: a time measured again differs by " in str(report) and str(report.noise) in str(report)


def test_a_comparison_says_which_run_was_disturbed(report, tmp_path, capsys):
    loud, quiet = str(tmp_path / "loud.json"), str(tmp_path / "quiet.json")
    bench.write(replace(report, noise=Noise(2.0, 4)), loud)
    bench.write(replace(report, noise=Noise(0.0, 4)), quiet)
    assert main(["bench", "compare", quiet, loud]) == 0
    assert "noise now: other programs kept 2.0 of 4 cores busy" in capsys.readouterr().out
    assert main(["bench", "compare", quiet, quiet]) == 0
    assert "noise" not in capsys.readouterr().out.replace("beyond noise", "")


def test_measuring_again_is_judged_from_every_other_sample():
    assert Timing.of([1.0, 2.0, 1.0, 2.0, 1.0, 2.0]).again == pytest.approx(1 / 1.5)
    assert Timing.of([1.0, 1.0, 2.0, 2.0, 1.0, 1.0]).again == 0
    assert Timing.of([1.0]).again == 0


def made(impl: str, *seconds: float, case: Case = CASE) -> Record:
    return Record(case, impl, "ran", correct=True, forward=Timing.of(seconds))


def fastest(*records: Record) -> list[str]:
    return [record.impl for record in ranked(records, "a") if record.fastest]


STEADY = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


def test_a_winner_is_alone_only_beyond_the_noise():
    assert fastest(made("a", *STEADY), made("b", *(1.2 * each for each in STEADY))) == ["a"]
    ranges_meet = made("b", 0.9, 0.9, 1.2, 1.2, 1.2, 1.2)
    assert fastest(made("a", *STEADY), ranges_meet) == ["a", "b"]


def test_a_difference_below_that_of_the_whole_run_is_a_tie():
    elsewhere = CASE.but(queries=16)
    unsteady = [made(impl, 1.0, 1.5, 1.0, 1.5, 1.0, 1.5, case=elsewhere) for impl in ("a", "b", "c")]
    close = made("b", *(1.2 * each for each in STEADY))
    assert fastest(made("a", *STEADY), close) == ["a"]
    assert fastest(made("a", *STEADY), close, *unsteady)[:2] == ["a", "b"]


def test_of_few_samples_the_whole_range_counts():
    assert (Timing.of([1.0, 2.0, 3.0]).p20, Timing.of([1.0, 2.0, 3.0]).p80) == (1.0, 3.0)


def test_several_of_the_fastest_are_tied_and_the_summary_counts_them(report):
    other = CASE.but(queries=16)
    records = ranked(
        [
            made("a", *STEADY),
            made("b", *STEADY),
            replace(made("c", *STEADY), correct=False),
            made("a", *(4 * each for each in STEADY), case=other),
            made("b", *STEADY, case=other),
        ],
        "a",
    )
    made_of = Report(tuple(records), report.environment, (), "a", report.created)
    assert [made_of.verdict(record) for record in records] == ["tied", "tied", "WRONG", "right", "fastest"]
    standings = {one.impl: one for one in made_of.standings()}
    assert list(standings) == ["b", "a", "c"]
    assert (standings["b"].alone, standings["b"].tied, standings["b"].ran) == (1, 1, 2)
    assert standings["b"].ratio == pytest.approx(0.5)  # the geometric mean of 1 and 1/4
    assert (standings["c"].right, standings["c"].ran, standings["c"].ratio) == (0, 1, None)


def test_shrunk_cases_crown_nobody_and_say_so():
    report = bench.run(Case(queries=128), ["torch", "aten_math"], seconds=0.002, tiny=True)
    assert [case.queries for case in report.cases] == [2]
    assert not any(record.fastest for record in report)
    assert report.conclusions()[0].endswith("the times mean nothing, and none is called the fastest.")
