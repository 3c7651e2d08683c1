"""The command line. Exit codes: 0 done, 1 a run failed, 2 bad input (one line on stderr says what), 130 interrupted."""

from __future__ import annotations

import sys
from typing import Any

import typer

from . import bench, info, memory, reproduce, simulate, sweep, train

# torch takes seconds to import, so that every command imports what it needs by itself: --help is quick.

app = typer.Typer(
    name="qgnn",
    help="Quantized graph neural networks: train them, and see what runs here.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for group in (train, reproduce, sweep, bench, simulate, memory, info):  # the order of --help
    app.registered_commands += group.commands.registered_commands

# click's base class of errors; newer typer carries a click of its own
_UsageProblem: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main() -> None:
    """Entry point of ``qgnn``: bad usage is one line on stderr, too."""
    try:
        sys.exit(app(standalone_mode=False))
    except _UsageProblem as error:
        typer.echo(f"qgnn: {' '.join(error.format_message().split())}", err=True)
        sys.exit(error.exit_code)
