"""``qgnn report``: what a folder of runs holds, as one HTML page that needs nothing else: styles and plots stand in it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from safetensors import SafetensorError, safe_open

from . import __version__, results
from .trace import read_traces

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]
Groups = dict[str, list[Record]]
Tables = dict[str, pd.DataFrame]
Draw = Callable[["Figure"], None]

CURVE_POINTS = 150
"""Epochs that a training curve shows at most, so that a page of many runs stays small."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .7rem; text-align: left; white-space: nowrap; border-bottom: 1px solid #e4e4e4 } th { background: #f5f5f5 }
figure { display: inline-block; margin: 1rem 1rem 0 0; vertical-align: top } figcaption { max-width: 32rem; font-size: .9rem }
svg { max-width: 100%; height: auto } .none { color: #666 } summary { cursor: pointer }
"""
# A browser then fetches nothing, whatever a name in the records says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_COLUMNS = (
    ("test", "test_acc", ".2f"),
    ("validation", "val_acc", ".2f"),
    ("best over epochs", "test_acc_best_over_epochs", ".2f"),
    ("average bits", "average_bits", ".2f"),
    ("average bits, all maps", "average_bits_all", ".2f"),
    ("compression", "compression", ".1f"),
    ("integer model: test", "integer_test_acc", ".2f"),
    ("ms a training step", "train_step_ms", ".2f"),
)
_RUN_COLUMNS = ("seed", "fold", "best_epoch", *(field for _, field, _ in _COLUMNS))


def page(folder: Path, progress: Callable[[int, int], None] | None = None) -> str:
    """The page of a folder that ``qgnn train --out`` or ``qgnn reproduce --out`` filled.

    Args:
        progress: called with (plots done, plots in all).

    Raises:
        ValueError: there is no such folder, or no run in it.
    """
    groups, left_out = _read(folder)
    traces, unread = _traces(folder / "traces", groups)
    damaged = [f"{left_out} damaged records"] * bool(left_out) + [f"{unread} damaged traces"] * bool(unread)
    plots = _plots(groups, traces)
    drawn: dict[str, list[str]] = {}
    for done, (section, caption, draw) in enumerate(plots, 1):
        drawn.setdefault(section, []).append(f"<figure>{_svg(draw)}<figcaption>{escape(caption)}</figcaption></figure>")
        if progress is not None:
            progress(done, len(plots))
    runs = sum(map(len, groups.values()))
    body = [
        f"<h1>qgnn: runs in {escape(folder.resolve().name)}</h1>",
        f"<p>{runs} runs; qgnn {escape(__version__)}. Figures are means over seeds and folds ± sample standard deviation. Test results are those "
        "at the epoch of the best validation result; the best over epochs looks at the test set, as the papers' protocol does.</p>",
        f'<p class="none">Left out: {", ".join(damaged)}.</p>' if damaged else "",
        _section("Summary", _summary(groups)),
        _section("Printed in the papers, and ours", _printed(folder)),
    ]
    for title, hint in _HINTS.items():
        body.append(_section(title, "".join(drawn.get(title, ())) or f'<p class="none">{escape(hint)}</p>'))
    body += [_section("Frozen models", _models(folder / "models")), _section("All runs", _runs(groups))]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>qgnn: {escape(folder.resolve().name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, body))
        + "\n</body>\n</html>\n"
    )


def summaries(folder: Path) -> list[Record]:
    """The table of :func:`page`: means and deviations of :func:`qgnn.results.summary`, and under ``run`` what they are of.

    Raises:
        ValueError: as :func:`page`.
    """
    groups, _ = _read(folder)
    return [{"run": label, **_means(records)} for label, records in groups.items()]


# Reading


def _read(folder: Path) -> tuple[Groups, int]:
    """The groups of a folder, and the number of damaged records."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; qgnn train --out DIR fills one")
    groups, left_out = _groups(results.read(folder / "results.jsonl"))
    if not groups:
        raise ValueError(f"{folder} has no results.jsonl with a finished run; qgnn train --out {folder} writes it")
    return groups, left_out


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _usable(record: Record) -> bool:
    texts = (*((k, str) for k in results.KEYS), ("metric", str | None))
    numbers = ("seed", *results.MEASURES)
    return all(isinstance(record.get(name), kind) for name, kind in texts) and all(
        record.get(name) is None or _is_number(record[name]) for name in numbers
    )


def _groups(records: list[Record]) -> tuple[Groups, int]:
    """The records by what was trained, and the number of those that are damaged. Runs of one scheme whose recipes differ are kept apart."""
    usable = [r for r in records if _usable(r)]
    recipes: dict[tuple[str, ...], dict[str, set[str]]] = {}
    for record in usable:
        values = recipes.setdefault(tuple(record[k] for k in results.KEYS), {})
        for name, value in _recipe(record).items():
            values.setdefault(name, set()).add(repr(value))
    differing = {key: {name for name, found in values.items() if len(found) > 1} for key, values in recipes.items()}
    groups: Groups = {}
    for record in usable:
        key = tuple(record[k] for k in results.KEYS)
        settings = [f"{name}={value}" for name, value in _recipe(record).items() if name in differing[key]]
        groups.setdefault(" ".join([*key, *settings]), []).append(record)
    return groups, len(records) - len(usable)


def _recipe(record: Record) -> dict[str, Any]:
    recipe = record.get("recipe")
    return recipe if isinstance(recipe, dict) else {}


def _traces(folder: Path, groups: Groups) -> tuple[dict[str, Tables], int]:
    """For every group that has traces, the tables "curve", "widths" and "aggregated" of all its runs; and the number of damaged traces."""
    identity = (*results.KEYS, "seed", "fold", "recipe")
    labels = {repr([r.get(k) for k in identity]): label for label, records in groups.items() for r in records}
    parts: dict[str, dict[str, list[pd.DataFrame]]] = {}
    unread = 0
    for trace in read_traces(folder):
        label = labels.get(repr([trace["record"].get(k) for k in identity]))
        try:
            frames = {name: _frame(trace[name], columns) for name, columns in _TRACE_COLUMNS.items()}
        except (AttributeError, TypeError, ValueError):
            unread += 1
            continue
        if label is not None:  # else its record was never written, because the run was interrupted just then
            for name, frame in frames.items():
                parts.setdefault(label, {}).setdefault(name, []).append(frame)
    tables = {
        label: {name: pd.concat(frames) for name, frames in parts[label].items()} for label in groups if label in parts
    }
    return tables, unread


_TRACE_COLUMNS = {
    "curve": ("epoch", "loss", "val", "test", "bits"),
    "widths": ("bits", "nodes", "in_degree"),
    "aggregated": ("low", "high", "nodes", "mean", "deviation"),
}


def _frame(rows: list[Record], columns: Sequence[str]) -> pd.DataFrame:
    frame = pd.DataFrame([{c: row.get(c) for c in columns} for row in rows], columns=list(columns)).astype("float64")
    return frame.assign(layer=[str(row.get("layer", "")) for row in rows])


# Tables


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def _table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    def row(kind: str, cells: Iterable[object]) -> str:
        return "<tr>" + "".join(f"<{kind}>{escape(str(cell))}</{kind}>" for cell in cells) + "</tr>\n"

    return f'<div class="wide"><table>\n{row("th", header)}{"".join(row("td", cells) for cells in rows)}</table></div>'


def _means(records: list[Record]) -> dict[str, Any]:
    """Means and deviations of one group."""
    row: Record = results.summary(records).to_dict("records")[0]  # type: ignore[assignment]  # its keys are strings
    return row


def _metric(means: Record) -> str:
    return str(means["metric"]) if means["metric"] == "mae" else f"{means['metric']}, %"


def _summary(groups: Groups) -> str:
    rows = []
    for label, records in groups.items():
        means, cells = _means(records), []
        for _, field, usual in _COLUMNS:
            form = ".4f" if "_acc" in field and means["metric"] == "mae" else usual
            mean, deviation = means[field], means[f"{field}_sd"]
            cell = "" if mean != mean else f"{mean:{form}}"
            cells.append(cell if deviation != deviation else f"{cell} ± {deviation:{form}}")
        rows.append([label, _metric(means), means["seeds"], means["runs"], *cells])
    return _table(["run", "metric", "seeds", "runs", *(title for title, _, _ in _COLUMNS)], rows)


def _runs(groups: Groups) -> str:
    rows = [
        [label, *("" if r.get(c) is None else f"{r[c]:.6g}" if _is_number(r[c]) else r[c] for c in _RUN_COLUMNS)]
        for label, records in groups.items()
        for r in records
    ]
    return f"<details><summary>{len(rows)} runs</summary>{_table(['run', *_RUN_COLUMNS], rows)}</details>"


def _printed(folder: Path) -> str:
    """The tables that ``qgnn reproduce`` left in the folder, deviations beside their values."""
    parts = []
    for path in sorted(folder.glob("*.csv")):
        try:
            header, *lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, csv.Error):
            parts.append(f'<p class="none">{escape(path.name)} cannot be read; qgnn reproduce writes it anew.</p>')
            continue
        rows = [dict(zip(header, line, strict=False)) for line in lines]
        shown = [c for c in header if not c.endswith("_sd")]
        cells = [[" ± ".join(filter(None, (row.get(c), row.get(f"{c}_sd")))) for c in shown] for row in rows]
        parts.append(f"<h3>{escape(path.stem)}</h3>{_table(shown, cells)}")
    return "".join(parts) or '<p class="none">None in this folder; qgnn reproduce TABLE --out DIR writes one.</p>'


def _models(folder: Path) -> str:
    rows = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                tensors = str(len(file.keys()))
        except (SafetensorError, OSError):
            tensors = "cannot be read"
        rows.append([path.name, f"{path.stat().st_size:,}", tensors])
    if not rows:
        return '<p class="none">None in this folder; qgnn train --scheme int8 --out DIR keeps one for each run.</p>'
    return f"<details><summary>{len(rows)} models</summary>{_table(['file', 'bytes', 'tensors'], rows)}</details>"


# Plots


def _svg(draw: Draw) -> str:
    """What ``draw`` draws, as an SVG element. Text stays text; names are shown as they are, never as formulas."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "qgnn", "text.parse_math": False, "font.size": 9}):
        figure = Figure(figsize=(5.2, 3.2))
        figure.subplots_adjust(
            left=0.13, right=0.87, bottom=0.18, top=0.97
        )  # a layout engine would draw everything twice
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    # HTML knows the namespaces by itself
    return re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :])


def _plots(groups: Groups, traces: dict[str, Tables]) -> list[tuple[str, str, Draw]]:
    """Every plot: its section, its caption, and what draws it."""
    plots: list[tuple[str, str, Draw]] = []
    places: dict[tuple[str, str], dict[str, Record]] = {}
    for label, records in groups.items():
        means = _means(records)
        if means["test_acc"] == means["test_acc"] and means["average_bits"] > 0:
            dataset = records[0]["dataset"]
            places.setdefault((dataset, _metric(means)), {})[label.removeprefix(f"{dataset} ")] = means
    for (dataset, metric), members in places.items():
        caption = f"{dataset}: test {metric} at the best validation epoch, mean and standard deviation."
        plots.append((_BITS, caption, partial(_draw_bits, members, metric)))
    for section, (name, draw, what) in _TRACED.items():
        for label, tables in traces.items():
            for layer in tables[name]["layer"].unique().tolist():
                rows = tables[name][tables[name]["layer"] == layer]
                plots.append(
                    (section, f"{label}, {layer}: {what}." if layer else f"{label}: {what}.", partial(draw, rows))
                )
    return plots


def _draw_bits(members: dict[str, Record], metric: str, figure: Figure) -> None:
    figure.set_layout_engine("constrained")  # names in the legend may be long
    axes = figure.add_subplot()
    markers = "osD^vP*X<>"
    for number, (label, means) in enumerate(members.items()):
        axes.errorbar(
            means["average_bits"], means["test_acc"], xerr=_error(means["average_bits_sd"]), yerr=_error(means["test_acc_sd"]),
            fmt=markers[number % len(markers)], capsize=2, label=label,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    ticks = [1, 2, 4, 8, 16, 32]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set(xlabel="average bits", ylabel=f"test {metric}")
    figure.legend(loc="outside right upper", fontsize=7)


def _error(deviation: float) -> float | None:
    return None if deviation != deviation else deviation


def _draw_widths(rows: pd.DataFrame, figure: Figure) -> None:
    """As A2Q's figures 4 and 10. The runs' nodes are counted together."""
    rows = rows.assign(edges=rows["nodes"] * rows["in_degree"])
    total = rows.groupby("bits")[["nodes", "edges"]].sum()
    axes = figure.add_subplot()
    axes.bar(total.index, total["edges"] / total["nodes"], color="#7fb77e")
    axes.set(xlabel="width, bits", ylabel="mean in-degree", xticks=list(total.index))
    right = axes.twinx()
    right.plot(total.index, total["nodes"], color="#d95f02", marker="o")
    right.set(ylabel="nodes, all runs", yscale="log")
    right.yaxis.set_major_formatter("{x:,.0f}")
    right.yaxis.set_minor_formatter("")


def _draw_magnitudes(rows: pd.DataFrame, figure: Figure) -> None:
    """As A2Q's figure 1 and Degree-Quant's figure 3."""
    groups = rows.groupby(["low", "high"])[["mean", "deviation"]].mean().reset_index()
    names = [
        f"{low:.0f}" if low >= high else f"{low:.0f}–{high:.0f}"
        for low, high in zip(groups["low"], groups["high"], strict=True)
    ]
    axes = figure.add_subplot()
    axes.bar(range(len(names)), groups["mean"], yerr=groups["deviation"], color="#8da0cb", capsize=2)
    axes.set(xlabel="in-degree", ylabel="magnitude")
    axes.set_xticks(range(len(names)), names, rotation=30)
    axes.set_ylim(bottom=0)


def _draw_curve(rows: pd.DataFrame, figure: Figure) -> None:
    epochs = rows.groupby("epoch")
    keep = slice(None, None, -(-len(epochs) // CURVE_POINTS))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for axes, names in ((upper, ("val", "test")), (lower, ("loss",))):
        for name in names:
            values = epochs[name].agg(["mean", "min", "max"]).iloc[keep]
            (line,) = axes.plot(values.index, values["mean"], label=name, linewidth=1)
            axes.fill_between(
                values.index, values["min"], values["max"], color=line.get_color(), alpha=0.2, linewidth=0
            )
    upper.set(ylabel="metric")
    upper.legend(fontsize=7)
    lower.set(xlabel="epoch", ylabel="loss")
    bits = epochs["bits"].mean().iloc[keep].dropna()
    if len(bits):
        right = lower.twinx()
        right.plot(bits.index, bits, color="#d95f02", linewidth=1)
        right.set_ylabel("bits", color="#d95f02")


_BITS = "Accuracy against bits"
_TRACED = {
    "Learned width against in-degree": (
        "widths",
        _draw_widths,
        "mean in-degree of the nodes of each width (bars) and their number (line)",
    ),
    "Aggregated magnitude against in-degree": (
        "aggregated",
        _draw_magnitudes,
        "magnitude of the values after the aggregation, mean and deviation",
    ),
    "Training curves": ("curve", _draw_curve, "mean over the runs, with the smallest and the largest value"),
}
_HINTS = {
    _BITS: "No record has a test result and an average width.",
    **dict.fromkeys(
        _TRACED,
        "Nothing in DIR/traces shows this. qgnn train --out DIR keeps a trace of every run that it trains; "
        "widths are learned by --scheme a2q.",
    ),
}
