"""``qgnn memory``: what a training step keeps and allocates."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    DataRootOption,
    DeviceOption,
    JsonLines,
    JsonOption,
    console_for,
    narrow_table,
    one_line_errors,
    progress,
    quiet_profiler,
)

if TYPE_CHECKING:
    from rich.table import Table

commands = typer.Typer()


def _memory_tables(rows: Sequence[dict[str, Any]], layers: bool) -> Iterator[Table]:
    """A row for each scheme; with ``layers``, a table for each scheme of what its layers keep."""

    def cells(row: dict[str, Any], form: str, unit: float, *keys: str) -> list[str]:
        return ["" if row[key] is None else f"{row[key] / unit:{form}}" for key in keys]

    head, printed = rows[0], any(row["printed_mb"] is not None for row in rows)
    sizes = narrow_table(
        f"{head['dataset']}, {head['model']}, hidden {head['hidden']}: MB of a training step; PyG's layers emulate the scheme",
        *("feature\nmaps", "masks", "kept for\nbackward", "allocated", "PyG:\nkept", "PyG:\nallocated"),
        *["Bqain's\nGCN"] * printed,
    )
    ratios = narrow_table(
        "The same, as ratios",
        *("feature maps\n/ FP32", "kept\n/ FP32", "allocated\n/ FP32", "kept /\nPyG's FP32", "kept /\nemulated"),
    )
    for row in rows:
        bytes_of = ("feature_map", "mask", "saved", "allocated", "pyg_saved", "pyg_allocated")
        megabytes = cells(row, ",.3f", 1e6, *(f"{name}_bytes" for name in bytes_of))
        sizes.add_row(row["scheme"], *megabytes, *(cells(row, "g", 1, "printed_mb") if printed else []))
        ratio_of = ("feature_map", "saved", "allocated", "pyg_fp32_saved", "emulation_saved")
        ratios.add_row(row["scheme"], *cells(row, ".2f", 1, *(f"{name}_ratio" for name in ratio_of)))
    yield sizes
    yield ratios
    for row in rows if layers else ():
        kinds = list(dict.fromkeys(kind for kept in row["layers"].values() for kind in kept))
        part = narrow_table(f"{row['scheme']}: bytes kept by each layer", *kinds)
        for layer, kept in row["layers"].items():
            part.add_row(layer or "between layers", *(f"{kept[kind]:,}" if kind in kept else "" for kind in kinds))
        yield part


@commands.command(
    epilog="Example: qgnn memory --dataset Cora --model gcn --scheme fixed-8,fixed-4,msfp12 --hidden 128 --layers",
    help="Measure what a training step keeps for backward and allocates, scheme by scheme, beside FP32, PyG's layers and plain emulation.",
)
def memory(
    dataset: Annotated[str, typer.Option(help="As qgnn train takes it, such as Cora or PROTEINS.")],
    model: Annotated[str, typer.Option(help="gcn, gat, gin or sage.")] = "gcn",
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            metavar="S,S", help="Schemes; repeatable. By default fp32,fp32/saved=int4,fixed-8,fixed-4,msfp16,msfp12."
        ),
    ] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Width of the hidden layers; else the recipe's.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Print what each layer keeps, by kind, too.")] = False,
    data_root: DataRootOption = None,
    device: DeviceOption = "cpu",
    json_to: JsonOption = None,
) -> None:
    """A tensor counts while autograd keeps it; parameters, data and graphs, which are there anyway, do not."""
    quiet_profiler()
    rows: list[dict[str, Any]] = []
    with one_line_errors(lambda: f"interrupted after {len(rows)} rows"):
        from .. import quant
        from ..data import load
        from ..perf import memory as engine

        names = scheme or ["fp32,fp32/saved=int4,fixed-8,fixed-4,msfp16,msfp12"]
        schemes = [quant.parse(name) for text in names for name in re.split(r",\s*(?=[a-z])", text)]
        lines, loaded = JsonLines(json_to), load(dataset, data_root)
        with progress() as show:
            for row in engine.rows(loaded, model, schemes, hidden, device):
                rows.append(row)
                lines.write(row)
                show(row["scheme"], len(rows), len(schemes))
        for table in _memory_tables(rows, layers):
            console_for(json_to).print(table)
