"""Plots: time, TFLOP/s and memory over length, one line an implementation.

Cases that differ in nothing but their length are one row of plots; those that have no such company share a row,
in which each is a line of its own.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from attnplug.bench._cases import Case
from attnplug.bench._records import RAN, Record, timing_of
from attnplug.bench._report import Report
from attnplug.bench._text import machine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c", "#999933")
_MARKERS = "osD^vP*X"
_DIRECTIONS: dict[str, Literal["-", "--"]] = {"forward": "-", "backward": "--"}
_WIDTH, _HEIGHT, _ROW = 15.0, 3.6, 0.16


@dataclass(frozen=True)
class Panel:
    """What one column of plots shows.

    Attributes:
        title: with the unit.
        value: of a record and a direction; None where there is none.
        spread: its 20th and 80th percentile, if it has them.
        directions: forward and backward, or one line for both.
    """

    title: str
    value: Callable[[Record, str], float | None]
    spread: Callable[[Record, str], tuple[float, float]] | None = None
    directions: tuple[str, ...] = ("forward", "backward")


def _milliseconds(record: Record, direction: str) -> float | None:
    timing = timing_of(record, direction)
    return None if timing is None else timing.median * 1e3


def _spread(record: Record, direction: str) -> tuple[float, float]:
    timing = timing_of(record, direction)
    assert timing is not None
    return timing.p20 * 1e3, timing.p80 * 1e3


PANELS = (
    Panel("time, ms", _milliseconds, _spread),
    Panel("TFLOP/s", lambda record, direction: getattr(record, f"{direction}_tflops")),
    Panel(
        "peak memory beyond inputs, MiB",
        lambda record, _: None if record.memory is None else record.memory / 2**20,
        directions=("forward",),
    ),
)


def picture(report: Report) -> bytes:
    """Return all plots as one picture, a PNG."""
    from matplotlib.figure import Figure

    sweeps, singles = groups(report.cases)
    heights = [_HEIGHT] * len(sweeps) + ([rows_height(report, singles)] if singles else [])
    figure = Figure(figsize=(_WIDTH, max(sum(heights), 1.0) + 1.2), layout="constrained")
    where = machine(report.environment, report.ceilings)
    figure.suptitle(f"attnplug bench, {report.created[:10]}\n{where}", fontsize=9)
    chosen = looks(report)
    grid: Any = figure.subplots(len(heights) or 1, len(PANELS), squeeze=False, height_ratios=heights or None)
    for axes, (title, cases) in zip(grid, sweeps.items(), strict=False):
        for ax, panel in zip(axes, PANELS, strict=True):
            draw_lines(ax, report, cases, panel, chosen)
        axes[0].set_title(title, loc="left", fontsize=10, fontweight="bold")
    if singles:
        for ax, panel in zip(grid[-1], PANELS, strict=True):
            draw_dots(ax, report, singles, panel, chosen)
            if panel is not PANELS[0]:
                ax.set_yticklabels([])
        grid[-1][0].set_title("single cases", loc="left", fontsize=10, fontweight="bold")
    _legend(figure, chosen, any(case.backward for case in report.cases))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def looks(report: Report) -> dict[str, tuple[str, str]]:
    """Return colour and marker of each implementation."""
    return {impl: (_COLOURS[at % len(_COLOURS)], _MARKERS[at % len(_MARKERS)]) for at, impl in enumerate(report.impls)}


def groups(cases: list[Case]) -> tuple[dict[str, list[Case]], list[Case]]:
    """Return the cases that differ in length alone, by a title, sorted; and all others.

    The batch may shrink as the length grows, as where the number of tokens is the same.
    """
    by_kind: dict[Case, list[Case]] = {}
    for case in cases:
        by_kind.setdefault(_kind(case, batch=1), []).append(case)
    found: dict[Case, list[Case]] = {}
    for kind, members in by_kind.items():
        if len({length(case) for case in members}) == len(members):
            found[kind] = members
        else:
            for case in members:
                found.setdefault(_kind(case, batch=case.batch), []).append(case)
    sweeps = {}
    singles = []
    for kind, members in found.items():
        if 1 < len(members) == len({length(case) for case in members}):
            sweeps[_title(kind, members)] = sorted(members, key=length)
        else:
            singles += members
    return sweeps, singles


def length(case: Case) -> int:
    """Return what the horizontal axis is: the number of keys."""
    return case.keys


def _kind(case: Case, batch: int) -> Case:
    """Return the case without its length: of attention among tokens both lengths, else that of the keys."""
    if case.is_varlen or case.used is not None:
        return case  # of many lengths itself
    queries = 1 if case.queries == case.keys else case.queries
    return replace(case, name="-", batch=batch, queries=queries, keys=1 if case.queries == case.keys else 2)


def _title(kind: Case, members: list[Case]) -> str:
    batches = sorted({case.batch for case in members})
    batch = f"B{batches[0]}" if len(batches) == 1 else f"B{batches[-1]} to {batches[0]}"
    label = [part for part in kind.label().split() if part[0] not in "BS" and part != "fwd+bwd"]
    queries = [] if members[0].queries == members[0].keys else [f"Sq{kind.queries}"]
    return " ".join([batch, *label, *queries])


def points(report: Report, cases: list[Case], panel: Panel) -> Iterator[tuple[str, str, list[Record]]]:
    """Yield implementation, direction and its records that have a value, in the order of the cases."""
    for impl in report.impls:
        for direction in panel.directions:
            found = [record for case in cases for record in report.of(case) if record.impl == impl]
            known = [record for record in found if record.status == RAN and panel.value(record, direction) is not None]
            if known:
                yield impl, direction, known


def draw_lines(ax: Axes, report: Report, cases: list[Case], panel: Panel, looks: dict[str, tuple[str, str]]) -> None:
    for impl, direction, records in points(report, cases, panel):
        colour, marker = looks[impl]
        lengths = [length(record.case) for record in records]
        values: Any = [panel.value(record, direction) for record in records]
        style = _DIRECTIONS[direction]
        width = 3.0 - 2.0 * report.impls.index(impl) / len(report.impls)  # lines that coincide are all seen
        fill = _filling(colour, direction)
        ax.plot(
            lengths,
            values,
            style,
            color=colour,
            marker=marker,
            ms=3 + width,
            lw=width,
            markerfacecolor=fill,
            gid=f"{impl} {direction}",
        )
        if panel.spread is not None:
            low, high = zip(*(panel.spread(record, direction) for record in records), strict=True)
            ax.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.set_xscale("log", base=2)
    if panel is not PANELS[1]:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    ax.set_xticks([length(case) for case in cases], [str(length(case)) for case in cases])
    ax.minorticks_off()
    ax.set_xlabel("length" if cases[0].queries == cases[0].keys else "keys")
    ax.set_ylabel(panel.title)
    ax.grid(alpha=0.3)


def draw_dots(ax: Axes, report: Report, cases: list[Case], panel: Panel, looks: dict[str, tuple[str, str]]) -> None:
    """Draw a group of rows for each case, a row for each implementation."""
    from matplotlib.ticker import LogLocator, NullFormatter

    impls = report.impls
    step = 1 / (len(impls) + 1)
    places = {case: float(-at) for at, case in enumerate(cases)}
    for impl, direction, records in points(report, cases, panel):
        at = [places[record.case] - (impls.index(impl) - (len(impls) - 1) / 2) * step for record in records]
        values: Any = [panel.value(record, direction) for record in records]
        colour, marker = looks[impl]
        fill = _filling(colour, direction)
        ax.plot(values, at, marker, color=colour, markersize=6, markerfacecolor=fill, gid=f"{impl} {direction}")
        if panel.spread is not None:
            ax.hlines(at, *zip(*(panel.spread(record, direction) for record in records), strict=True), color=colour)
    ax.set_yticks(list(places.values()), [case.name for case in cases])
    ax.tick_params(axis="y", length=0, labelsize=8)
    ax.set_ylim(0.5 - len(cases), 0.5)
    for place in list(places.values())[1:]:
        ax.axhline(place + 0.5, color="grey", alpha=0.4, linewidth=0.8)
    if panel is not PANELS[1]:
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        few = high > 200 * low  # decades: labels between them would lie over each other
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0,) if few else (1.0, 2.0, 5.0), numticks=8))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())  # less than a decade would have a label at each, over the others
    else:
        ax.set_xlim(left=0)
    ax.set_xlabel(panel.title)
    ax.grid(alpha=0.3, axis="x")


def _filling(colour: str, direction: str) -> str:
    return colour if direction == "forward" else "white"


def rows_height(report: Report, cases: list[Case]) -> float:
    return max(1.5, _ROW * len(cases) * (len(report.impls) + 1)) + 0.8


def _legend(figure: Any, looks: dict[str, tuple[str, str]], backward: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, marker=marker, label=impl) for impl, (colour, marker) in looks.items()]
    if backward:
        handles += [
            Line2D(
                [], [], color="grey", linestyle=style, marker="o", markerfacecolor=_filling("grey", name), label=name
            )
            for name, style in _DIRECTIONS.items()
        ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(8, len(handles)), frameon=False)
