"""What pages show that the code already knows: one fact in one place, so that a page cannot go stale.

A page says `<!-- generate: NAME -->` on a line of its own, and gets what the function of that name returns.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import attnplug
from attnplug import Capabilities, Feature, ImplRecord
from attnplug._registry.config import VARIABLES
from attnplug.builtin.faults import OF_SDPA
from attnplug.cli import COMMANDS, build_parser

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_ROOT = Path(__file__).resolve().parent.parent
_RESULTS = _ROOT / "benchmarks/results"
_H100 = "nvidia-h100-80gb-hbm3"
_IMPLS = ("flash_triton", "FlashAttention 3", "cuDNN", "PyTorch's flash")
"""Those whose forward was measured on an H100."""
_MARK = re.compile(r"^<!-- generate: (\w+) -->$", re.MULTILINE)
_DISTRIBUTIONS = ("attnplug", "attnplug-math-ref", "attnplug-flash-triton", "attnplug-efficient-cuda")


def on_page_markdown(markdown: str, **context: Any) -> str:
    """Put in what the marks of a page stand for; mkdocs calls this for every page."""
    return _MARK.sub(lambda mark: _PARTS[mark[1]](), markdown)


def on_post_template(output: str, template_name: str, **context: Any) -> str:
    """Make the links of the page for what is not found relative, so that the site works in any folder; for mkdocs."""
    if template_name != "404.html":
        return output
    return re.sub(r'((?:href|src)=")/(?!/)', r"\g<1>./", output).replace('"base": "/"', '"base": "."')


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


def distributions() -> str:
    """Return the distributions of this project, what each brings, and how it is installed."""
    extras = {name: extra for extra, names in _extras().items() for name in names if extra != "all"}
    rows = []
    for name in (*_DISTRIBUTIONS, "attnplug-adapters"):
        found = [f"`{record.name}`" for record in attnplug.list_impls() if record.distribution == name]
        install = f"attnplug[{extras[name]}]" if name in extras else name
        rows.append((f"`{name}`", ", ".join(found), metadata(name)["Summary"], f"`pip install {install}`"))
    return _table(("distribution", "implementations", "what it is", "to install"), rows)


def _extras() -> dict[str, list[str]]:
    with (_ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]["optional-dependencies"]


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
    table = _table(("feature", *(f"`{record.name}`" for record in records)), rows)
    return f'<div class="matrix" markdown="1">\n\n{table}\n\n</div>'


def faults() -> str:
    """Return what PyTorch gets wrong, and what becomes of such a call."""
    rows = [
        (
            fault.says,
            fault.device or "any",
            fault.seen,
            "rewritten" if fault.rewrite else "computed in parts" if fault.cut else "passed over",
        )
        for fault in OF_SDPA.all
    ]
    return _table(("what PyTorch does", "device", "seen in PyTorch", "such a call is"), rows)


def pictures() -> str:
    """Return the two pictures of the home page: who decides, and how fast that may be."""
    decides = (_ROOT / "docs/images/who-decides.svg").read_text(encoding="utf-8")
    caption = (
        "Forward, length 8,192, bfloat16: "
        '<a href="gpu.html">GPU figures</a> has all of them, and what they were measured with.'
    )
    figures = [f"<figure>{decides}</figure>", f"<figure>{_bars()}<figcaption>{caption}</figcaption></figure>"]
    return f'<div class="side-by-side">{"".join(figures)}</div>'.replace("\n", " ")


def _bars() -> str:
    """Return a bar chart of forward on an H100: a group for each head size, a bar for each implementation."""
    rates = {
        (size, impl): rate
        for (size, mask, length), found in _forward_rates().items()
        if (mask, length) == ("causal", "8192")
        for impl, rate in found.items()
    }
    sizes = list(dict.fromkeys(size for size, _ in rates))
    bar, left, bottom, scale = 25, 14, 310, 245 / max(rates.values())
    parts = [
        f'<text class="title" x="{left}" y="24">Causal attention on an H100</text>',
        '<text class="label" x="404" y="24" text-anchor="end">TFLOP/s</text>',
    ]
    for group, size in enumerate(sizes):
        start = left + group * (len(_IMPLS) * bar + 32)
        for at, impl in enumerate(_IMPLS):
            height, x = rates[size, impl] * scale, start + at * bar
            label = f"{impl}, head size {size}: {rates[size, impl]:.0f} TFLOP/s"
            parts.append(
                f'<rect class="bar-{at}" x="{x}" y="{bottom - height:.0f}" width="{bar - 3}" height="{height:.0f}">'
                f"<title>{html.escape(label)}</title></rect>"
                f'<text x="{x + (bar - 3) / 2}" y="{bottom - height - 4:.0f}" text-anchor="middle">'
                f"{rates[size, impl]:.0f}</text>"
            )
        middle = start + len(_IMPLS) * bar / 2
        parts.append(f'<text x="{middle}" y="{bottom + 18}" text-anchor="middle" class="label">head size {size}</text>')
    for at, impl in enumerate(_IMPLS):
        x, y = left + at % 2 * 200, bottom + 44 + at // 2 * 22
        name = html.escape(impl)
        parts.append(f'<rect class="bar-{at}" x="{x}" y="{y - 11}" width="12" height="12"/>')
        parts.append(f'<text class="label" x="{x + 18}" y="{y}">{name}</text>')
    label = "TFLOP/s of causal attention on an H100, by head size and implementation"
    return f'<svg class="bars" viewBox="0 0 420 392" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def gpu_forward() -> str:
    """Return forward on an H200 and on an H100: a row for each head size, length and mask."""
    rows = [
        (*kind, *(f"{rates[impl]:.0f} / {other[impl]:.0f}" for impl in _IMPLS))
        for (kind, rates), other in zip(_forward_rates("nvidia-h200").items(), _forward_rates().values(), strict=True)
    ]
    return _table(("head size", "mask", "length", *_IMPLS), rows)


def _forward_rates(machine: str = _H100) -> dict[tuple[str, str, str], dict[str, float]]:
    """Return TFLOP/s by implementation, for each head size, mask and length."""
    named = re.compile(r"forward, head size (\d+), (full|causal), length (\d+): ")
    return {
        (kind[1], kind[2], kind[3]): _rates(result, "TFLOP/s of ")
        for result in _json("forward", machine)["results"]
        if (kind := named.match(result["name"]))
    }


def _rates(result: dict[str, Any], unit: str) -> dict[str, float]:
    """Return the details of a result that have this unit, by implementation."""
    return {name.removeprefix(unit): rate for name, rate in result["details"].items() if name.startswith(unit)}


def gpu_features() -> str:
    """Return the speed of causal calls with features on an H100, over that of calls without."""
    named = re.compile(r"forward, head size (\d+), causal with (.+) / without")
    cells: dict[str, dict[str, str]] = {}
    for result in _json("forward")["results"]:
        if found := named.match(result["name"]):
            cells.setdefault(found[2], {})[found[1]] = f"{1 / result['value']:.2f}"
    sizes = list(next(iter(cells.values())))
    titles = ("causal with", *(f"head size {size}" for size in sizes))
    return _table(titles, [(feature, *(row[size] for size in sizes)) for feature, row in cells.items()])


def gpu_decoding() -> str:
    """Return decoding on an H100, GB/s of keys and values."""
    named = re.compile(r"decoding, batch (\d+), (\d+) keys, (.+): ")
    rows = []
    for result in _json("forward")["results"]:
        if found := named.match(result["name"]):
            rates = _rates(result, "GB/s of ")
            rows.append((*found.groups(), f"{rates['flash_triton']:.0f}", f"{rates['F.sdpa']:.0f}"))
    return _table(("batch", "keys", "timed", "flash_triton", "`F.scaled_dot_product_attention`"), rows)


def gpu_backward() -> str:
    """Return backward on an H100: flash_triton as it is and in deterministic mode, and its peers."""
    cells: dict[str, dict[str, str]] = {}
    for result in _json("backward")["results"]:
        kind, _, _ = result["name"].removeprefix("backward, ").partition(":")
        found = {name.removeprefix("TFLOP/s of "): f"{rate:.0f}" for name, rate in result["details"].items()}
        cells.setdefault(kind, {}).update(found)
    names = list(dict.fromkeys(name for row in cells.values() for name in row))
    titles = ["flash_triton, deterministic" if name == "deterministic" else name for name in names]
    return _table(("case", *titles), [(kind, *(row.get(name, "-") for name in names)) for kind, row in cells.items()])


def gpu_host() -> str:
    """Return what small calls take on the host of an H100, in microseconds and over PyTorch's function."""
    kinds = {
        "a call": "on the host",
        "in a decode loop": "a call of a decode loop",
        "forward and backward": "forward and backward",
    }
    found = {result["name"]: result for result in _json("launching")["results"]}
    names = dict.fromkeys(name.partition(" / ")[0] for name in found)
    rows = []
    for name in names:
        results = [found[f"{name} / F.scaled_dot_product_attention, {kind}"] for kind in kinds.values()]
        rows.append((name, *(f"{each['details']['us']:.0f} µs ({each['value']:.2f})" for each in results)))
    return _table(("implementation", *kinds), rows)


_COSTS = {
    "`attnplug.scaled_dot_product_attention` / `F.scaled_dot_product_attention`": ["default / F.sdpa"],
    "the same in three dimensions; with a mask; under autocast": [
        "default, 3-D / F.sdpa",
        "default, mask / F.sdpa",
        "default, autocast / F.sdpa",
    ],
    "`F.scaled_dot_product_attention` while `patch_torch` is in place and nothing is selected / without": [
        "patched F.sdpa, nothing selected / F.sdpa"
    ],
    '`impl="aten_flash"`; in a scope; active; named by the environment / its operator called directly': [
        "impl='aten_flash' / bare",
        "scope FLASH_ATTENTION / bare",
        "active aten_flash / bare",
        "named by the environment / bare",
    ],
    "`return_lse=True` / the same": ["default, return_lse / bare"],
    "`F.scaled_dot_product_attention` while `aten_flash` is active / the same": [
        "F.sdpa while aten_flash is active / bare"
    ],
    '`impl="aten_flash"` under autocast; `aten_math` with a mask / their operators there': [
        "impl='aten_flash', autocast / bare under autocast",
        "impl='aten_math', mask / bare",
    ],
    "while recording / `F.scaled_dot_product_attention`": ["default, recorded / F.sdpa"],
    "forward and backward, default; `aten_flash` / `F.scaled_dot_product_attention`": [
        "forward and backward, default / F.sdpa",
        "forward and backward, aten_flash / F.sdpa",
    ],
    "measured choices in use, `torch` chosen; `aten_flash` chosen; 64 steps of decoding / without choices": [
        "choices in use, torch chosen / without",
        "choices in use, aten_flash chosen / named",
        "choices in use, 64 steps of decoding / without",
    ],
    "`varlen_attn` beyond its kernel's own time": ["varlen_attn beyond its kernel"],
    "with 1,000 registered implementations / with 4": ["default: 1000 registered implementations / 4"],
    "decode loop, keys growing by one: mean overhead / cached overhead, default; `aten_flash`": [
        "decode loop, default: mean overhead / cached overhead",
        "decode loop, impl='aten_flash': mean overhead / cached overhead",
    ],
    "entering and leaving a scope of one family; with a priority / PyTorch's `sdpa_kernel`": [
        "enter and leave a scope of one family / PyTorch's",
        "enter and leave a scope of priority / PyTorch's",
    ],
    "compiled 12-layer encoder / the same with PyTorch's function": ["compiled 12-layer encoder, attnplug / F.sdpa"],
    "`import attnplug`; and its functions, beyond `import torch`": [
        "import attnplug, beyond import torch",
        "and its functions, beyond import torch",
    ],
    "`math_ref`, batch 1, 8 heads, 8,192 queries and keys, head size 64, float32: memory beyond inputs and outputs": [
        "math_ref forward, B1 H8 S8192 E64 float32: peak beyond in and out"
    ],
}
"""What the page of benchmarks calls the results of the CPU that it shows."""


def costs() -> str:
    """Return what attnplug itself costs on the CPU, and the limit of each."""
    found = {result["name"]: result for result in _json("results", "cpu")["results"]}
    rows = []
    for what, names in _COSTS.items():
        unit, limit = found[names[0]]["unit"], found[names[0]]["limit"]
        decimals, unit = (2, "") if unit == "ratio" else (0, f" {unit}".replace("us", "µs"))
        values = "; ".join(f"{found[name]['value']:.{decimals}f}{unit}" for name in names)
        rows.append((what, values, f"{limit:g}{unit}"))
    return _table(("what", "measured", "limit"), rows)


def watching() -> str:
    """Return what it costs to be watched, on the CPU: tiny calls over `F.sdpa`'s, and steps of training."""
    results = _json("results", "cpu")["results"]
    first = next(at for at, result in enumerate(results) if result["name"].startswith("nobody watches"))
    rows = [(result["name"], f"{result['value']:.2f}") for result in results[first:]]  # of the last program that runs
    return _table(("what", "ratio"), rows)


def _json(name: str, machine: str = _H100) -> Any:
    return json.loads((_RESULTS / machine / f"{name}.json").read_text(encoding="utf-8"))


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
        raise LookupError(f"the documentation lists the plugins, so install {names}; `make docs` does")
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
    part.__name__: part
    for part in (
        commands,
        variables,
        features,
        implementations,
        distributions,
        devices,
        feature_matrix,
        faults,
        pictures,
        gpu_forward,
        gpu_features,
        gpu_decoding,
        gpu_backward,
        gpu_host,
        costs,
        watching,
    )
}
