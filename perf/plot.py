"""Plots of a file of results, made of nothing but its rows: the roofline of every GPU in it, and speedups over the baselines."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .table import newest
from .targets import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "qgnn", "text.parse_math": False, "font.size": 9}
_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
BARS = 60
"""Bars of a plot of speedups at most; an operation with more rows shows its first."""


def plots(records: Iterable[Record], folder: Path) -> list[Path]:
    """Writes ``roofline.svg`` and, for every operation with ratios, ``speedup-OPERATION.svg``; returns their paths.

    Raises:
        ValueError: no row has a time.
    """
    from matplotlib import rc_context

    rows = [row for run in newest(records).values() for row in run if row["status"] == "ok" and row["ms_50"]]
    if not rows:
        raise ValueError(
            "no row of these results has a time, so there is nothing to plot; run qgnn bench --suite gpu --out FILE"
        )
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with rc_context(_STYLE):
        for name, figure in _figures(rows):
            figure.savefig(folder / f"{name}.svg", metadata=_METADATA)
            written.append(folder / f"{name}.svg")
    return written


def _figures(rows: list[Record]) -> Iterable[tuple[str, Figure]]:
    rates = {row["candidate"]: row for row in rows if row["operation"] == "machine"}
    worked = [row for row in rows if row["operation"] != "machine" and row["bytes"] and row["operations"]]
    if {"copy", "int8-product"} <= set(rates) and worked:
        yield "roofline", _roofline(rates["copy"], rates["int8-product"], worked)
    for operation in dict.fromkeys(str(row["operation"]) for row in rows):
        compared = [
            r for r in rows if r["operation"] == operation and r["ratio_50"] and r["candidate"] != r["baseline"]
        ]
        if compared:
            yield f"speedup-{operation}", _speedups(operation, compared[:BARS])


def _rate(row: Record, what: str) -> float:
    """A second."""
    return float(row[what] or 0) / float(row["ms_50"] or 1) * 1e3


def _roofline(copy: Record, product: Record, rows: list[Record]) -> Figure:
    """Operations a second over operations a byte, of our candidates and their peers, under the two rates that the machine was measured to have."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    intensity = [float(r["operations"] or 0) / float(r["bytes"] or 1) for r in rows]
    bandwidth, peak = _rate(copy, "bytes"), _rate(product, "operations")
    ends = [min(*intensity, peak / bandwidth) / 2, max(*intensity, peak / bandwidth) * 2]
    roof = [ends[0], peak / bandwidth, ends[1]]
    axes.plot(
        roof,
        [min(peak, x * bandwidth) for x in roof],
        color="black",
        label=f"copy {bandwidth / 1e12:.3g} TB/s, int8 product {peak / 1e12:.3g} TOP/s",
    )
    for name in dict.fromkeys(str(r["candidate"]) for r in rows):
        points = [(x, _rate(r, "operations")) for x, r in zip(intensity, rows, strict=True) if r["candidate"] == name]
        axes.plot(*zip(*points, strict=True), "o" if name.startswith("qgnn") else "x", label=name)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations a byte",
        ylabel="operations a second",
        title=str(rows[0]["device"]),
    )
    axes.legend(fontsize=7)
    return figure


def _speedups(operation: str, rows: list[Record]) -> Figure:
    """Bars of the baseline's time over the candidate's, with the quantiles 20 and 80."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.2 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    low, middle, high = ([float(r[f"ratio_{q}"] or 0) for r in rows] for q in (20, 50, 80))
    errors = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
    colors = ["#7fb77e" if str(r["candidate"]).startswith("qgnn") else "#bbbbbb" for r in rows]
    axes.barh(range(len(rows)), middle, xerr=errors, color=colors)
    axes.set_yticks(range(len(rows)), [f"{r['shape']}: {r['candidate']}" for r in rows], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="baseline's time / candidate's", title=f"{operation}, {rows[0]['device']}")
    return figure
