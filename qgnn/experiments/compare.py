"""A table with our numbers beside the printed ones, as Markdown, CSV and records."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .. import quant
from ..results import summary
from ..trace import write_whole
from . import densities
from .reproduce import Plan
from .store import Key
from .table import Table

HEADER = (
    *("row", "scheme", "printed", "at best validation", "best over epochs"),
    *("bits printed", "bits", "compression printed", "compression", "seeds"),
)
DENSITY_HEADER = (
    *("row", "scheme", "at best validation", "best over epochs", "memory density printed", "memory density"),
    *("arithmetic density printed", "arithmetic density", "seeds"),
)
MEASURES = ("test_acc", "test_acc_best_over_epochs", "average_bits", "compression")


def compare(plan: Plan, finished: Mapping[Key, dict[str, Any]]) -> dict[str, Any]:
    """One row as a flat record: printed numbers, ours as mean and sample standard deviation (``_sd``) over all runs, seeds and folds alike, and the
    state: "done", "partly done", "not run", "failed", "printed only" or "data missing"."""
    row, records = plan.row, plan.records(finished)
    printed, printed_sd = row.printed or (None, None)
    ours: Mapping[Any, Any] = summary(records).iloc[0].to_dict() if records else {}
    means = {name: _finite(ours.get(name)) for m in MEASURES for name in (m, f"{m}_sd")}
    return {
        "row": row.id,
        "dataset": row.dataset,
        "model": row.model,
        "scheme": row.scheme,
        "metric": row.metric,
        "printed": printed,
        "printed_sd": printed_sd,
        "printed_bits": row.bits,
        "printed_compression": row.compression,
        **means,
        "runs": len(records),
        "runs_wanted": len(plan.cells),
        "folds": plan.folds,
        "state": _state(plan, len(records)),
        "note": row.note,
    }


def _densities(plan: Plan, finished: Mapping[Key, dict[str, Any]]) -> dict[str, float | None]:
    """Printed densities, the row's or else the published ones of its scheme; and ours: means over the runs."""
    names = ("memory_density", "arithmetic_density")
    runs = [densities.of_record(record) for record in plan.records(finished)]
    means: dict[str, float | None] = {}
    for name in names:
        known = [value for run in runs if (value := run[name]) is not None]
        means[name] = fmean(known) if known and len(known) == len(runs) else None
    if plan.row.densities is None and plan.row.scheme is not None:
        shown = [densities.printed(quant.parse(plan.row.scheme), kind) for kind in ("memory", "arithmetic")]
    else:
        shown = list(plan.row.densities or (None, None))
    return {f"printed_{name}": value for name, value in zip(names, shown, strict=True)} | means


def _finite(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _state(plan: Plan, runs: int) -> str:
    if plan.row.scheme is None:
        return "printed only"
    if plan.missing:
        return "data missing"
    if runs:
        return "done" if runs == len(plan.cells) else "partly done"
    return "failed" if plan.failed else "not run"


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """What stands under :data:`HEADER` for a row of :func:`compare`."""
    short, long = (".3f", ".3f") if entry["metric"] == "mae" else (".1f", ".2f")
    best = _text(entry, "test_acc", long) if entry["runs"] else entry["state"]
    return (
        *(entry["row"], entry["scheme"] or ""),
        *(_text(entry, "printed", short), best, _text(entry, "test_acc_best_over_epochs", long)),
        *(_text(entry, "printed_bits", "g"), _text(entry, "average_bits", ".2f")),
        *(_text(entry, "printed_compression", "g"), _text(entry, "compression", ".1f"), _seeds(entry)),
    )


def _density_cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """What stands under :data:`DENSITY_HEADER`."""
    best = _text(entry, "test_acc", ".2f") if entry["runs"] else entry["state"]
    names = ("memory_density", "arithmetic_density")
    densities = (_text(entry, f"{before}{name}", ".3g") for name in names for before in ("printed_", ""))
    over = _text(entry, "test_acc_best_over_epochs", ".2f")
    return entry["row"], entry["scheme"] or "", best, over, *densities, _seeds(entry)


def _text(entry: Mapping[str, Any], name: str, form: str) -> str:
    mean, deviation = entry[name], entry.get(f"{name}_sd")
    if mean is None:
        return ""
    return f"{mean:{form}}" if deviation is None else f"{mean:{form}} ± {deviation:{form}}"


def _seeds(entry: Mapping[str, Any]) -> str:
    """ "10", "3 of 10", "2 x 10 folds" or, when these are not complete, "7 of 20 runs"."""
    runs, wanted, splits = entry["runs"], entry["runs_wanted"], entry["folds"]
    if splits == 1:
        return f"{runs} of {wanted}" if 0 < runs < wanted else f"{runs or ''}"
    return f"{runs} of {wanted} runs" if 0 < runs < wanted else f"{runs // splits} x {splits} folds" if runs else ""


def _remarks(plans: list[Plan]) -> list[str]:
    """What the reader has to know beside the numbers: rows that are printed only, data to download, trainings that failed."""
    reasons: dict[str, list[str]] = {}
    for plan in plans:
        if plan.row.note:
            reasons.setdefault(plan.row.note, []).append(plan.row.id)
        if plan.missing:
            reasons.setdefault(f"data missing: {plan.missing}", []).append(plan.row.id)
    failed = dict.fromkeys(sentence for plan in plans for sentence in plan.failed)
    return [f"{', '.join(rows)}: {' '.join(reason.split())}" for reason, rows in reasons.items()] + [
        f"failed: {' '.join(sentence.split())}" for sentence in failed
    ]


def write(table: Table, plans: list[Plan], finished: Mapping[Key, dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Writes ``out/TABLE.md`` and ``out/TABLE.csv``, each whole or not at all, and returns their rows as :func:`compare` gives them."""
    entries = [compare(plan, finished) for plan in plans]
    if table.kind == "density":
        entries = [entry | _densities(plan, finished) for plan, entry in zip(plans, entries, strict=True)]
    write_whole(out / f"{table.name}.md", markdown(table, plans, entries))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(entries[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in entry.items()} for entry in entries)
    write_whole(out / f"{table.name}.csv", text.getvalue())
    return entries


def markdown(table: Table, plans: list[Plan], entries: list[dict[str, Any]]) -> str:
    """The table as Markdown that reads well as plain text, too."""
    shown = (
        [DENSITY_HEADER, *map(_density_cells, entries)] if table.kind == "density" else [HEADER, *map(_cells, entries)]
    )
    notes = "".join(f"- {remark}\n" for remark in _remarks(plans))
    return (
        f"# {table.title}\n\nPrinted: {table.source}.\n"
        "Ours: mean ± sample standard deviation over all runs, at the epoch of the best validation. Best over epochs is the papers' protocol,\n"
        "which looks at the test set.\n\n" + "\n".join(aligned(shown, left=2)) + "\n" + (f"\n{notes}" if notes else "")
    )


def aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """The lines of a Markdown table; the first row is its head, and the first ``left`` columns are text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = [str.ljust if i < left else str.rjust for i in range(len(widths))]
    head, *body = (
        f"| {' | '.join(pad(text, width) for pad, text, width in zip(align, row, widths, strict=True))} |"
        for row in rows
    )
    rule = "|".join("-" * (width + 2) if i < left else "-" * (width + 1) + ":" for i, width in enumerate(widths))
    return [head, f"|{rule}|", *body]
