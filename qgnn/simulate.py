"""``qgnn simulate``: what its options name, its report and the tables that it prints. Loads no torch, but for a workload that comes from a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from . import accel
from .accel.config import MAX_BITS
from .accel.report import comparison, to_dict, write
from .accel.sweep import Row, configurations, save, sweep
from .accel.trace import write_trace

_BEST = 10
"""Rows of a sweep that are printed; its file has all."""


def read_workload(
    file: Path | None,
    model: str | None,
    dataset: str | None,
    data_root: Path | None,
    bits: str | None,
    hidden: int | None,
) -> accel.Workload:
    """The workload that the options name.

    Raises:
        ValueError: they name none, or two.
    """
    if file is not None:
        others = {"model": model, "dataset": dataset, "data-root": data_root, "bits": bits, "hidden": hidden}
        given = [f"--{option}" for option, value in others.items() if value is not None]
        if given:
            raise ValueError(f"--workload {file} holds graph, layers and widths; leave out {', '.join(given)}")
        return accel.Workload.load(file)
    if model is None or dataset is None:
        raise ValueError(
            "name what runs: --workload FILE; or --model FILE --dataset D, what qgnn.save wrote and the data whose graph it runs on; "
            "or --model gcn --bits uniform:4 --dataset D"
        )
    from .export import workload_from

    return workload_from(model, dataset, data_root, bits, hidden)


def baselines(names: str) -> list[int]:
    """Widths of such as ``int4,int8``, in bits; of an empty text, none.

    Raises:
        ValueError: another name.
    """
    widths = []
    for name in names.split(",") if names else ():
        found = re.fullmatch(r"int(\d+)", name.strip().lower())
        if found is None or not 1 <= int(found[1]) <= MAX_BITS:
            raise ValueError(f"--baseline takes int1 to int{MAX_BITS}, separated by commas, got {name!r}")
        widths.append(int(found[1]))
    return widths


def axes(pairs: Sequence[str], base: accel.Config, settings: Mapping[str, str]) -> dict[str, list[str]]:
    """Keys of ``--sweep KEY=A,B,C`` with their values.

    Args:
        settings: keys that are set, and so cannot be swept.

    Raises:
        ValueError: no such pair, key or value, or a key that comes twice.
    """
    found: dict[str, list[str]] = {}
    for pair in pairs:
        key, _, values = pair.partition("=")
        if not key or not all(values.split(",")):
            raise ValueError(f"--sweep takes KEY=A,B,C, got {pair!r}")
        if key in found or key in settings:
            raise ValueError(f"{key} is given twice; put all its values into one --sweep, separated by commas")
        found[key] = values.split(",")
    configurations(base, found)
    return found


def swept(
    workload: accel.Workload,
    base: accel.Config,
    axes: Mapping[str, Sequence[str]],
    uniform: Sequence[int],
    table: Path,
    show: Callable[[str, int, int], None],
) -> Iterator[Row]:
    """Rows of the sweep, each when it stands in the CSV file ``table``."""

    def progress(done: int, of: int) -> None:
        show(workload.name or "sweep", done, of)

    return save(sweep(workload, base, axes, uniform, progress), table)


def report(
    workload: accel.Workload, config: accel.Config, uniform: Sequence[int], trace: Path | None, out: Path | None
) -> tuple[Row, list[Path]]:
    """The document of :func:`qgnn.accel.report.to_dict`, with the comparison, and the files that were asked for and written."""
    files = []
    if trace is not None:
        write_trace(workload, config, trace)
        files.append(trace)
    result = accel.simulate(workload, config)
    document = to_dict(result, workload, comparison(workload, config, baselines=uniform))
    if out is not None:
        files += write(out, document)
    return document, files


# Tables


def tables(document: Mapping[str, Any]) -> Iterator[Table]:
    """Totals, layers, and the comparison with uniform widths."""
    yield _totals(document)
    yield _cycles(document["layers"])
    yield _costs(document["layers"])
    yield _comparison(document["comparison"])


def best(rows: Sequence[Row], keys: Sequence[str]) -> Table:
    """The rows of a sweep with the fewest cycles."""
    speedups = [name for name in rows[0] if name.endswith("_speedup")]
    over = (f"over\n{name.removesuffix('_speedup').upper()}" for name in speedups)
    shown = sorted(rows, key=lambda row: int(row["total_cycles"]))[:_BEST]
    table = _table(f"fewest cycles of {len(rows)} configurations", keys, ("cycles", *over, "µJ"))
    for row in shown:
        ratios = (_ratio(row[name]) for name in speedups)
        table.add_row(*(str(row[key]) for key in keys), f"{row['total_cycles']:,}", *ratios, _micro(row["energy_pj"]))
    return table


def _table(title: str, names: Sequence[str], numbers: Sequence[str], header: bool = True) -> Table:
    """Columns of names, then of numbers, which lose no digit where the terminal is narrow."""
    table = Table(title=title, title_justify="left", show_header=header)
    for name in names:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _totals(document: Mapping[str, Any]) -> Table:
    graph, total, memory = document["workload"], document["total"], document["memory"]
    table = _table(f"{escape(graph['name']) or 'the workload'} on the accelerator", [""], [""], header=False)
    energy = total["energy_pj"]
    cycles = {
        "cycles": "total",
        "  update": "update",
        "    attention in it": "attention",
        "  aggregation": "aggregation",
        "  stalls: waiting for the HBM": "stall",
        "cycles without overlap of loading and computing": "serial",
    }
    rows = {
        "nodes": f"{graph['nodes']:,}",
        "edges": f"{graph['edges']:,}",
        **{label: f"{total[f'{key}_cycles']:,}" for label, key in cycles.items()},
        "time, µs": f"{document['seconds'] * 1e6:,.2f}",
        "energy, µJ": _micro(sum(energy.values())),
        **{f"  {part.replace('_', ' ')}": _micro(picojoules) for part, picojoules in energy.items()},
        "DRAM read, MiB": _mebibytes(total["dram_read_bits"]),
        "DRAM written, MiB": _mebibytes(total["dram_write_bits"]),
        "SRAM read, MiB": _mebibytes(total["sram_read_bits"]),
        "SRAM written, MiB": _mebibytes(total["sram_write_bits"]),
        "average bits, mean over layers": _ratio(memory["average_bits_by_layer"]),
        "average bits, weighted by dimension": _ratio(memory["average_bits_by_dimension"]),
        "compression of the feature maps": _ratio(memory["ratio_without_steps"]),
        "the same, steps counted": _ratio(memory["ratio"]),
    }
    for label, value in rows.items():
        table.add_row(label, value)
    return table


def _cycles(layers: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("cycles", ("layer", "kind"), ("in", "out", "bits", "update", "aggr.", "stalls", "total"))
    for number, layer in enumerate(layers):
        sizes = (str(layer["f_in"]), str(layer["f_out"]), f"{layer['average_bits']:.2f}")
        cycles = (f"{layer[f'{part}_cycles']:,}" for part in ("update", "aggregation", "stall", "total"))
        table.add_row(escape(layer["name"]) or str(number), layer["kind"], *sizes, *cycles)
    return table


def _costs(layers: Sequence[Mapping[str, Any]]) -> Table:
    numbers = ("MACs used,\nupdate", "MACs used,\naggr.", "DRAM\nMiB", "SRAM\nMiB", "energy\nµJ")
    table = _table("use of the array, traffic and energy", ("layer",), numbers)
    for number, layer in enumerate(layers):
        table.add_row(
            escape(layer["name"]) or str(number),
            *(f"{layer[f'{part}_utilisation']:.1%}" for part in ("update", "aggregation")),
            *(_mebibytes(layer[f"{kind}_read_bits"] + layer[f"{kind}_write_bits"]) for kind in ("dram", "sram")),
            _micro(sum(layer["energy_pj"].values())),
        )
    return table


def _comparison(comparison: Mapping[str, Any]) -> Table:
    """Under every accounting of a 0/1 input of the first layer and every order of the rows."""
    uniform = comparison["baselines"]
    ratios = [(measure, name) for measure in ("speedup", "energy_ratio") for name in uniform]
    heads = (f"{'speedup' if measure == 'speedup' else 'energy'}\n{name}" for measure, name in ratios)
    table = _table(
        "speedup over uniform widths, and their energy over ours", ("0/1 input\ncharged", "order"), ("cycles", *heads)
    )
    for row in comparison["rows"]:
        if row["widths"] == "given":
            names = (row["first_layer"].replace("_", " "), row["order"])
            table.add_row(*names, f"{row['total_cycles']:,}", *(_ratio(row[measure][name]) for measure, name in ratios))
    return table


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _micro(picojoules: float) -> str:
    return f"{picojoules * 1e-6:,.2f}"


def _mebibytes(bits: int) -> str:
    return f"{bits / 2**23:,.2f}"
