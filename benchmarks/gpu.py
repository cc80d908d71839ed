"""Everything that needs a GPU, in one run of under 8 minutes: `make gpu`, or `make gpu PART=conformance` for one part.

Each part is a process of its own with a time limit, writes its results as they come to benchmarks/results/<GPU>/, and
is ended when its time is over. The summary comes in any case: after a part that hangs, after Ctrl-C, when the whole is
ended from outside. Parts that measure times run alone, after the others. `--rehearse` starts every part on the CPU, cut
down to what can be seen there: that it starts, and that its results and summary come.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT, GRACE = 465.0, 6.0
"""Seconds for the whole, and those that a part has to write what it has, once its time is over."""


CACHE = {"TRITON_CACHE_DIR": str(Path.home() / ".triton" / "cache")}
"""Triton's own default, said: else Inductor says another, and what one part compiled another would compile again."""


@dataclass(frozen=True)
class Part:
    """One part of the run.

    Attributes:
        name: what `--part` takes, and its files are named after.
        claim: what it shows.
        command: the process.
        limit: seconds that it has.
        told: from its log, the lines of the summary.
        environment: variables that it has besides.
    """

    name: str
    claim: str
    command: list[str]
    limit: float
    told: Callable[[Path], Iterable[str]]
    environment: dict[str, str] = field(default_factory=dict)


def parts(folder: Path, implementations: list[str], rehearsal: bool = False) -> list[Part]:
    """Return the parts, those that may share the machine first; of a rehearsal, each cut down to what a CPU can do."""
    workers = "2" if rehearsal else str(min(16, os.cpu_count() or 1))  # what they do most is to compile
    device = ["--device", "cpu" if rehearsal else "cuda"]
    triton = "aten_flash" if rehearsal else "flash_triton"
    others = [name for name in implementations if name != triton]
    clocks = ["-v", "-m", "gpu", CLOCKS]
    found = [
        checks(folder, "conformance", f"every check of {', '.join(others)}", others, 52.0, workers, device),
        tests(folder, "tests", "the tests marked gpu", ["-n", workers], pytest_arguments(), 88.0, rehearsal),
        tests(folder, "clocks", "the tests of times, with nothing beside them", [], clocks, 10.0, rehearsal),
        *(benchmark(folder, name, claim, limit, rehearsal) for name, claim, limit in BENCHMARKS),
        figures(folder, implementations, device, rehearsal),
    ]
    if triton in implementations:
        claim = f"every check of {triton} in full, of features three at once, on Hopper on its own kernels"
        full = [triton, "--full", *([] if rehearsal else but_pairs())]
        found.insert(0, checks(folder, triton, claim, full, 160.0, workers, device))
        claim = f"{triton} with the plain kernels alone, which the part before has for float32"
        plain = checks(folder, "plain", claim, [triton, "--dtype", "bfloat16"], 24.0, workers, device)
        found.insert(2, replace(plain, environment={"FLASH_TRITON_HOPPER": "0"}))
    return [replace(part, limit=part.limit * SLOWER) for part in found] if rehearsal else found


CLOCKS = "tests/bench/test_clocks.py"
COLD = 2
"""How much longer a part that was asked for may take: it compiles what parts before it would have compiled.

`launching` has 38 s. Without packed sequences it takes 38 where all is to be compiled, half of it for that; with them
it makes about 8 s of calls more, and compiles about as many kernels again. After the part of flash_triton, which runs
most of the same kernels, that is 19 + 8 s and what is left to compile; alone 38 + 8 + 19, and it has 76.
"""
BENCHMARKS = (
    ("launching", "what a call costs on the host", 38.0),
    ("forward", "forward and decoding beside PyTorch's kernels and FlashAttention", 43.0),
    ("backward", "backward beside cuDNN's", 20.0),
)
FEW_CHECKS = ["--only", "check_values", "--only", "check_causal"]
TIMEOUT = "100"
"""Seconds that a check has: with all cores at work the longest takes a third."""
SLOWER = 4
"""How much longer parts may take in a rehearsal, which may have few cores."""


def checks(folder: Path, name: str, claim: str, what: list[str], limit: float, workers: str, device: list[str]) -> Part:
    """Return a part that runs the conformance kit."""
    found = folder / f"{name}.jsonl"
    few = FEW_CHECKS + ([] if "--dtype" in what else ["--dtype", "float32"]) if "cpu" in device else []
    command = [sys.executable, "-m", "attnplug", "check", *what, *device, *few, "--workers", workers]
    return Part(
        name, claim, [*command, "--timeout", TIMEOUT, "--output", str(found)], limit, lambda log: told_by_checks(found)
    )


def but_pairs() -> list[str]:
    """Return the arguments for all checks but that of two features and no other: that of three has every two."""
    from attnplug.testing import all_checks

    names = [check.name for check in all_checks() if check.name != "check_feature_pairs"]
    return [argument for name in names for argument in ("--only", name)]


def tests(
    folder: Path, name: str, claim: str, spread: list[str], arguments: list[str], limit: float, rehearsal: bool
) -> Part:
    """Return a part that runs tests marked gpu, which a rehearsal only collects."""
    spread = spread if importlib.util.find_spec("xdist") is not None else []
    few = ["--collect-only", "-q"] if rehearsal else []
    failures = ["-p", "instant_failures", "--failures", str(folder / f"{name}.jsonl")]
    path = os.pathsep.join(filter(None, (str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pytest", *failures, *spread, *arguments, *few]
    return Part(name, claim, command, limit, told_by_pytest, {"PYTHONPATH": path})


def benchmark(folder: Path, name: str, claim: str, limit: float, rehearsal: bool) -> Part:
    """Return a part that runs a benchmark of this folder."""
    command = [sys.executable, f"benchmarks/{name}.py", "--json", str(folder / f"{name}.json")]
    return Part(name, claim, [*command, *(["--quick"] if rehearsal else [])], limit, told_as_it_is)


def figures(folder: Path, implementations: list[str], device: list[str], rehearsal: bool) -> Part:
    """Return the part that times every fast implementation in the cases of `attnplug bench --set kernels`."""
    ours = [name for name in implementations if name not in ("aten_math", "math_ref")]
    seconds = ["--seconds", "0.001", "--tiny"] if rehearsal else ["--seconds", "0.05"]
    kinds = ("json", "csv", *(("png",) if importlib.util.find_spec("matplotlib") else ()))
    outputs = [argument for kind in kinds for argument in ("-o", str(folder / f"kernels.{kind}"))]
    bench = [sys.executable, "-m", "attnplug", "bench", "--set", "kernels", *device, *seconds]
    return Part("kernels", f"times of {', '.join(ours)}", [*bench, "--impl", ",".join(ours), *outputs], 30.0, told_last)


def pytest_arguments() -> list[str]:
    """Return the arguments for the files with tests marked gpu, without what other parts do."""
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    names = [str(path.relative_to(ROOT)) for path in files if path.name != "test_conformance_gpu.py"]
    names.remove(CLOCKS)
    return ["-v", "-m", "gpu", "-k", "not conformance and not it_conforms", "--durations=10", *names]


def run(chosen: list[Part], folder: Path, limit: float = LIMIT) -> int:
    """Run parts one after the other, and say what came of them; return 1 if one failed or was ended."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    lines, good = [], True
    for sent in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores the first, and so would its parts
        signal.signal(sent, signal.default_int_handler)
    try:
        for part in chosen:
            left = limit - (time.monotonic() - start)
            if left < 2 * GRACE:
                lines.append(f"{part.name}: not run, the {limit:.0f} s of the whole are over")
                good = False
                continue
            print(f"\n=== {part.name}: {part.claim}, at most {min(part.limit, left):.0f} s", flush=True)
            began = time.monotonic()
            log, told = folder / f"{part.name}.txt", []
            try:
                ended = outcome(part, log, min(part.limit, left) - GRACE)
                told = list(part.told(log))
            except (OSError, ValueError) as error:  # a full disk, or results that are cut off in an odd place
                ended = f"failed ({type(error).__name__}: {error})"
            good = good and ended == "done"
            lines.append(f"{part.name}: {ended} after {time.monotonic() - began:.0f} s, {part.claim}")
            lines += [f"  {line}" for line in told]
    except KeyboardInterrupt:
        lines.append("interrupted")
        good = False
    finally:
        summary = "\n".join([*lines, f"{time.monotonic() - start:.0f} s in all; results are in {folder}"])
        print(f"\n=== summary\n{summary}", flush=True)
        (folder / "summary.txt").write_text(summary + "\n")
    return 0 if good else 1


def outcome(part: Part, log: Path, seconds: float) -> str:
    """Run one part, its output both shown and kept; return `done`, `failed` or `ended`."""
    with log.open("w") as written:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=CACHE | os.environ | part.environment,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = shown_until(process, log, seconds)
        finally:
            for sent in (signal.SIGINT, signal.SIGKILL):  # the first lets it write what it has
                if process.poll() is None:
                    os.killpg(process.pid, sent)
                    wait(process, GRACE)
    return "ended, its time was over," if code is None else "done" if code == 0 else f"failed (exit status {code})"


def shown_until(process: subprocess.Popen[bytes], log: Path, seconds: float) -> int | None:
    """Copy the log to stdout while it grows; return the exit status, None if the time is over."""
    deadline = time.monotonic() + seconds
    with log.open(errors="replace") as growing:
        while True:
            code = process.poll()
            print(growing.read(), end="", flush=True)
            if code is not None or time.monotonic() > deadline:
                return code
            time.sleep(0.2)


def wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def told_by_checks(found: Path) -> Iterable[str]:
    """Say how many checks of each implementation passed, and which failed, why."""
    lines = found.read_text().splitlines(keepends=True) if found.exists() else []
    results = [json.loads(line) for line in lines if line.endswith("\n")]
    counts: dict[str, Counter[str]] = {}
    for result in results:
        counts.setdefault(result["impl"], Counter())[result["status"]] += 1
    for name, count in counts.items():
        yield f"{name}: {', '.join(f'{number} {status}' for status, number in count.items())}"
    for result in results:
        if result["status"] == "failed":
            yield f"FAILED {result['impl']} {result['check']}[{result['dtype']}]: {result['reason'].splitlines()[0]}"


def told_by_pytest(log: Path) -> Iterable[str]:
    """Say how many tests passed, and which failed, of a log of `pytest -v` that may be cut off.

    Why is in a file of the same name, of `instant_failures`.
    """
    told = log.with_suffix(".jsonl")
    lines = told.read_text().splitlines(keepends=True) if told.exists() else []
    failures = [json.loads(line) for line in lines if line.endswith("\n")]
    reasons = {failure["test"]: _first_error(failure["reason"]) for failure in reversed(failures)}
    results = log.read_text(errors="replace").partition("\n=================================== FAILURES")[0]
    found = _LINE_OF_PYTEST.findall(results)
    counts = Counter(status for _, status, _ in found)
    yield ", ".join(f"{number} {status.lower()}" for status, number in counts.items()) or "no test ended"
    for before, status, after in found:
        if status in ("FAILED", "ERROR"):
            test = (before or after).strip()
            reason = reasons.get(test, "")
            yield f"{status} {test}{': ' if reason else ''}{reason}"


def _first_error(reason: str) -> str:
    """Return the first line that pytest marks as what went wrong, or the last of all."""
    marked = [line[1:].strip() for line in reason.splitlines() if line.startswith("E ")]
    return (marked or reason.strip().splitlines()[-1:] or [""])[0]


_LINE_OF_PYTEST = re.compile(
    r"^(?:\[\w+\] \[ *\d+%\] )?(?:(\S+::.*?) )?(PASSED|FAILED|ERROR|SKIPPED|XFAIL)(?: (\S+::.*))?", re.MULTILINE
)


def told_as_it_is(log: Path) -> Iterable[str]:
    """Say what it said, without details and without the beginning if that is long."""
    return [line[:COLUMNS].rstrip() for line in log.read_text(errors="replace").strip().splitlines()[-45:]]


COLUMNS = 104
"""Of a line of a benchmark, those before its details, which are in its files."""


def told_last(log: Path) -> Iterable[str]:
    """Say what it concluded."""
    return log.read_text(errors="replace").strip().splitlines()[-8:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", help="run this part alone; may be repeated")
    parser.add_argument("--results", type=Path, help="where to write; by default benchmarks/results/<GPU>")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds for the whole (default: {LIMIT:.0f})")
    parser.add_argument(
        "--rehearse", action="store_true", help="see on a CPU that each part starts; shows nothing else"
    )
    arguments = parser.parse_args()

    if missing := sorted({name for each in NEEDED if (name := lacking(each))}):
        parser.exit(1, f"needs {', '.join(missing)}: carry their wheels in a folder, and make gpu WHEELS=folder\n")
    import torch

    import attnplug

    if not torch.cuda.is_available() and not arguments.rehearse:
        parser.exit(1, "needs a CUDA device\n")
    kind = "cpu" if arguments.rehearse else "cuda"
    machine = "rehearsal" if arguments.rehearse else torch.cuda.get_device_name()
    folder = arguments.results or ROOT / "build" / "rehearsal"
    if arguments.results is None and not arguments.rehearse:
        folder = ROOT / "benchmarks" / "results" / re.sub(r"\W+", "-", machine.lower()).strip("-")
    records = [record for record in attnplug.list_impls() if kind in (record.capabilities.devices or (kind,))]
    implementations = [
        record.name
        for record in records
        if record.status == "available" and record.name != "flex"  # which compiles for each kind of call: has tests
    ]
    everything = parts(folder, implementations, arguments.rehearse)
    names = [part.name for part in everything]
    for name in arguments.part or ():
        if name not in names:
            parser.error(f"--part: expected one of {', '.join(names)}, got {name!r}")
    print(f"{machine}, torch {torch.__version__}, {os.cpu_count()} cores", flush=True)
    query = torch.empty(1, 2, 128, 64, dtype=torch.bfloat16, device=kind)
    print(attnplug.explain(query, query, query, is_causal=True), flush=True)
    wanted = arguments.part or names
    chosen = [part for part in everything if part.name in wanted]
    if arguments.part:
        chosen = [replace(part, limit=part.limit * COLD) for part in chosen]
    return run(chosen, folder, arguments.limit * (SLOWER if arguments.rehearse else 1))


def lacking(module: str) -> str:
    """Return what has to be installed before a module can be imported, itself or what it imports, or nothing."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return error.name or module
    return ""


NEEDED = ("pluggy", "importlib_metadata", "numpy", "pytest", "hypothesis")
"""What the tests and attnplug need beside torch."""


if __name__ == "__main__":
    sys.exit(main())
