"""PyTorch's own tests of attention, run with the drop-in in place, and held against what they give without it.

    python tests/support/pytorch_tests.py test_transformers.py [--impl aten_flash ...] [-k TestSDPACpuOnly]

The file is PyTorch's `test/test_transformers.py`, or a copy of it; it is part of no package, so it must be fetched from
the sources of the PyTorch version that is installed. Without `--impl` only `patch_torch()` is in place, and every test
must end as it does without. With `--impl` the implementation is activated, and what ends otherwise must be one of
`DIFFERENCES`. Status 1 where something else does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import forked

SAMPLED = 30  # of a test that is parametrized so often that running all would take an hour
PATCH = "patch"
_WANTED, _RESULTS = "DROP_IN_TESTS_WITH", "DROP_IN_TESTS_RESULTS"
_outcomes: dict[str, str] = {}


class Difference(NamedTuple):
    """Tests that end otherwise while an implementation is active, and why: what `docs/concepts.md` says of it."""

    tests: str  # a pattern that their names match
    why: str
    impls: tuple[str, ...] = ()  # all if empty


DIFFERENCES = (
    Difference("test_scaled_dot_product_attention_.*_causal_attn_mask_", "is_causal with attn_mask is computed"),
    Difference("test_(disable|mask_check)_fastpath", "the fast path stands aside"),
    Difference("test_transformerencoder_fastpath_.*_use_autocast_True", "passes, because the fast path stands aside"),
    Difference("test_scaled_dot_product_attention_.*_dropout_p_0_[25]", "dropout draws other numbers", ("math_ref",)),
    Difference("test_transformerencoderlayer_subclass", "dropout draws other numbers", ("math_ref",)),
    Difference("test_cpu_flash_attn_nan_propagation", "flex_attention hides NaN on the CPU", ("flex",)),
)


def pytest_configure(config: Any) -> None:
    wanted = os.environ[_WANTED]
    if wanted:
        import attnplug

        attnplug.patch_torch()
        if wanted != PATCH:
            attnplug.activate_flash_attention_impl(wanted)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Keep an even sample of the tests that are parametrized most."""
    families: dict[str, list[Any]] = {}
    for item in items:
        families.setdefault("_".join(item.name.split("_")[:6]), []).append(item)
    kept = [item for family in families.values() for item in family[:: max(1, len(family) // SAMPLED)]]
    items[:] = kept


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.nodeid.partition("::")[2]] = report.outcome


def pytest_sessionfinish() -> None:
    Path(os.environ[_RESULTS]).write_text(json.dumps(_outcomes))


@cache
def outcomes(path: Path, wanted: str, selected: str = "") -> dict[str, str]:
    """Return how each test of the file ends with `wanted` (nothing, `patch`, or an implementation) in place."""
    with tempfile.NamedTemporaryFile(suffix=".json") as results:
        environment = os.environ | {
            _WANTED: wanted,
            _RESULTS: results.name,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        }
        options = ["-q", "-p", "pytorch_tests", "-p", "no:randomly", "-p", "no:cacheprovider", "-W", "ignore"]
        select = ["-k", selected] if selected else []
        command = [forked.python(), "-m", "pytest", str(path), "-n0", "--no-header", "--tb=no", *options, *select]
        subprocess.run(command, env=environment, cwd=path.parent, stdout=subprocess.DEVNULL, check=False)
        return json.loads(Path(results.name).read_text())


def differences(path: Path, wanted: str, selected: str = "") -> dict[str, str]:
    """Return what is said of each test that ends otherwise with `wanted` in place, and how; "" where nothing is."""
    without, found = outcomes(path, "", selected), outcomes(path, wanted, selected)
    sys.stdout.write(f"{wanted}: {dict(Counter(found.values()))}; without: {dict(Counter(without.values()))}\n")
    changed = {test: end for test, end in found.items() if without.get(test) != end}
    return {f"{test}: {without.get(test)} without, {end} with it": _why(test, wanted) for test, end in changed.items()}


def _why(test: str, wanted: str) -> str:
    if wanted == PATCH:
        return ""
    known = (each for each in DIFFERENCES if re.search(each.tests, test) and wanted in (each.impls or (wanted,)))
    return next((each.why for each in known), "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--impl", nargs="*", default=[], help="implementations to activate, besides the bare patch")
    parser.add_argument("-k", dest="selected", default="", help="as pytest's -k")
    arguments = parser.parse_args()
    forked.listen()
    unknown = 0
    for wanted in (PATCH, *arguments.impl):
        for test, why in differences(arguments.path.resolve(), wanted, arguments.selected).items():
            unknown += not why
            sys.stdout.write(f"{wanted}: {test} ({why or 'NOT KNOWN'})\n")
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
