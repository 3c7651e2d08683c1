"""``qgnn info``: what runs here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .common import JsonOption, console_for, one_line_errors

if TYPE_CHECKING:
    from rich.table import Table

commands = typer.Typer()


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


@commands.command(
    epilog="Example: qgnn info --json -",
    help="Print versions, devices, backends, environment variables, and how to install what is missing.",
)
def info(json_to: JsonOption = None) -> None:
    """The environment report that an issue needs."""
    with one_line_errors(lambda: "interrupted"):
        from ..environment import report

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
            console_for(json_to).print(table)
