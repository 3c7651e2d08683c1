"""The plots of a report, made of its data alone. Bars are stacked where their parts add up."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]

_PARTS = {
    "integer": "integer",
    "float": "float",
    "sram_dynamic": "SRAM dynamic",
    "sram_leakage": "SRAM leakage",
    "hbm": "HBM",
}
_ACCOUNTINGS = {
    "binary": "binary input: 1 bit",
    "as_learned": "binary input: bits as given",
    "4": "binary input: 4 bits",
}


def svgs(document: Record) -> dict[str, str]:
    """Every plot of a report of :func:`qgnn.accel.report.to_dict`, by the name of its file: cycles, energy and utilisation of the layers, and with a
    comparison the speedups, the cycles against the order, and the energy beside the baselines'."""
    draws: dict[str, Callable[[Figure], None]] = {
        "cycles.svg": partial(_cycles, document["layers"]),
        "energy.svg": partial(_energy, document["layers"]),
        "utilisation.svg": partial(_utilisation, document["layers"]),
    }
    if "comparison" in document:
        compared = document["comparison"]
        if compared["baselines"]:
            draws["speedup.svg"] = partial(_speedups, compared)
        draws["order_cycles.svg"] = partial(_order_cycles, compared)
        draws["compared_energy.svg"] = partial(_compared_energy, compared)
    return {name: _svg(draw) for name, draw in draws.items()}


def _svg(draw: Callable[[Figure], None]) -> str:
    """What ``draw`` draws; the same for the same data, and names are never read as formulas."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "qgnn", "text.parse_math": False, "font.size": 9}):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return text.getvalue()


def _cycles(layers: Sequence[Record], figure: Figure) -> None:
    axes = figure.add_subplot()
    _stacked(axes, _names(layers), _phases(layers))
    axes.set_ylabel("cycles")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7)


def _energy(layers: Sequence[Record], figure: Figure) -> None:
    axes = figure.add_subplot()
    _stacked(axes, _names(layers), _parts(layers), "J")
    axes.set_ylabel("energy")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7)


def _utilisation(layers: Sequence[Record], figure: Figure) -> None:
    axes = figure.add_subplot()
    series = {stage: [100 * layer[f"{stage}_utilisation"] for layer in layers] for stage in ("update", "aggregation")}
    _grouped(axes, _names(layers), series)
    axes.set(ylabel="utilisation, %", ylim=(0, 100))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7)


def _speedups(compared: Record, figure: Figure) -> None:
    """The workload's own widths against each baseline, one panel for each way to charge a binary input."""
    own = [row for row in compared["rows"] if row["speedup"] and row["widths"] not in compared["baselines"]]
    panels = _panels(own, figure)
    for axes, rows in panels:
        series = {f"over {name}": [row["speedup"][name] or 0 for row in rows] for name in compared["baselines"]}
        _grouped(axes, [row["order"] for row in rows], series)
        axes.axhline(1, color="#555", linewidth=0.8)
        axes.set_xlabel("order of the rows")
    panels[0][0].set_ylabel("speedup")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)


def _order_cycles(compared: Record, figure: Figure) -> None:
    panels = _panels(compared["rows"], figure)
    for axes, rows in panels:
        _stacked(axes, [f"{row['order']}, {row['widths']}" for row in rows], _phases(rows))
    panels[0][0].set_ylabel("cycles")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)


def _compared_energy(compared: Record, figure: Figure) -> None:
    """In the configured order."""
    rows = [row for row in compared["rows"] if row["order"] == compared["configured"]["order"]]
    panels = _panels(rows, figure)
    for axes, members in panels:
        _stacked(axes, [row["widths"] for row in members], _parts(members), "J")
    panels[0][0].set_ylabel("energy")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)


def _panels(rows: Sequence[Record], figure: Figure) -> list[tuple[Axes, list[Record]]]:
    """A panel for each way to charge a binary input, with its rows; they share the vertical axis."""
    names = dict.fromkeys(row["first_layer"] for row in rows)
    panels = []
    for axes, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        axes.set_title(_ACCOUNTINGS[name], fontsize=8)
        panels.append((axes, [row for row in rows if row["first_layer"] == name]))
    return panels


def _names(layers: Sequence[Record]) -> list[str]:
    """Layers may have no name, or the same; the number tells them apart."""
    return [f"{number} {layer['name']}".rstrip() for number, layer in enumerate(layers)]


def _phases(records: Sequence[Record]) -> dict[str, list[float]]:
    return {
        "update": [r["update_cycles"] - r["attention_cycles"] for r in records],
        "attention": [r["attention_cycles"] for r in records],
        "aggregation": [r["aggregation_cycles"] for r in records],
        "stalls": [r["stall_cycles"] for r in records],
    }


def _parts(records: Sequence[Record]) -> dict[str, list[float]]:
    return {title: [1e-12 * r["energy_pj"][part] for r in records] for part, title in _PARTS.items()}


def _stacked(axes: Axes, names: Sequence[str], parts: Mapping[str, Sequence[float]], unit: str = "") -> None:
    from matplotlib.ticker import EngFormatter

    places = range(len(names))
    bottom = [0.0] * len(names)
    for label, values in parts.items():
        for bar in axes.bar(places, values, bottom=bottom, label=label):
            bar.sticky_edges.y[:] = [0.0]  # one without height would end the axis at the top of those below it
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    axes.yaxis.set_major_formatter(EngFormatter(unit))
    _label(axes, names)


def _grouped(axes: Axes, names: Sequence[str], series: Mapping[str, Sequence[float]]) -> None:
    width = 0.8 / len(series)
    for number, (label, values) in enumerate(series.items()):
        axes.bar([place + (number + 0.5) * width - 0.4 for place in range(len(names))], values, width, label=label)
    _label(axes, names)


def _label(axes: Axes, names: Sequence[str]) -> None:
    """Upright where they would run into each other."""
    axes.set_xticks(range(len(names)), names, rotation=90 if sum(map(len, names)) > 40 else 0)
