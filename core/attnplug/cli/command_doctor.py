"""Report what is wrong on this machine, and the command that fixes it.

Each implementation that cannot run on this machine is listed with the reason and, where one helps, the command. Kernels
are imported for that, so that one whose import fails is found before a call needs it; none is run. A plugin that nobody
loads, because its entry point is in a misspelt group, is found too. Exit status 1: something is broken, not merely
absent from this machine.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import attnplug
from attnplug import AttnplugError, ConfigError, ImplRecord, UnknownImplementationError
from attnplug._registry.catalogue import KNOWN
from attnplug._registry.config import get_config
from attnplug._registry.discovery import GROUP, misspelt_groups
from attnplug._registry.machine import lacks_gpu_build
from attnplug._registry.remedies import gpu_build
from attnplug._selection.state import start
from attnplug._tables import WIDTH, wrap
from attnplug._types import family
from attnplug.cli import render

HELP = "report what is wrong on this machine, and the command that fixes it"

_TORCH = (2, 11)
_BROKEN, _UNAVAILABLE, _ABSENT = "broken", "unavailable", "not installed"
_TITLES = {
    _BROKEN: "broken:",
    _UNAVAILABLE: "cannot run on this machine:",
    _ABSENT: "could be installed:",
}


@dataclass(frozen=True)
class Finding:
    """One thing that does not work: its name, status, reason, and the command that fixes it."""

    name: str
    status: str
    reason: str
    remedy: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Nothing beyond `--json`."""


def run(arguments: argparse.Namespace) -> int:
    records: Sequence[ImplRecord] = ()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*could not be loaded", attnplug.PluginWarning)  # the report says the same
        findings = [*_of_torch(), *_of_environment()]
        if not findings:
            records = _loaded()
            findings += [
                *_of_groups(),
                *_of_gpu(),
                *(_of_record(record) for record in records if record.reason),
                *_absent(),
            ]
    works = [record.name for record in records if record.status == "available"]
    broken = sum(finding.status == _BROKEN for finding in findings)
    if arguments.json:
        render.print_json({"healthy": not broken, "available": works, "findings": [asdict(each) for each in findings]})
    else:
        render.put(_as_text(findings, works, broken))
    return 1 if broken else 0


def _of_torch() -> list[Finding]:
    try:
        import torch
    except Exception as error:  # whatever a broken installation raises
        reason = f"cannot be imported: {type(error).__name__}: {error}"
        return [Finding("torch", _BROKEN, reason, "pip install --force-reinstall torch")]
    found = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if found >= _TORCH:
        return []
    needed = ".".join(map(str, _TORCH))
    reason = f"is {torch.__version__}; attnplug needs {needed} or later"
    return [Finding("torch", _BROKEN, reason, f"pip install --upgrade 'torch>={needed}'")]


def _of_environment() -> list[Finding]:
    try:
        start()
    except (ConfigError, UnknownImplementationError) as error:
        variable, _, reason = str(error).partition(": ")
        return [Finding(variable, _BROKEN, reason, f"unset {variable}")]
    except AttnplugError as error:
        if get_config().strict:  # a broken plugin
            return [Finding("ATTNPLUG_STRICT", _BROKEN, str(error), "ATTNPLUG_STRICT=0 attnplug doctor")]
        return [Finding("ATTNPLUG_IMPL", _BROKEN, str(error), "unset ATTNPLUG_IMPL")]  # a name that several claim
    return []


def _loaded() -> Sequence[ImplRecord]:
    """Return the records once every kernel that could work here has been imported."""
    for entry in start():
        if not entry.unavailable():
            entry.load()
    return attnplug.list_impls()


def _of_groups() -> list[Finding]:
    """Return the plugins that nobody finds because their entry points are in a group of another name."""
    return [
        Finding(
            plugin.name,
            _BROKEN,
            f"is not loaded: {plugin.distribution} {plugin.version} has it among the entry points of group {group!r}; "
            f"the group is called {GROUP!r}",
        )
        for group, plugin in misspelt_groups()
    ]


def _of_gpu() -> list[Finding]:
    if not lacks_gpu_build():
        return []
    return [Finding("torch", _UNAVAILABLE, "is built for the CPU alone, and this machine has a GPU", gpu_build())]


def _of_record(record: ImplRecord) -> Finding:
    reason = record.reason.removesuffix(f" ({record.remedy})")
    return Finding(record.name, record.status, reason, record.remedy)


def _absent() -> list[Finding]:
    """Return the implementations of this project that are not installed, and nothing keeps out."""
    absent = start().absent()
    return [
        Finding(name, _ABSENT, _about(name), known.install)
        for name, known in KNOWN.items()
        if absent.get(name) == f"is not installed: {known.install}"
    ]


def _about(name: str) -> str:
    spec = KNOWN[name].spec
    return "the kernels that you install yourself" if spec is None else f"family {family(spec.backend)}"


def _as_text(findings: Sequence[Finding], works: Sequence[str], broken: int) -> str:
    verdict = f"{broken} broken" if broken else "Nothing is broken"
    parts = ["\n".join(wrap(f"{verdict}. Available: {', '.join(works) or 'none'}.", render.width(WIDTH)))]
    for status, title in _TITLES.items():
        found = [each for each in findings if each.status == status]
        if found:
            parts.append("\n".join([title, *(line for each in _together(found) for line in _lines(each))]))
    return "\n\n".join(parts)


def _together(findings: Sequence[Finding]) -> list[Finding]:
    """Return findings with the same reason and remedy as one, and of one name that any of several remedies fixes."""
    names: dict[tuple[str, ...], list[str]] = {}
    for each in findings:
        names.setdefault((each.status, each.reason, each.remedy), []).append(each.name)
    remedies: dict[tuple[str, ...], list[str]] = {}
    for (status, reason, remedy), found in names.items():
        remedies.setdefault((", ".join(found), status, reason), []).append(remedy)
    return [Finding(name, status, reason, "\n".join(commands)) for (name, status, reason), commands in remedies.items()]


def _lines(finding: Finding) -> list[str]:
    said = wrap(f"{finding.name}: {finding.reason}", render.width(WIDTH), "  ", "    ")
    commands = finding.remedy.splitlines()
    if len(commands) > 1:
        said.append("      # one of these")
    return [*said, *(f"      {command}" for command in commands)]
