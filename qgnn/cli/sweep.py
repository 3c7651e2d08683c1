"""``qgnn sweep``: grids and searches; ``qgnn results``: what they found."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .common import (
    DataRootOption,
    DeviceOption,
    JsonLines,
    JsonOption,
    check_file,
    console_for,
    one_line_errors,
    progress,
)

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

commands = typer.Typer()


@commands.command(
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
    """``--json`` gets the rows of the table at the end, which is of the whole folder. Exit code 1 if a training of the file has no result."""
    folder = out or Path("out/sweep") / file.stem
    again = "the same command" if resume else "the same command with --resume"
    with one_line_errors(lambda: f"interrupted; {again} goes on, in {folder}"):
        from ..environment import require

        require("sweep", "pyarrow", *(["ray"] if engine == "ray" else []))
        from ..experiments import grid as grids
        from ..experiments import sweep as sweeps
        from ..experiments import view
        from ..experiments.parquet import Ledger, ParquetFolder
        from ..experiments.search import Searcher

        grid = grids.load_grid(file)
        groups = grids.groups(grid, data_root)
        if grid.search is not None:
            require("sweep", "optuna")
        lines, store = JsonLines(json_to), ParquetFolder(folder)
        with store.alone(), progress() as show:
            ledger = Ledger(store)
            if ledger.rows and not resume:
                raise ValueError(
                    f"{folder} holds {len(ledger.rows)} results; add --resume to go on there, or choose another --out"
                )
            plan = sweeps.plan(grid, groups, ledger)
            sweeps.train(plan, ledger, engine, jobs, data_root, device, partial(show, grid.name))
            store.merge()
        found, console = view.runs(folder), console_for(json_to)
        asked = view.among(found, plan.keys())
        _print_runs(view.means(found), asked, lines, console)
        for sentence in plan.best() if isinstance(plan, Searcher) else ():
            console.print(sentence, markup=False, soft_wrap=True)
    if view.failures(asked):
        raise typer.Exit(1)


def _print_runs(table: pd.DataFrame, found: pd.DataFrame, lines: JsonLines, console: Console) -> None:
    """A table, and which of the runs ``found`` have no result."""
    from ..experiments import view

    for row in view.records(table):
        lines.write(row)
    console.print(view.markdown(table), markup=False, soft_wrap=True, end="")
    for sentence in view.failures(found):
        console.print(f"no result: {' '.join(sentence.split())}", markup=False, soft_wrap=True)


@commands.command(
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
    with one_line_errors(lambda: "interrupted"):
        from ..environment import require

        require("sweep", "pyarrow")
        from ..experiments import view

        lines, found = JsonLines(json_to), view.runs(folder)
        if export is not None:
            check_file("--export", export)
        if where is not None:
            found = view.where(found, where)
        table = view.means(found) if pivot is None else view.pivot(found, pivot)
        if export is not None:
            view.export(found if pivot is None else table, export)
        _print_runs(table, found, lines, console_for(json_to))
