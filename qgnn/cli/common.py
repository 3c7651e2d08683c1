"""What the commands share: options, one-line errors, tables, progress, JSON."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..accel import Config

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


def stop(message: object, code: int) -> NoReturn:
    """Ends the command: one line on stderr, and an exit code."""
    typer.echo(f"qgnn: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(code)


@contextmanager
def one_line_errors(interrupted: Callable[[], str]) -> Iterator[None]:
    """Errors as one line on stderr and an exit code; ``interrupted`` tells, after Ctrl-C, how to go on."""
    try:
        yield
    except (ValueError, TypeError) as error:
        stop(error, 2)
    except OSError as error:
        stop(error, 1)
    except KeyboardInterrupt:
        stop(interrupted(), 130)


def console_for(json_to: str | None) -> Console:
    """Where tables go: stdout, or stderr when JSON has stdout."""
    from rich.console import Console

    return Console(stderr=json_to == "-", highlight=False)


@contextmanager
def progress() -> Iterator[Callable[[str, float, int], None]]:
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


def quiet_profiler() -> None:
    """Called before torch is imported, whose profiler writes to stderr otherwise."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def check_file(option: str, path: Path) -> None:
    """Says at the start, not after the work, that a file cannot be there."""
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option} {path}: the folder does not exist; make it first")


def make_folder(out: Path) -> None:
    """Makes the folder of --out; that it cannot be made is bad input."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: the folder cannot be made ({error.strerror})") from error


def accelerator_of(file: Path | None, profile: str | None, settings: dict[str, str]) -> Config:
    """The configuration that --config, --profile and --set name."""
    from ..accel.config import check_keys, load_config

    check_keys(settings, "--set")
    return load_config(profile, file=file, **settings)


class JsonLines:
    """Where --json sends records: each as soon as it is there. A file is replaced when the first one comes."""

    def __init__(self, target: str | None) -> None:
        self.target, self.started = target, False
        if target is not None and target != "-":
            check_file("--json", Path(target))

    def write(self, record: dict[str, Any]) -> None:
        from ..results import append, dumps

        if self.target == "-":
            typer.echo(dumps(record))
        elif self.target is not None:
            if not self.started:
                Path(self.target).unlink(missing_ok=True)
            append(self.target, record)
        self.started = True


def key_values(pairs: list[str]) -> dict[str, str]:
    """The settings of ``--set``."""
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--set takes KEY=VALUE, got {pair!r}")
    return dict(pair.split("=", 1) for pair in pairs)


def narrow_table(title: str, *columns: str) -> Table:
    """A table of numbers that fits 80 columns; its first column names the rows, on several lines where a name is long."""
    from rich import box
    from rich.table import Column, Table

    table = Table(Column(overflow="fold"), title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
