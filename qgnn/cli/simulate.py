"""``qgnn simulate``: the accelerator's cycles; ``qgnn energy``: its energy beside that of a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .common import (
    AcceleratorFileOption,
    AcceleratorOption,
    AcceleratorSettingsOption,
    DataRootOption,
    JsonLines,
    JsonOption,
    accelerator_of,
    check_file,
    console_for,
    key_values,
    make_folder,
    narrow_table,
    one_line_errors,
    progress,
    stop,
)

if TYPE_CHECKING:
    from rich.table import Table

commands = typer.Typer()


@commands.command(
    epilog="Example: qgnn simulate --dataset Cora --model gcn --bits uniform:4 --sweep order=degree,bits --sweep pes=128,256",
    help="Count cycles, traffic and energy of a quantized network on A²Q's bit-serial accelerator, beside uniform baselines.",
)
def simulate(
    model: Annotated[
        str | None,
        typer.Option(metavar="FILE|NAME", help="What qgnn.save wrote, or gcn, gat, gin, sage; with --dataset."),
    ] = None,
    workload_file: Annotated[
        Path | None,
        typer.Option("--workload", metavar="FILE", help="A workload that accel.Workload.save wrote; needs no torch."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="D", help="The data set whose graph the model runs on.")
    ] = None,
    bits: Annotated[
        str | None, typer.Option(metavar="uniform:B", help="Widths of an untrained model: B bits for every node.")
    ] = None,
    hidden: Annotated[
        int | None, typer.Option(min=1, help="Width of an untrained model's hidden layers; else the recipe's.")
    ] = None,
    data_root: DataRootOption = None,
    config: AcceleratorFileOption = None,
    profile: AcceleratorOption = None,
    settings: AcceleratorSettingsOption = None,
    order: Annotated[
        Literal["degree", "bits", "none"] | None, typer.Option(help="Order of the rows: short for --set order=…")
    ] = None,
    baseline: Annotated[
        str, typer.Option(metavar="NAMES", help="Uniform widths to compare with, separated by commas.")
    ] = "int4,int8",
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=A,B,C",
            help="Simulate once for each value; repeatable: every combination. Writes sweep.csv, under --out, else here, row by row.",
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="F", help="Write every phase to this CSV file; lock step only.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write tables, plots, report.md and report.json there.")
    ] = None,
    json_to: JsonOption = None,
) -> None:
    """``--json`` gets the report; of a sweep, the rows."""
    rows: list[dict[str, Any]] = []
    table = (out or Path()) / "sweep.csv"
    with one_line_errors(lambda: f"interrupted; finished rows are in {table}" if rows else "interrupted"):
        from .. import simulate as engine

        chosen = key_values(settings or [])
        if order is not None and chosen.setdefault("order", order) != order:
            raise ValueError(f"--order {order} and --set order={chosen['order']} contradict each other; leave one out")
        base = accelerator_of(config, profile, chosen)
        axes, uniform = engine.axes(sweep or [], base, chosen), engine.baselines(baseline)
        if trace is not None:
            if axes:
                raise ValueError("--trace writes the phases of one configuration; leave out --sweep")
            check_file("--trace", trace)
        if out is not None:
            make_folder(out)
        lines, console = JsonLines(json_to), console_for(json_to)
        workload = engine.read_workload(workload_file, model, dataset, data_root, bits, hidden)
        if axes:
            with progress() as show:
                for row in engine.swept(workload, base, axes, uniform, table, show):
                    rows.append(row)
                    lines.write(row)
            console.print(engine.best(rows, list(axes)))
            console.print(f"wrote {table}: {len(rows)} rows", soft_wrap=True, markup=False)
            return
        document, files = engine.report(workload, base, uniform, trace, out)
        lines.write(document)
        for part in engine.tables(document):
            console.print(part)
        for line in (*(f"note: {note}" for note in document["notes"]), *(f"wrote {file}" for file in files)):
            console.print(line, soft_wrap=True, markup=False)


def _energy_tables(records: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """The accelerator by part, and the GPU beside it: rows for each of ``records``."""
    from rich.markup import escape

    from ..accel.energy import PARTS

    def number(value: float) -> str:
        return f"{value:.3g}" if value < 100 else f"{value:,.0f}"

    names = [escape(" ".join(filter(None, (r["dataset"], r["model"], r["scheme"])))) for r in records]
    heads = (part.replace("sram_", "SRAM\n").replace("hbm", "HBM") for part in PARTS)
    accelerator = narrow_table("Accelerator: µJ an inference, mean over runs", "runs", *heads, "all", "µs")
    for name, r in zip(names, records, strict=True):
        values = (
            *(r[f"accelerator_{part}_joules"] for part in PARTS),
            r["accelerator_joules"],
            r["accelerator_seconds"],
        )
        accelerator.add_row(name, str(r["runs"]), *(number(1e6 * value) for value in values))
    yield accelerator
    measured = records[0]["gpu_mode"] == "measured"
    spread, net = ("trials", ["net of\nidle"]) if measured else ("bounds", [])
    gpu = narrow_table(
        f"{records[0]['gpu']}, {records[0]['gpu_mode']}: mJ an inference, and how many times the accelerator's",
        *("mJ", spread, *net, "ms", "times", spread),
    )
    for name, r in zip(names, records, strict=True):
        for program, side in (("FP32", "gpu"), ("integers", "gpu_integer"))[: 1 + measured]:
            low, middle, high = (r[f"{side}{end}_joules"] for end in ("_low", "", "_high"))
            ours = r["accelerator_joules"]
            rest = [number(1e3 * r[f"{side}_net_joules"])] if measured else []
            gpu.add_row(
                f"{name}, {program}", number(1e3 * middle), f"{number(1e3 * low)} - {number(1e3 * high)}", *rest,
                number(1e3 * r[f"{side}_seconds"]), number(middle / ours), f"{number(low / ours)} - {number(high / ours)}",
            )  # fmt: skip
    yield gpu


@commands.command(
    epilog="Example: qgnn energy --runs out --gpu 2080ti --out out/energy",
    help="Energy of integer models on the accelerator beside that of a GPU, as A²Q's figure 22: measured by NVML where a GPU is, else modelled.",
)
def energy(
    model: Annotated[Path | None, typer.Option(metavar="FILE", help="What qgnn.save wrote; with --dataset.")] = None,
    dataset: Annotated[str | None, typer.Option(metavar="D", help="The data set that the model runs on.")] = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Instead: all models in what qgnn train --out filled, a row each, mean over runs."
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Model this GPU: 2080ti (A²Q's, the default without a GPU), a100-80gb, h100-sxm or h200.",
        ),
    ] = None,
    config: AcceleratorFileOption = None,
    profile: AcceleratorOption = None,
    settings: AcceleratorSettingsOption = None,
    data_root: DataRootOption = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write energy.csv and the bars of energy.svg there.")
    ] = None,
    json_to: JsonOption = None,
) -> None:
    """Nothing is measured where --gpu names one. ``--json`` gets the rows; of ``--runs``, a row that cannot be made is left out, and named."""
    records: list[dict[str, Any]] = []
    failed: list[str] = []
    with one_line_errors(lambda: f"interrupted after {len(records)} rows"):
        from ..perf import energy as engine

        if model is not None and dataset is not None and runs is None:
            found = [engine.saved(model, dataset)]
        elif runs is not None and model is None and dataset is None:
            found = engine.trained(runs)
        else:
            raise ValueError("pass --model FILE and --dataset D, or --runs DIR")
        accelerator, other = accelerator_of(config, profile, key_values(settings or [])), engine.chosen(gpu)
        if out is not None:
            make_folder(out)
        lines, console = JsonLines(json_to), console_for(json_to)
        with progress() as show:
            for models in found:
                try:
                    records.append(engine.compare(models, accelerator, other, data_root, show))
                except ValueError as error:
                    if len(found) == 1:
                        raise
                    failed.append(f"{models}: {error}")
                else:
                    lines.write(records[-1])
        for table in _energy_tables(records):
            console.print(table)
        for file in engine.write(records, out) if out is not None else ():
            console.print(f"wrote {file}", soft_wrap=True, markup=False)
    if failed:
        stop(f"left out: {'; '.join(failed)}", 1)
