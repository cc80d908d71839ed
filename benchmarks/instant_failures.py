"""A plugin of pytest for `gpu.py`: writes why each test failed when it fails, for a run may be ended before its end.

    PYTHONPATH=benchmarks python -m pytest -p instant_failures --failures FILE

A line of JSON for each failure, of a test or of what is around it: `test`, `when`, and in `reason` all that pytest
tells. In a run that is spread over processes, the one that collects their reports writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


class _Failures:
    def __init__(self, file: Path) -> None:
        self.file = file
        file.write_text("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._tell(report, report.when)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._tell(report, "collect")

    def _tell(self, report: Any, when: str | None) -> None:
        if report.failed:
            told = {"test": report.nodeid, "when": when, "reason": report.longreprtext}
            with self.file.open("a") as file:
                file.write(json.dumps(told) + "\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--failures", metavar="FILE", type=Path, help="where to write why tests failed, as they do")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--failures")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Failures(file), "instant failures")
