"""What a simulation found, as data with a manifest, and as the CSV, JSON, Markdown and plots that are made of these data.

Nothing in a report says when or where it was made: the same workload, configuration and version give the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from .. import __version__
from .config import Config, FirstLayer, Order
from .simulator import LayerResult, Result, simulate
from .workload import Workload, baseline

Record = dict[str, Any]

GIVEN = "given"
"""Name, among the uniform baselines, of the widths that the workload itself has."""

ACCOUNTINGS: tuple[FirstLayer, ...] = ("binary", "as_learned")
"""What A2Q's accelerator can have charged for the 0/1 input of the first layer; its section A.7.5 does not say."""


# Data


def to_dict(result: Result, workload: Workload, comparison: Mapping[str, Any] | None = None) -> Record:
    """The report as values that JSON has.

    Args:
        result: of ``workload``, which is asked for its hashes alone.
        comparison: what :func:`comparison` gave, to be part of the report.

    Returns:
        ``manifest``: the version of qgnn, SHA-256 of the configuration, of the graph and of the layers with their widths, and every key of the
        configuration with its value, unit and source. ``notes``: what a reader must know. ``workload``, ``layers``, ``total``, ``memory``: cycles,
        operations, bits of traffic, pJ. ``seconds``. ``comparison``, if given. A number that is not finite is None.
    """
    choices = [dict(zip(("key", "value", "unit", "source"), row, strict=True)) for row in result.config.describe()]
    document = {
        "manifest": {
            "qgnn": __version__,
            "sha256": {"configuration": _digest({c["key"]: c["value"] for c in choices}), **workload.fingerprint()},
            "configuration": choices,
        },
        "notes": list(result.notes),
        "workload": {"name": result.name, "nodes": result.nodes, "edges": result.edges, "layers": len(result.layers)},
        "layers": [asdict(layer) for layer in result.layers],
        "total": asdict(result.total),
        "memory": asdict(result.memory),
        "seconds": result.seconds,
    }
    if comparison is not None:
        document["comparison"] = comparison
    plain: Record = _plain(document)
    return plain


def comparison(workload: Workload, config: Config | None = None, *, baselines: Sequence[int] = (4, 8)) -> Record:
    """The workload beside the same layers with one width for all rows, on the same array under the same choices.

    Args:
        config: all choices but ``first_layer`` and ``order``, which take each of their values in turn.
        baselines: widths of the baselines, bits; 4 is Degree-Quant's INT4, of which A2Q's speedups are.

    Returns:
        ``configured``: the configuration's own ``first_layer`` and ``order``. ``baselines``: their names, such as "INT4". ``rows``: one for each
        way to charge a binary first layer, each order, and each of "given" (the workload's own widths) and the baselines: cycles, utilisations
        and energy over all layers; by baseline ``speedup``, its total cycles over the row's, ``compute_speedup``, the same without stalls, and
        ``energy_ratio``.

    Raises:
        ValueError: a width out of range.
    """
    config = config or Config()
    uniform = {f"INT{bits}": baseline(workload, bits) for bits in baselines}
    rows = []
    for first_layer in dict.fromkeys((*ACCOUNTINGS, config.first_layer)):
        for order in get_args(Order):
            chosen = replace(config, first_layer=first_layer, order=order)
            totals = {name: simulate(load, chosen).total for name, load in {GIVEN: workload, **uniform}.items()}
            for widths, total in totals.items():
                row = {"first_layer": first_layer, "order": order, "widths": widths}
                rows.append(row | _compared(total, {name: totals[name] for name in uniform}))
    own = {"first_layer": config.first_layer, "order": config.order}
    plain: Record = _plain({"configured": own, "baselines": list(uniform), "rows": rows})
    return plain


_COMPARED = (
    *("average_bits", "update_cycles", "attention_cycles", "aggregation_cycles", "stall_cycles", "total_cycles"),
    *("update_utilisation", "aggregation_utilisation", "energy_pj"),
)


def _compared(total: LayerResult, uniform: Mapping[str, LayerResult]) -> Record:
    row = {key: getattr(total, key) for key in _COMPARED}
    return row | {
        "speedup": {name: _ratio(base.total_cycles, total.total_cycles) for name, base in uniform.items()},
        "compute_speedup": {name: _ratio(base.compute_cycles, total.compute_cycles) for name, base in uniform.items()},
        "energy_ratio": {
            name: _ratio(sum(base.energy_pj.values()), sum(total.energy_pj.values())) for name, base in uniform.items()
        },
    }


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None


def _digest(values: Mapping[str, Any]) -> str:
    """Of numbers as floats: 1 and 1.0 are the same choice."""
    same = {key: float(v) if isinstance(v, int) and not isinstance(v, bool) else v for key, v in values.items()}
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """With None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat(record: Mapping[str, Any], prefix: str = "") -> Record:
    """With the names of nested dicts joined by "_", for a line of CSV."""
    line: Record = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            line |= flat(value, f"{prefix}{key}_")
        else:
            line[f"{prefix}{key}"] = value
    return line


# Files


def write(out: str | Path, document: Record, *, plots: bool = True) -> list[Path]:
    """Writes a report of :func:`to_dict` into a folder, made where it is missing: ``report.json``, ``report.md``, ``layers.csv``, with a comparison
    ``comparison.csv``, and plots as SVG.

    Returns:
        The files.

    Raises:
        OSError: a file cannot be written.
    """
    texts = {
        "report.json": dumps(document),
        "report.md": markdown(document),
        "layers.csv": _csv([{"layer": number, **layer} for number, layer in enumerate(document["layers"])]),
    }
    if "comparison" in document:
        texts["comparison.csv"] = _csv(document["comparison"]["rows"])
    if plots:
        from .plots import svgs  # matplotlib takes a second to import

        texts |= svgs(document)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return [folder / name for name in texts]


def dumps(document: Record) -> str:
    """The text of ``report.json``."""
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _csv(records: Iterable[Record]) -> str:
    lines = [flat(record) for record in records]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


# Markdown

_Columns = Sequence[tuple[str, str, str]]
"""Title, key and form of every column: "" text, "B" bits shown as bytes, "nJ" pJ shown as nJ, "x" a ratio, else a format specification. None is
shown as "–"."""

_NAMES: _Columns = (("layer", "label", ""), ("kind", "kind", ""))
_PHASES: _Columns = (
    ("update", "update_cycles", ",d"),
    ("of it attention", "attention_cycles", ",d"),
    ("aggregation", "aggregation_cycles", ",d"),
    ("stalls", "stall_cycles", ",d"),
    ("total", "total_cycles", ",d"),
    ("utilisation: update", "update_utilisation", ".1%"),
    ("aggregation", "aggregation_utilisation", ".1%"),
)
_CYCLES: _Columns = (
    *_NAMES,
    ("F_in", "f_in", ",d"),
    ("F_out", "f_out", ",d"),
    ("average bits", "average_bits", ".3f"),
    *_PHASES,
    ("without overlap", "serial_cycles", ",d"),
)
_OPERATIONS: _Columns = (
    *_NAMES,
    ("int MACs", "int_macs", ",d"),
    ("int adds", "aggregation_adds", ",d"),
    ("float multiplications", "float_multiplies", ",d"),
    ("comparisons", "nns_comparisons", ",d"),
)
_MEMORIES = {"dram_read": "HBM read", "dram_write": "HBM write", "sram_read": "SRAM read", "sram_write": "SRAM write"}
_TRAFFIC: _Columns = (*_NAMES, *((title, f"{key}_bits", "B") for key, title in _MEMORIES.items()))
_OPERANDS: _Columns = (("operand, all layers", "operand", ""), *((title, key, "B") for key, title in _MEMORIES.items()))
_PARTS: _Columns = (
    ("integer", "energy_pj_integer", "nJ"),
    ("float", "energy_pj_float", "nJ"),
    ("SRAM dynamic", "energy_pj_sram_dynamic", "nJ"),
    ("SRAM leakage", "energy_pj_sram_leakage", "nJ"),
    ("HBM", "energy_pj_hbm", "nJ"),
    ("total", "energy", "nJ"),
)
_FEATURES: _Columns = (
    ("features and steps, bytes (eq. 19)", "eq19_bits", "B"),
    ("FP32 over that", "ratio", "x"),
    ("FP32 over the features alone", "ratio_without_steps", "x"),
    ("steps over features (eq. 20)", "eq20", ".4f"),
    ("average bits by dimension", "average_bits_by_dimension", ".4f"),
    ("by layer", "average_bits_by_layer", ".4f"),
)
_CHOICES: _Columns = (("binary input charged", "first_layer", ""), ("order", "order", ""))
_CONFIGURATION: _Columns = (("key", "key", ""), ("value", "value", ""), ("unit", "unit", ""), ("source", "source", ""))


def markdown(document: Record) -> str:
    """The report for a reader: tables that read well as plain text, too."""
    workload, manifest = document["workload"], document["manifest"]
    lines = [_line(layer, label=f"{i} {layer['name']}".rstrip()) for i, layer in enumerate(document["layers"])]
    lines.append(_line(document["total"], label="total", f_in=None, f_out=None))
    moved = document["total"]["traffic"]
    operands = [
        {"operand": name} | {memory: moved[memory].get(name, 0) for memory in _MEMORIES}
        for name in dict.fromkeys(name for memory in _MEMORIES for name in moved[memory])
    ]
    parts = [
        f"# {workload['name'] or 'A workload'} on the bit-serial accelerator",
        f"{workload['nodes']:,} nodes, {workload['edges']:,} edges, {workload['layers']} layers: {lines[-1]['total_cycles']:,} cycles, "
        f"{_si(document['seconds'], 's')}, {_si(lines[-1]['energy'] * 1e-12, 'J')}.",
        "\n".join(f"- {note}" for note in document["notes"]),
        "## Cycles",
        _table(_CYCLES, lines),
        "Average bits as charged, in all weighted by dimension. Stalls: the array waits for the HBM. Utilisation: part of the MAC cycles that do "
        "something, attention and constants left out.",
        "## Operations",
        _table(_OPERATIONS, lines),
        "## Traffic, bytes",
        _table(_TRAFFIC, lines),
        _table(_OPERANDS, operands),
        "## Energy, nJ",
        _table((*_NAMES, *_PARTS), lines),
        "## Memory of the feature maps",
        _table(_FEATURES, [document["memory"]]),
        *(_compared_parts(document["comparison"]) if "comparison" in document else ()),
        "## Configuration",
        _table(_CONFIGURATION, manifest["configuration"]),
        "\n".join(f"- SHA-256 of the {name}: {value}" for name, value in manifest["sha256"].items()),
        f"qgnn {manifest['qgnn']}",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _compared_parts(comparison: Record) -> list[str]:
    names, rows = comparison["baselines"], [_line(row) for row in comparison["rows"]]
    titles = {
        "speedup": "speedup over {}",
        "compute_speedup": "without stalls over {}",
        "energy_ratio": "energy of {} over given",
    }
    ratios = [(title.format(name), f"{key}_{name}", "x") for key, title in titles.items() for name in names]
    widths = (*_CHOICES, ("widths", "widths", ""))
    return [
        "## Comparison",
        "The same layers on the same array under the same choices, but for what a binary input is charged and the order of the rows. Where no layer "
        "has a binary input, the first choice changes nothing. "
        f'Widths: "{GIVEN}" are the workload\'s own'
        + (f"; {' and '.join(names)}: one width for all rows." if names else "."),
        _table((*_CHOICES, *ratios), [row for row in rows if row["widths"] == GIVEN]) if names else "",
        "### Cycles against order",
        _table((*widths, ("average bits", "average_bits", ".3f"), *_PHASES), rows),
        "### Energy against order, nJ",
        _table((*widths, *_PARTS), rows),
    ]


def _line(record: Record, **more: Any) -> Record:
    return {**flat(record), "energy": sum(record["energy_pj"].values()), **more}


def _table(columns: _Columns, lines: Sequence[Record]) -> str:
    rows = [
        [title for title, _, _ in columns],
        *([_cell(line[key], form) for _, key, form in columns] for line in lines),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = [str.rjust if form else str.ljust for _, _, form in columns]
    rule = "|".join("-" * (w + 1) + (":" if form else "-") for w, (_, _, form) in zip(widths, columns, strict=True))
    head, *body = (
        f"| {' | '.join(pad(cell, width) for pad, cell, width in zip(align, row, widths, strict=True))} |"
        for row in rows
    )
    return "\n".join([head, f"|{rule}|", *body])


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "–"
    if form == "B":
        return f"{value / 8:,.0f}"
    if form == "nJ":
        return f"{value / 1000:,.1f}"
    if form == "x":
        return f"{value:.2f}"
    if form:
        return f"{value:{form}}"
    if isinstance(value, bool):
        return str(value).lower()
    return value.replace("|", "\\|") if isinstance(value, str) else f"{value:,.15g}"


def _si(value: float, unit: str) -> str:
    """Four digits and a prefix: 0.00123 s is 1.23 ms."""
    for factor, prefix in ((1, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n")):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}{unit}"
    return f"{value / 1e-12:.4g} p{unit}"
