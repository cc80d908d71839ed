"""Run every benchmark, each in an interpreter of its own, and report what is over its limit.

`python benchmarks/run.py [--json FILE]`; each can also be run alone: `python benchmarks/calls.py`. The exit
status is 1 if a limit is exceeded. Measure on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import harness

PROGRAMS = (
    "calls",
    "choices",
    "registered",
    "decoding",
    "scopes",
    "compiled",
    "encoder",
    "startup",
    "discovery",
    "memory",
    "launching",
    "parallel",
    "watching",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_options(parser)
    parser.add_argument("programs", nargs="*", choices=[[], *PROGRAMS], help=f"some of {', '.join(PROGRAMS)}")
    arguments = parser.parse_args()
    results: list[harness.Result] = []
    failed = []
    for program in arguments.programs or PROGRAMS:
        print(f"\n{program}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "results.json")
            command = [sys.executable, str(Path(__file__).with_name(f"{program}.py")), "--json", str(path)]
            subprocess.run(command + ["--quick"] * arguments.quick)
            if path.exists():
                results += harness.from_json(path.read_text())
            else:
                failed.append(program)
    over = [result.name for result in results if result.verdict == "OVER"]
    print(f"\nover the limit: {'; '.join(over) or 'nothing'}")
    if failed:
        print(f"did not end well: {', '.join(failed)}")
    if arguments.json is not None:
        arguments.json.write_text(harness.as_json(results))
    return int(bool(over or failed))


if __name__ == "__main__":
    sys.exit(main())
