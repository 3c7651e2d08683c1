"""``qgnn bench``: our kernels beside their peers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import JsonLines, JsonOption, console_for, one_line_errors, progress

if TYPE_CHECKING:
    from ..perf.targets import Record

commands = typer.Typer()


@commands.command(
    epilog="Examples: qgnn bench --suite cpu --graphs Cora --rounds 3 --out rows.csv; qgnn bench plot rows.csv --out plots",
    help="Time kernels, layers and models in turns with PyG, torch and SciPy, and print ratios; each result is checked before.",
)
def bench(
    plot: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[plot FILE]", help="Measure nothing; plot the results in this CSV file to the folder --out."
        ),
    ] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="cpu, kernels, quantizers, inference, train-step or all of these; gpu, which checks tiny inputs where there is no GPU; or static."
        ),
    ] = "cpu",
    small: Annotated[
        bool, typer.Option("--small", help="Suite gpu: check tiny inputs on a CPU, and time nothing.")
    ] = False,
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
    with one_line_errors(lambda: f"interrupted; {kept}"):
        if plot:
            _plot(plot, out or Path("plots"))
            return
        import torch

        from ..perf import gpu, registry
        from ..perf import table as results

        if table is not None:
            _print_results(results.read(table), into)
            return
        if into is not None:
            raise ValueError("--into goes with --table FILE, which says where the results are")
        if suite == "static":
            from ..perf.static import report

            text, keeps_rules = report()
            typer.echo(text)
            raise typer.Exit(int(not keeps_rules))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        small = small or device == "cpu"
        if suite == "gpu" and not small:
            out = out or gpu.results()
        if out is not None:
            results.check_file(out)
        lines, wrong = JsonLines(json_to), False
        console = console_for(json_to)
        with progress() as show:
            measured = (
                gpu.run(small, show=show)
                if suite == "gpu"
                else registry.run(suite, graphs.split(), rounds, device, show)
            )
            for records in measured:
                if out is not None:
                    results.append(out, records)
                for record in records:
                    lines.write(record)
                    console.print(results.line(record), markup=False, soft_wrap=True)
                    wrong |= gpu.amiss(record, small and suite == "gpu")
        if suite == "gpu" and out is not None:
            out.with_suffix(".md").write_text(results.document(results.read(out)) + "\n", encoding="utf-8")
    if wrong:
        raise typer.Exit(1)


def _plot(arguments: Sequence[str], folder: Path) -> None:
    """``plot FILE``."""
    from ..perf.plot import plots
    from ..perf.table import read

    if len(arguments) != 2 or arguments[0] != "plot":
        raise ValueError(f"{' '.join(arguments)!r} is not understood; write: qgnn bench plot FILE.csv --out DIR")
    for path in plots(read(Path(arguments[1])), folder):
        typer.echo(path)


def _print_results(records: Sequence[Record], into: Path | None) -> None:
    from ..perf.table import document, refreshed

    if into is None:
        typer.echo(document(records))
        return
    try:
        into.write_text(refreshed(into.read_text(encoding="utf-8"), records), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--into {into} cannot be read and written ({error.strerror})") from error
