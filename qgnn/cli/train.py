"""``qgnn train``: a model, seed by seed and fold by fold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .common import (
    DataRootOption,
    DeviceOption,
    JsonLines,
    JsonOption,
    console_for,
    key_values,
    one_line_errors,
    progress,
    stop,
)

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from ..data import Dataset, GraphDataset
    from ..experiments.store import Cell, Store
    from ..integer import FreezeReport
    from ..train import Run

commands = typer.Typer()

_ROWS = (
    ("test {metric}", "test_acc", ".2f"),
    ("validation {metric}", "val_acc", ".2f"),
    ("best over epochs (the papers' protocol)", "test_acc_best_over_epochs", ".2f"),
    ("average bits", "average_bits", ".2f"),
    ("average bits, weighted by dimension", "average_bits_dim", ".2f"),
    ("average bits, all feature maps", "average_bits_all", ".2f"),
    ("compression of the feature maps", "compression", ".1f"),
    ("the same, steps counted", "compression_with_steps", ".1f"),
    ("bytes of the feature maps", "packed_bytes", ",.0f"),
    ("bytes of the feature maps at FP32", "fp32_bytes", ",.0f"),
    ("ms a training step", "train_step_ms", ".2f"),
    ("peak memory of a step, bytes", "peak_memory_bytes", ",.0f"),
    ("integer model: test {metric}", "integer_test_acc", ".2f"),
    ("integer model: nodes predicted otherwise", "integer_mismatches", ".0f"),
    ("integer model: codes that ties decide", "integer_ties", ".0f"),
    ("integer model: largest relative difference", "integer_max_relative", ".1e"),
)

_METRICS = {
    "accuracy": "accuracy, %",
    "f1": "micro-F1, %",
    "ap": "average precision, %",
    "hits@50": "Hits@50, %",
    "mae": "mean absolute error",
}


def _table(summary: pd.DataFrame) -> Table:
    """One column for each (dataset, model, scheme): mean ± sample standard deviation over seeds and folds."""
    from rich.table import Table

    rows = summary.to_dict("records")
    metric = " or ".join(dict.fromkeys(_METRICS[row["metric"]] for row in rows))
    digits = ".4f" if "mae" in summary["metric"].values else ".2f"
    table = Table("mean ± standard deviation over runs")
    for row in rows:
        table.add_column(f"{row['dataset']} {row['model']} {row['scheme']}", justify="right", no_wrap=True)
    table.add_row("seeds", *(str(row["seeds"]) for row in rows))
    table.add_row("runs: seeds x folds", *(str(row["runs"]) for row in rows))
    for label, field, usual in _ROWS:
        form = digits if "_acc" in field else usual
        cells = []
        for row in rows:
            mean, deviation = row[field], row[f"{field}_sd"]
            cell = "" if mean != mean else f"{mean:{form}}"
            cells.append(cell if deviation != deviation else f"{cell} ± {deviation:{form}}")
        table.add_row(label.format(metric=metric), *cells)
    return table


def _integer_table(report: FreezeReport, seed: int) -> Table:
    """Bytes of the integer model, layer by layer, beside FP32."""
    from rich.table import Table

    table = Table("bytes", "packed", "FP32", title=f"integer model of seed {seed}", title_justify="left")
    for layer in report.layers:
        table.add_row(
            f"{layer.name}: input, {layer.average_bits:.2f} bits",
            f"{layer.code_bytes:,}",
            f"{layer.input_fp32_bytes:,}",
        )
        table.add_row(f"{layer.name}: steps, widths and places of its rows", f"{layer.step_bytes:,}", "")
        if layer.kind == "gcn":
            table.add_row(
                f"{layer.name}: operand of the aggregation", f"{layer.operand_bytes:,}", f"{layer.operand_fp32_bytes:,}"
            )
        table.add_row(f"{layer.name}: weight", f"{layer.weight_bytes:,}", f"{layer.weight_fp32_bytes:,}")
        table.add_row(f"{layer.name}: steps of the weight", f"{layer.weight_step_bytes:,}", "")
    table.columns[1].justify = table.columns[2].justify = "right"
    return table


@contextmanager
def _together(device: str, options: dict[str, object]) -> Iterator[bool]:
    """Joins the job, if torchrun started several processes; yields whether this is the first one, which prints and keeps the results. An error that
    all processes have is told once."""
    from ..distributed.group import WorkerLost, joined, processes, rank, speaks

    if processes() == 1:
        given = [f"--{name}" for name, value in options.items() if value is not None]
        if given:
            raise ValueError(
                f"{' and '.join(given)} are for several processes: torchrun --nproc-per-node 2 -m qgnn train …"
            )
        yield True
        return
    try:
        with joined(device):
            yield rank() == 0
    except (ValueError, TypeError, OSError, WorkerLost) as error:
        if not speaks(error):
            raise typer.Exit(1) from error
        if isinstance(error, WorkerLost):
            stop(error, 1)
        raise


def _trained(
    dataset: Dataset | GraphDataset,
    store: Store | None,
    device: str,
    parallel: Literal["data", "partition"] | None,
    halo: Literal["fp32", "int8", "int4"] | None,
    cell: Cell,
    show: Callable[[int, int], None],
) -> Run | None:
    """The run of a cell; of several processes, the first one has it."""
    from .. import distributed
    from ..experiments.store import run

    if distributed.processes() == 1:
        return run(cell, dataset, store, device, show)
    done = distributed.train(
        dataset,
        cell.model,
        cell.scheme,
        cell.seed,
        fold=cell.fold,
        recipe=cell.recipe,
        device=device,
        checkpoint=None if store is None else store.checkpoint(cell),
        progress=show,
        parallel=parallel,
        halo=halo or "fp32",
    )
    if done is not None and store is not None:
        store.save(cell, done)
    return done


@commands.command(
    epilog="Example: qgnn train --dataset Cora --scheme a2q --seeds 10 --out out/cora",
    help="Train a model once per seed and fold, and print means over these runs.",
)
def train(
    dataset: Annotated[
        str,
        typer.Option(
            help="Cora, CiteSeer, PubMed, digits, digits-superpixels, powerlaw:N,E, rmat:SCALE,EDGEFACTOR, a TUDataset such as MUTAG, or another "
            "of those that an unknown name lists."
        ),
    ],
    model: Annotated[str, typer.Option(help="gcn, gat, gin or sage.")] = "gcn",
    scheme: Annotated[
        str,
        typer.Option(
            help="fp32, fp16, int8, int4, nqat-int8, nqat-int4, dq-int8, dq-int4, a2q, a2q-nns (many graphs) or bi; suffixes choose variants. "
            "Quantized training: fixed-2 to fixed-8, msfp12 to msfp16, sdq:8,6,4,4 or adq:4,8, with options such as fixed-8/grad=6 or "
            "fixed-4/rounding=stochastic."
        ),
    ] = "a2q",
    seeds: Annotated[int, typer.Option(metavar="K", min=1, help="Seeds 0 to K-1, one run each.")] = 1,
    folds: Annotated[
        int | None,
        typer.Option(metavar="K", min=1, help="Folds 0 to K-1 of a data set that has folds, one run each; else all."),
    ] = None,
    data_root: DataRootOption = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs; else the recipe's.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Width of the hidden layers; else the recipe's.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another value in the recipe, such as distill=0; repeatable."),
    ] = None,
    device: DeviceOption = "cpu",
    parallel: Annotated[
        Literal["data", "partition"] | None,
        typer.Option(help="With torchrun: share batches, or give each process a part of the graph; else what fits."),
    ] = None,
    halo: Annotated[
        Literal["fp32", "int8", "int4"] | None,
        typer.Option(help="With torchrun: how rows of other parts of the graph travel; else fp32."),
    ] = None,
    json_to: JsonOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Keep results and checkpoints here; the same command resumes.")
    ] = None,
) -> None:
    """Runs ``seeds`` trainings of each fold; finished ones that lie in ``out`` are not repeated. ``torchrun -m qgnn train`` has several processes
    train each."""
    running = "the start"

    def interrupted() -> str:
        if out is None:
            return f"interrupted at {running}; nothing was kept. With --out DIR, the same command again resumes there"
        return f"interrupted at {running}; the same command again resumes there, from {out}"

    options: dict[str, object] = {"parallel": parallel, "halo": halo}
    with one_line_errors(interrupted), _together(device, options) as first:
        from ..data import load
        from ..distributed.group import same
        from ..experiments.store import Cell, Store
        from ..quant.scheme import parse
        from ..recipes import recipe_for
        from ..results import summary
        from ..tasks import fold_count
        from ..train import TrainingError

        parsed = parse(scheme)
        lines = JsonLines(json_to if first else None)
        loaded = load(dataset, data_root)
        recipe = recipe_for(model, parsed, loaded).changed(epochs, hidden, key_values(settings or []))
        several = fold_count(loaded)
        if folds is not None and folds > several:
            raise ValueError(f"--folds {folds} asks for more folds than {loaded.name} has, {several}")
        store = None if out is None else Store(out)
        finished = {} if store is None or not first else store.finished()
        records: list[dict[str, Any]] = []
        last: Run | None = None
        trained = partial(_trained, loaded, store, device, parallel, halo)
        bar = progress() if first else nullcontext(lambda what, done, total: None)
        with nullcontext() if store is None or not first else store.alone(), bar as show:
            for seed, fold in product(range(seeds), range(folds or several)):
                cell = Cell(loaded.name, model, parsed.name, recipe, seed, fold)
                running = f"seed {seed}, fold {fold}" if several > 1 else f"seed {seed}"
                record = same(finished.get(cell.key))
                if record is None:
                    what = f"{loaded.name} {model} {scheme}, {running}"
                    try:
                        last = trained(cell, partial(show, what))
                    except TrainingError as error:
                        stop(error, 1)
                    if last is None:
                        continue
                    record = last.record
                    if store is not None:
                        store.keep(cell, record)
                lines.write(record)
                records.append(record)
        if not first:
            return
        console = console_for(json_to)
        console.print(_table(summary(records)))
        if last is not None and last.frozen is not None and last.frozen.report is not None:
            console.print(_integer_table(last.frozen.report, last.record["seed"]))
