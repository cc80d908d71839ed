"""Benchmarks: which kernel is fastest on this machine, and is it right?

`attnplug bench` from a shell, or from Python, in a notebook or in CI:

    from attnplug import bench
    report = bench.run(bench.Case(heads=32, kv_heads=8, queries=4096, head_size=128, causal=True))
    print(report)
    bench.write(report, "results.html")

Nothing below imports this package, and plotting and page libraries are imported when something is drawn. What measures
is imported when it is first used, and PyTorch with it: comparing two reports needs neither.
"""

import importlib
from typing import TYPE_CHECKING, Any

from attnplug.bench._captured import Cases
from attnplug.bench._cases import Case
from attnplug.bench._ceilings import Ceiling
from attnplug.bench._compare import Change, compare
from attnplug.bench._errors import BenchError
from attnplug.bench._files import read_cases
from attnplug.bench._noise import Noise
from attnplug.bench._records import Record, Timing
from attnplug.bench._report import Report, Standing
from attnplug.bench._sets import SETS, case_set

if TYPE_CHECKING:
    from attnplug.bench._run import run
    from attnplug.bench._write import write

_MEASURES = {"run": "attnplug.bench._run", "write": "attnplug.bench._write"}

__all__ = [
    "SETS",
    "BenchError",
    "Case",
    "Cases",
    "Ceiling",
    "Change",
    "Noise",
    "Record",
    "Report",
    "Standing",
    "Timing",
    "case_set",
    "compare",
    "read_cases",
    "run",
    "write",
]


def __getattr__(name: str) -> Any:
    if name not in _MEASURES:
        raise AttributeError(f"module 'attnplug.bench' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MEASURES[name]), name)
    return value
