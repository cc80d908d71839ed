"""What pages show that the code already knows: one fact in one place, so that a page cannot go stale.

A page says `<!-- generate: NAME -->` on a line of its own, and gets what the function of that name returns.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any

from mkdocs.exceptions import PluginError

import attnplug
from attnplug import Capabilities, Feature, ImplRecord
from attnplug._registry.config import VARIABLES
from attnplug.builtin.faults import OF_SDPA
from attnplug.cli import COMMANDS, build_parser

_MARK = re.compile(r"^<!-- generate: (\w+) -->$", re.MULTILINE)
_DISTRIBUTIONS = ("attnplug", "attnplug-math-ref", "attnplug-flash-triton", "attnplug-efficient-cuda")


def on_page_markdown(markdown: str, **context: Any) -> str:
    """Put in what the marks of a page stand for; mkdocs calls this for every page."""
    return _MARK.sub(lambda mark: _PARTS[mark[1]](), markdown)


def commands() -> str:
    """Return what `--help` prints, for the program and for each command."""
    parser = build_parser()
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = [f"## attnplug {{#attnplug}}\n\n{_help(parser)}"]
    parts += [f"## attnplug {name} {{#{name}}}\n\n{_help(subparsers.choices[name])}" for name in COMMANDS]
    return "\n\n".join(parts)


def _help(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = _wide(parser.formatter_class)
    return f"```text\n{parser.format_help().rstrip()}\n```"


def _wide(formatter: Any) -> Any:
    """Return a formatter whose lines do not depend on the terminal that builds the pages."""
    return lambda prog: formatter(prog, width=100)


def variables() -> str:
    """Return the environment variables and what each means."""
    return _table(("variable", "value"), [(f"`{name}`", meaning) for name, meaning in VARIABLES.items()])


def features() -> str:
    """Return the features and the phrase that stands for each in a reason."""
    return _table(("feature", "what a call asks for"), [(f"`{item.name}`", item.value) for item in Feature])


def implementations() -> str:
    """Return the implementations in the order in which they are asked."""
    rows = [
        (
            f"`{record.name}`",
            "none" if record.backend is None else record.backend.name,
            f"`{record.distribution}`",
            "first" if record.name == "torch" else str(record.priority),
        )
        for record in _records()
    ]
    return _table(("implementation", "family", "distribution", "priority"), rows)


def devices() -> str:
    """Return what each implementation runs on, a line for each of its alternatives."""
    rows = [
        (f"`{record.name}`", _device(part), ", ".join(sorted(part.dtypes or ("any",))), _sizes(part.head_sizes))
        for record in _records()
        for part in record.capabilities.alternatives
    ]
    return _table(("implementation", "device", "dtypes", "head sizes"), rows)


def _device(part: Capabilities) -> str:
    device = ", ".join(sorted(part.devices or ("any",)))
    if part.compute_capability is not None:
        device += " from compute capability " + ".".join(map(str, part.compute_capability))
    if part.architectures is not None:
        device += f", or AMD {', '.join(sorted(part.architectures))}"
    return device


def feature_matrix() -> str:
    """Return which implementation declares which feature, for some device."""
    records = _records()
    rows = [(f"`{feature.name}`", *(_declares(record, feature) for record in records)) for feature in Feature]
    return _table(("feature", *(f"`{record.name}`" for record in records)), rows)


def faults() -> str:
    """Return what PyTorch gets wrong, and what becomes of such a call."""
    rows = [
        (fault.says, fault.device or "any", fault.seen, "rewritten" if fault.mend else "passed over")
        for fault in OF_SDPA.all
    ]
    return _table(("what PyTorch does", "device", "seen in PyTorch", "such a call is"), rows)


def _declares(record: ImplRecord, feature: Feature) -> str:
    parts = record.capabilities.alternatives
    having = [part for part in parts if feature in part.features]
    if len(having) == len(parts):
        return "yes"
    return ", ".join(sorted({device for part in having for device in part.devices or ("any",)}))


def _records() -> list[ImplRecord]:
    """Return the implementations of this project's distributions, which must all be installed."""
    records = [record for record in attnplug.list_impls() if record.distribution in _DISTRIBUTIONS]
    missing = set(_DISTRIBUTIONS) - {record.distribution for record in records if record.status != "broken"}
    if missing:
        names = ", ".join(sorted(missing))
        raise PluginError(f"the documentation lists the plugins, so install {names}; `make docs` does")
    return records


def _sizes(sizes: Any) -> str:
    if sizes is None:
        return "any"
    if isinstance(sizes, range):
        return f"{sizes[0]} to {sizes[-1]}" + (f" in steps of {sizes.step}" if sizes.step > 1 else "")
    return ", ".join(map(str, sorted(sizes)))


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


_PARTS = {
    part.__name__: part for part in (commands, variables, features, implementations, devices, feature_matrix, faults)
}
