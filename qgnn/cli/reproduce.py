"""``qgnn reproduce``: the papers' tables; ``qgnn report``: a page about a folder of runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    DataRootOption,
    DeviceOption,
    JsonLines,
    JsonOption,
    check_file,
    console_for,
    make_folder,
    one_line_errors,
    progress,
    quiet_profiler,
)

commands = typer.Typer()


@commands.command(
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
    quiet_profiler()
    with one_line_errors(lambda: f"interrupted; the same command again resumes, from {out}"):
        from ..experiments import compare
        from ..experiments import reproduce as engine
        from ..experiments import table as tables
        from ..experiments.store import Store

        chosen = tables.load(table)
        selected = chosen.select([pattern for pattern in rows.split(",") if pattern])
        lines = JsonLines(json_to)
        if chosen.kind == "memory":
            from ..perf import memory

            make_folder(out)
            for entry in memory.reproduce(chosen, selected, data_root, device, out):
                lines.write(entry)
            text = (out / f"{chosen.name}.md").read_text(encoding="utf-8")
            console_for(json_to).print(text, markup=False, soft_wrap=True, end="")
            return
        store = Store(out)
        with store.alone(), progress() as show:
            plans = engine.plan(chosen, selected, seeds, data_root)
            for finished in engine.train(plans, store, jobs, data_root, device, partial(show, chosen.name)):
                entries = compare.write(chosen, plans, finished, out)
        for entry in entries:
            lines.write(entry)
        console_for(json_to).print(compare.markdown(chosen, plans, entries), markup=False, soft_wrap=True, end="")
    if any(plan.failed for plan in plans):
        raise typer.Exit(1)


@commands.command(
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
    with one_line_errors(lambda: "interrupted; no page was written"):
        from ..report import page, summaries
        from ..trace import write_whole

        target = out or folder / "report.html"
        if out is not None:
            check_file("--out", out)
        lines = JsonLines(json_to)
        with progress() as show:
            text = page(folder, partial(show, f"plots of {folder}"))
        try:
            write_whole(target, text)
        except OSError as error:
            raise ValueError(f"{target} cannot be written ({error.strerror}); choose another --out") from error
        for row in summaries(folder) if json_to is not None else ():
            lines.write(row)
        console_for(json_to).print(f"wrote {target}", soft_wrap=True, markup=False)
