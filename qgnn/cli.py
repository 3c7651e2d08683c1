"""The command line. Exit codes: 0 done, 1 a run failed, 2 bad input (one line on stderr says what), 130 interrupted."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    from .accel import Config
    from .integer import FreezeReport
    from .perf.table import Record
    from .train import Run

# torch takes seconds to import, so that every command imports what it needs by itself: --help is quick.

app = typer.Typer(
    name="qgnn",
    help="Quantized graph neural networks: train them, and see what runs here.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# click's base class of errors; newer typer carries a click of its own
_UsageProblem: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

JsonOption = Annotated[str | None, typer.Option("--json", metavar="F", help="Write JSON to this file; - is stdout.")]
DataRootOption = Annotated[Path | None, typer.Option(help="Folder of the data sets; else QGNN_DATA, else ./data.")]
DeviceOption = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to train.")]
AcceleratorFileOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML file whose tables are named accelerators.")
]
AcceleratorOption = Annotated[
    str | None,
    typer.Option(
        "--profile", metavar="P", help="A table of --config, or paper-table (the default), cacti45-hp or cacti45-lop."
    ),
]
AcceleratorSettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Another value of the accelerator, such as pes=128; repeatable."),
]


def main() -> None:
    """Entry point of ``qgnn``: bad usage is one line on stderr, too."""
    try:
        sys.exit(app(standalone_mode=False))
    except _UsageProblem as error:
        typer.echo(f"qgnn: {' '.join(error.format_message().split())}", err=True)
        sys.exit(error.exit_code)


def _stop(message: object, code: int) -> NoReturn:
    typer.echo(f"qgnn: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(code)


@contextmanager
def _one_line_errors(interrupted: Callable[[], str]) -> Iterator[None]:
    """Errors as one line on stderr and an exit code; ``interrupted`` tells, after Ctrl-C, how to go on."""
    try:
        yield
    except (ValueError, TypeError) as error:
        _stop(error, 2)
    except OSError as error:
        _stop(error, 1)
    except KeyboardInterrupt:
        _stop(interrupted(), 130)


def _console(json_to: str | None) -> Console:
    """Where tables go: stdout, or stderr when JSON has stdout."""
    from rich.console import Console

    return Console(stderr=json_to == "-", highlight=False)


@contextmanager
def _progress() -> Iterator[Callable[[str, float, int], None]]:
    """A progress bar on stderr; none when that is not a terminal. Yields ``show(what, done, total)``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)
        shown = ""

        def show(what: str, done: float, total: int) -> None:
            nonlocal shown
            if what != shown:
                bar.reset(task)  # or the time remaining would be estimated from the task before
                shown = what
            bar.update(task, description=what, completed=done, total=total)

        yield show


def _quiet_profiler() -> None:
    """Called before torch is imported, whose profiler writes to stderr otherwise."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def _check_file(option: str, path: Path) -> None:
    """Says at the start, not after the work, that a file cannot be there."""
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option} {path}: the folder does not exist; make it first")


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: the folder cannot be made ({error.strerror})") from error


def _accelerator(file: Path | None, profile: str | None, settings: dict[str, str]) -> Config:
    """The configuration that --config, --profile and --set name."""
    from .accel.config import check_keys, load_config

    check_keys(settings, "--set")
    return load_config(profile, file=file, **settings)


class _JsonLines:
    """Where --json sends records: each as soon as it is there. A file is replaced when the first one comes."""

    def __init__(self, target: str | None) -> None:
        self.target, self.started = target, False
        if target is not None and target != "-":
            _check_file("--json", Path(target))

    def write(self, record: dict[str, Any]) -> None:
        from .results import append, dumps

        if self.target == "-":
            typer.echo(dumps(record))
        elif self.target is not None:
            if not self.started:
                Path(self.target).unlink(missing_ok=True)
            append(self.target, record)
        self.started = True


# train

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


def _settings(pairs: list[str]) -> dict[str, str]:
    """The settings of ``--set``."""
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--set takes KEY=VALUE, got {pair!r}")
    return dict(pair.split("=", 1) for pair in pairs)


@app.command(
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
    json_to: JsonOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Keep results and checkpoints here; the same command resumes.")
    ] = None,
) -> None:
    """Runs ``seeds`` trainings of each fold; finished ones that lie in ``out`` are not repeated."""
    running = "the start"

    def interrupted() -> str:
        if out is None:
            return f"interrupted at {running}; nothing was kept. With --out DIR, the same command again resumes there"
        return f"interrupted at {running}; the same command again resumes there, from {out}"

    with _one_line_errors(interrupted):
        from .data import load
        from .experiments.store import Cell, Store, run
        from .quant.scheme import parse
        from .recipes import recipe_for
        from .results import summary
        from .tasks import fold_count
        from .train import TrainingError

        parsed = parse(scheme)
        lines = _JsonLines(json_to)
        loaded = load(dataset, data_root)
        recipe = recipe_for(model, parsed, loaded).changed(epochs, hidden, _settings(settings or []))
        several = fold_count(loaded)
        if folds is not None and folds > several:
            raise ValueError(f"--folds {folds} asks for more folds than {loaded.name} has, {several}")
        store = None if out is None else Store(out)
        finished = {} if store is None else store.finished()
        records: list[dict[str, Any]] = []
        last: Run | None = None
        with nullcontext() if store is None else store.alone(), _progress() as show:
            for seed, fold in product(range(seeds), range(folds or several)):
                cell = Cell(loaded.name, model, parsed.name, recipe, seed, fold)
                running = f"seed {seed}, fold {fold}" if several > 1 else f"seed {seed}"
                record = finished.get(cell.key)
                if record is None:
                    what = f"{loaded.name} {model} {scheme}, {running}"
                    try:
                        last = run(cell, loaded, store, device, partial(show, what))
                    except TrainingError as error:
                        _stop(error, 1)
                    record = last.record
                    if store is not None:
                        store.keep(cell, record)
                lines.write(record)
                records.append(record)
        console = _console(json_to)
        console.print(_table(summary(records)))
        if last is not None and last.frozen is not None and last.frozen.report is not None:
            console.print(_integer_table(last.frozen.report, last.record["seed"]))


# reproduce


@app.command(
    epilog="Example: qgnn reproduce a2q-1 --rows 'gcn-cora-*' --seeds 3 --jobs 2",
    help="Run the rows of a paper's table, and print our numbers beside the printed ones.",
)
def reproduce(
    table: Annotated[
        str,
        typer.Argument(
            help="a2q-1, -2, -3, -8 to -16, dq-1, -2, -3, -9, tu, qt-ram, qt-density, qt-accuracy, or a table of your own: PATH.toml."
        ),
    ],
    rows: Annotated[
        str, typer.Option(metavar="IDS", help="Only these rows: ids or patterns such as gcn-*, separated by commas.")
    ] = "",
    seeds: Annotated[int, typer.Option(metavar="K", min=1, help="Seeds 0 to K-1, each on every fold.")] = 10,
    jobs: Annotated[int, typer.Option(metavar="J", min=1, help="Processes that train at the same time.")] = 1,
    out: Annotated[
        Path, typer.Option(help="Keep results, checkpoints and tables here; the same command resumes.")
    ] = Path("out/reproduce"),
    data_root: DataRootOption = None,
    device: DeviceOption = "cpu",
    json_to: JsonOption = None,
) -> None:
    """Trains what is not finished in ``out``; all tables that are run there share their runs. ``--json`` gets the rows."""
    _quiet_profiler()
    with _one_line_errors(lambda: f"interrupted; the same command again resumes, from {out}"):
        from .experiments import compare
        from .experiments import reproduce as engine
        from .experiments import table as tables
        from .experiments.store import Store

        chosen = tables.load(table)
        selected = chosen.select([pattern for pattern in rows.split(",") if pattern])
        lines = _JsonLines(json_to)
        if chosen.kind == "memory":
            from .perf import memory

            _make_folder(out)
            for entry in memory.reproduce(chosen, selected, data_root, device, out):
                lines.write(entry)
            text = (out / f"{chosen.name}.md").read_text(encoding="utf-8")
            _console(json_to).print(text, markup=False, soft_wrap=True, end="")
            return
        store = Store(out)
        with store.alone(), _progress() as show:
            plans = engine.plan(chosen, selected, seeds, data_root)
            for finished in engine.train(plans, store, jobs, data_root, device, partial(show, chosen.name)):
                entries = compare.write(chosen, plans, finished, out)
        for entry in entries:
            lines.write(entry)
        _console(json_to).print(compare.markdown(chosen, plans, entries), markup=False, soft_wrap=True, end="")
    if any(plan.failed for plan in plans):
        raise typer.Exit(1)


# sweep


@app.command(
    epilog="Example: qgnn sweep grid.toml --jobs 4 --out out/grid",
    help="Train every combination of data sets, models, schemes, seeds and settings in a TOML file, or search for settings. A training that "
    "crashes, is killed or runs out of memory is tried once more.",
)
def sweep(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="TOML: datasets, models, schemes, seeds, folds, [recipe], [[exclude]], [search]; docs/sweep.md says more.",
        ),
    ],
    jobs: Annotated[int, typer.Option(metavar="J", min=1, help="Processes that train at the same time.")] = 1,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(
            help="Processes of this machine, or Ray: the cluster that RAY_ADDRESS names, else Ray started here."
        ),
    ] = "local",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on in a folder that holds results: what is done or has diverged is kept, what failed is tried again, and what was under way "
            "goes on from its checkpoint. Without it such a folder is refused.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep results and checkpoints here; else out/sweep/NAME for NAME.toml."),
    ] = None,
    data_root: DataRootOption = None,
    device: DeviceOption = "cpu",
    json_to: JsonOption = None,
) -> None:
    """``--json`` gets the rows of the table at the end. Exit code 1 if a training has no result."""
    folder = out or Path("out/sweep") / file.stem
    again = "the same command" if resume else "the same command with --resume"
    with _one_line_errors(lambda: f"interrupted; {again} goes on, in {folder}"):
        from .environment import require

        require("sweep", "pyarrow", *(["ray"] if engine == "ray" else []))
        from .experiments import grid as grids
        from .experiments import sweep as sweeps
        from .experiments import view
        from .experiments.parquet import Ledger, ParquetFolder
        from .experiments.search import Searcher

        grid = grids.load_grid(file)
        groups = grids.groups(grid, data_root)
        if grid.search is not None:
            require("sweep", "optuna")
        lines, store = _JsonLines(json_to), ParquetFolder(folder)
        with store.alone(), _progress() as show:
            ledger = Ledger(store)
            if ledger.rows and not resume:
                raise ValueError(
                    f"{folder} holds {len(ledger.rows)} results; add --resume to go on there, or choose another --out"
                )
            plan = sweeps.plan(grid, groups, ledger)
            sweeps.train(plan, ledger, engine, jobs, data_root, device, partial(show, grid.name))
            store.merge()
        found, console = view.runs(folder), _console(json_to)
        _print_runs(view.means(found), found, lines, console)
        for sentence in plan.best() if isinstance(plan, Searcher) else ():
            console.print(sentence, markup=False, soft_wrap=True)
    if view.failures(found):
        raise typer.Exit(1)


def _print_runs(table: pd.DataFrame, found: pd.DataFrame, lines: _JsonLines, console: Console) -> None:
    """A table of ``found``, and which of these runs have no result."""
    from .experiments import view

    for row in view.records(table):
        lines.write(row)
    console.print(view.markdown(table), markup=False, soft_wrap=True, end="")
    for sentence in view.failures(found):
        console.print(f"no result: {' '.join(sentence.split())}", markup=False, soft_wrap=True)


# results


@app.command(
    epilog="Example: qgnn results out/grid --where \"model == 'gcn' and seed < 5\" --pivot scheme,dataset,test_acc",
    help="Print the results of qgnn sweep: means over seeds and folds, or a pivot, of all runs or of those that match a condition.",
)
def results(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What qgnn sweep --out filled.")],
    where: Annotated[
        str | None,
        typer.Option(
            metavar="CONDITION",
            help="Only these runs: comparisons of a column with a value, joined by and, or, not; such as \"scheme in ['fp32', 'fixed-8']\".",
        ),
    ] = None,
    pivot: Annotated[
        str | None,
        typer.Option(
            metavar="ROWS,COLUMNS,VALUE",
            help="Means of a column by others, such as scheme,dataset+model,test_acc, instead of the usual table.",
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the runs, with all columns, or the pivot, to this file: .csv, .parquet, .json or .md.",
        ),
    ] = None,
    json_to: JsonOption = None,
) -> None:
    """``--json`` gets the rows of the table that is printed."""
    with _one_line_errors(lambda: "interrupted"):
        from .environment import require

        require("sweep", "pyarrow")
        from .experiments import view

        lines, found = _JsonLines(json_to), view.runs(folder)
        if export is not None:
            _check_file("--export", export)
        if where is not None:
            found = view.where(found, where)
        table = view.means(found) if pivot is None else view.pivot(found, pivot)
        if export is not None:
            view.export(found if pivot is None else table, export)
        _print_runs(table, found, lines, _console(json_to))


# bench


@app.command(
    epilog="Example: qgnn bench --suite cpu --graphs Cora --rounds 3 --out rows.csv",
    help="Time kernels, layers and models in turns with PyG, torch and SciPy, and print ratios; each result is checked before.",
)
def bench(
    suite: Annotated[
        str, typer.Option(help="cpu, kernels, quantizers, inference, train-step or all; cpu leaves a GPU alone.")
    ] = "cpu",
    graphs: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Data sets instead of the suite's, such as 'Cora powerlaw:10000,150000'."),
    ] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that the candidates take turns in, at most.")] = 20,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Add rows to this CSV file as they come.")] = None,
    json_to: JsonOption = None,
    table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure nothing; print the results in this CSV file as Markdown."),
    ] = None,
    into: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --table: put the tables between the markers of this file.")
    ] = None,
) -> None:
    """A shape that fails is a row with the reason. Exit code 1 if a result was wrong."""
    kept = "finished rows are kept" if out is not None else "with --out FILE, finished rows are kept"
    with _one_line_errors(lambda: f"interrupted; {kept}"):
        import torch

        from .perf import registry
        from .perf import table as results

        if table is not None:
            _print_results(results.read(table), into)
            return
        if into is not None:
            raise ValueError("--into goes with --table FILE, which says where the results are")
        if out is not None:
            results.check_file(out)
        lines, wrong = _JsonLines(json_to), False
        console = _console(json_to)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with _progress() as show:
            for records in registry.run(suite, graphs.split(), rounds, device, show):
                if out is not None:
                    results.append(out, records)
                for record in records:
                    lines.write(record)
                    console.print(results.line(record), markup=False, soft_wrap=True)
                    wrong |= record["status"] == "wrong"
    if wrong:
        raise typer.Exit(1)


def _print_results(records: Sequence[Record], into: Path | None) -> None:
    from .perf.table import document, refreshed

    if into is None:
        typer.echo(document(records))
        return
    try:
        into.write_text(refreshed(into.read_text(encoding="utf-8"), records), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--into {into} cannot be read and written ({error.strerror})") from error


# simulate


@app.command(
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
    with _one_line_errors(lambda: f"interrupted; finished rows are in {table}" if rows else "interrupted"):
        from . import simulate as engine

        chosen = _settings(settings or [])
        if order is not None and chosen.setdefault("order", order) != order:
            raise ValueError(f"--order {order} and --set order={chosen['order']} contradict each other; leave one out")
        base = _accelerator(config, profile, chosen)
        axes, uniform = engine.axes(sweep or [], base, chosen), engine.baselines(baseline)
        if trace is not None:
            if axes:
                raise ValueError("--trace writes the phases of one configuration; leave out --sweep")
            _check_file("--trace", trace)
        if out is not None:
            _make_folder(out)
        lines, console = _JsonLines(json_to), _console(json_to)
        workload = engine.read_workload(workload_file, model, dataset, data_root, bits, hidden)
        if axes:
            with _progress() as show:
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


# memory


def _memory_tables(rows: Sequence[dict[str, Any]], layers: bool) -> Iterator[Table]:
    """A row for each scheme; with ``layers``, a table for each scheme of what its layers keep."""
    from rich import box
    from rich.table import Table

    def table(title: str, *columns: str) -> Table:
        # it fits 80 columns
        made = Table("", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
        for column in columns:
            made.add_column(column, justify="right", no_wrap=True)
        return made

    def cells(row: dict[str, Any], form: str, unit: float, *keys: str) -> list[str]:
        return ["" if row[key] is None else f"{row[key] / unit:{form}}" for key in keys]

    head, printed = rows[0], any(row["printed_mb"] is not None for row in rows)
    sizes = table(
        f"{head['dataset']}, {head['model']}, hidden {head['hidden']}: MB of a training step; PyG's layers emulate the scheme",
        *("feature\nmaps", "masks", "kept for\nbackward", "allocated", "PyG:\nkept", "PyG:\nallocated"),
        *["Bqain's\nGCN"] * printed,
    )
    ratios = table(
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
        part = table(f"{row['scheme']}: bytes kept by each layer", *kinds)
        for layer, kept in row["layers"].items():
            part.add_row(layer or "between layers", *(f"{kept[kind]:,}" if kind in kept else "" for kind in kinds))
        yield part


@app.command(
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
    _quiet_profiler()
    rows: list[dict[str, Any]] = []
    with _one_line_errors(lambda: f"interrupted after {len(rows)} rows"):
        from . import quant
        from .data import load
        from .perf import memory as engine

        names = scheme or ["fp32,fp32/saved=int4,fixed-8,fixed-4,msfp16,msfp12"]
        schemes = [quant.parse(name) for text in names for name in re.split(r",\s*(?=[a-z])", text)]
        lines, loaded = _JsonLines(json_to), load(dataset, data_root)
        with _progress() as show:
            for row in engine.rows(loaded, model, schemes, hidden, device):
                rows.append(row)
                lines.write(row)
                show(row["scheme"], len(rows), len(schemes))
        for table in _memory_tables(rows, layers):
            _console(json_to).print(table)


# info


def _info_tables(report: dict[str, Any]) -> Iterator[Table]:
    from rich.table import Table

    def pairs(title: str, values: dict[str, Any]) -> Table:
        table = Table(title=title, title_justify="left", show_header=False)
        for name, value in values.items():
            table.add_row(name, "-" if value is None else str(value))
        return table

    yield pairs("Versions", report["versions"])
    devices = dict(report["devices"])
    gpus = devices.pop("gpus")
    named = {f"GPU {i}": f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB" for i, gpu in enumerate(gpus)}
    yield pairs("Devices", {**devices, **(named or {"GPU": None})})
    backends = {b["name"]: f"{'yes' if b['available'] else 'no'}: {b['note']}" for b in report["backends"]}
    yield pairs("Backends that run here", backends)
    yield pairs("Environment variables", report["environment"])
    yield pairs("Optional features", {f["purpose"]: f["install"] or "installed" for f in report["optional"]})


@app.command(
    epilog="Example: qgnn info --json -",
    help="Print versions, devices, backends, environment variables, and how to install what is missing.",
)
def info(json_to: JsonOption = None) -> None:
    """The environment report that an issue needs."""
    with _one_line_errors(lambda: "interrupted"):
        from .environment import report

        found = report()
        if json_to is not None:
            text = json.dumps(found, indent=2)
            if json_to == "-":
                typer.echo(text)
                return
            try:
                Path(json_to).write_text(f"{text}\n", encoding="utf-8")
            except OSError as error:
                raise ValueError(f"--json {json_to}: cannot be written ({error.strerror})") from error
        for table in _info_tables(found):
            _console(json_to).print(table)


# report


@app.command(
    epilog="Example: qgnn report out/cora",
    help="Make one HTML page of the runs in a folder: tables, accuracy against bits, widths, magnitudes, training curves.",
)
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What qgnn train --out or qgnn reproduce --out filled.")
    ],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The page; else DIR/report.html.")] = None,
    json_to: JsonOption = None,
) -> None:
    """The page needs no network: styles and plots stand in it. ``--json`` gets its table of means."""
    with _one_line_errors(lambda: "interrupted; no page was written"):
        from .report import page, summaries
        from .trace import write_whole

        target = out or folder / "report.html"
        if out is not None:
            _check_file("--out", out)
        lines = _JsonLines(json_to)
        with _progress() as show:
            text = page(folder, partial(show, f"plots of {folder}"))
        try:
            write_whole(target, text)
        except OSError as error:
            raise ValueError(f"{target} cannot be written ({error.strerror}); choose another --out") from error
        for row in summaries(folder) if json_to is not None else ():
            lines.write(row)
        _console(json_to).print(f"wrote {target}", soft_wrap=True, markup=False)


# energy


def _energy_tables(records: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """The accelerator by part, and the GPU beside it: rows for each of ``records``."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from .accel.energy import PARTS

    def table(title: str, *columns: str) -> Table:
        # it fits 80 columns
        made = Table("", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
        for column in columns:
            made.add_column(column, justify="right", no_wrap=True)
        return made

    def number(value: float) -> str:
        return f"{value:.3g}" if value < 100 else f"{value:,.0f}"

    names = [escape(" ".join(filter(None, (r["dataset"], r["model"], r["scheme"])))) for r in records]
    heads = (part.replace("sram_", "SRAM\n").replace("hbm", "HBM") for part in PARTS)
    accelerator = table("Accelerator: µJ an inference, mean over runs", "runs", *heads, "all", "µs")
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
    gpu = table(
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


@app.command(
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
    with _one_line_errors(lambda: f"interrupted after {len(records)} rows"):
        from .perf import energy as engine

        if model is not None and dataset is not None and runs is None:
            found = [engine.saved(model, dataset)]
        elif runs is not None and model is None and dataset is None:
            found = engine.trained(runs)
        else:
            raise ValueError("pass --model FILE and --dataset D, or --runs DIR")
        accelerator, other = _accelerator(config, profile, _settings(settings or [])), engine.chosen(gpu)
        if out is not None:
            _make_folder(out)
        lines, console = _JsonLines(json_to), _console(json_to)
        with _progress() as show:
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
        _stop(f"left out: {'; '.join(failed)}", 1)
