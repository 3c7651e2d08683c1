"""The file of results, a CSV that rows are only ever added to, and the Markdown tables that are made of it.

One line is one candidate on one shape in one run. :data:`KEY` is unique: what is measured again gets a new date, and tables show the newest run of
every shape. ``status`` is "ok", "wrong" (the gate refused the result), "does not fit" (into memory) or "failed"; ``reason`` says more, and
the times are then empty; of a row that is ok it says why its energy was not measured. Times are quantiles 20, 50 and 80 % over the rounds, in ms;
ratios are the baseline's time over the candidate's.

Where it is known or was measured: ``bytes`` and ``operations`` that a call needs at least (:class:`qgnn.perf.bench.Work`); ``bound``, the share of
the median time that the machine would need for them, by the rates of its own rows in the same run; ``millijoules`` a call; ``peak_bytes`` allocated.
"""

from __future__ import annotations

import csv
import io
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

import torch

from .. import __version__
from . import targets
from .bench import Row
from .targets import Record, Value

KEY = ("operation", "shape", "candidate", "device", "threads", "torch", "qgnn", "date")
COLUMNS = (
    *("operation", "shape", "candidate", "baseline", "status", "reason", "rounds"),
    *("ms_20", "ms_50", "ms_80", "ratio_20", "ratio_50", "ratio_80"),
    *("bytes", "operations", "bound", "millijoules", "peak_bytes"),
    *("device", "threads", "torch", "qgnn", "date"),
)

SUMMARY = ("torch-csr-fp32", "pyg-scatter-fp32", "qgnn-fp32", "qgnn-int8", "qgnn-int4")
"""Columns of the summary, of what was measured with 128 features."""


def device_name(device: str) -> str:
    """The GPU's name, or the processor's model."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def record(row: Row, device: str, date: datetime) -> dict[str, Value]:
    """One line of the file; six digits are more than a measurement has."""
    timing = row.timing
    numbers: tuple[Value, ...] = (None,) * 7
    if timing is not None:
        numbers = (timing.rounds, *_digits(*timing.ms), *(_digits(*timing.ratio) if timing.ratio else (None,) * 3))
    work = (None, None) if row.work is None else _digits(row.work.bytes, row.work.operations)
    joules = (None,) if row.joules is None else _digits(row.joules * 1e3)
    values = (
        *(row.operation, row.shape, row.candidate, row.baseline, row.status, row.reason),
        *(*numbers, *work, None, *joules, row.peak),
        *(device_name(device), torch.get_num_threads(), torch.__version__, __version__),
        date.isoformat(timespec="seconds"),
    )
    return dict(zip(COLUMNS, values, strict=True))


def _digits(*values: float) -> tuple[float, ...]:
    return tuple(float(f"{v:.6g}") for v in values)


def check_file(path: Path) -> None:
    """Raises ValueError if rows cannot be added to ``path``."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: name a file in a folder that exists")
    if path.exists() and path.stat().st_size:
        read(path)


def append(path: Path, records: Iterable[Record]) -> None:
    """Adds lines in one piece, synchronised to the disk; a new file starts with the names of the columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not path.exists() or not path.stat().st_size:
        writer.writeheader()
    writer.writerows(records)
    with path.open("ab") as file:
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Sequence[Record]:
    """All lines.

    Raises:
        ValueError: there is no such file, or it has other columns.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            records = list(reader)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if tuple(reader.fieldnames or ()) != COLUMNS or any(None in r or None in r.values() for r in records):
        raise ValueError(f"{path} is no file of results: its columns must be {', '.join(COLUMNS)}")
    return records


def line(found: Record) -> str:
    """A record for a reader."""
    what = f"{found['operation']:<10} {found['shape']:<34} {found['candidate']:<20}"
    if found["status"] != "ok":
        return f"{what} {found['status']}: {found['reason']}"
    if not found["ms_50"]:
        return f"{what} ok, not timed"
    more = f"  ({found['reason']})" if found["reason"] else ""
    shown = f"{what} {_number(found, 'ms_50'):10.3f} ms"
    if found["ratio_50"]:
        low, middle, high = _ratios(found)
        shown += f"  {middle:6.2f} x ({low:.2f}-{high:.2f})"
    return shown + (f"  {_number(found, 'bound'):4.0%} of the bound" if found["bound"] else "") + more


def _number(found: Record, name: str) -> float:
    value = found[name]
    assert value is not None, "a row that is ok has its times"
    return float(value)


def _ratios(found: Record) -> tuple[float, float, float]:
    return _number(found, "ratio_20"), _number(found, "ratio_50"), _number(found, "ratio_80")


def newest(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """The rows of the last run of every operation and shape, in their order."""
    runs: dict[tuple[str, str], list[Record]] = {}
    for found in records:
        run = runs.setdefault((str(found["operation"]), str(found["shape"])), [])
        if run and (run[-1]["date"], run[-1]["device"]) != (found["date"], found["device"]):
            run.clear()
        run.append(found)
    return runs


def tables(records: Iterable[Record]) -> dict[str, str]:
    """Markdown tables by name: "targets", where there are rows that one is set for, "summary", then one for each operation, and "bounds", "energy"
    and "memory" where something was measured. A cell is the median ratio and its quantiles 20 and 80, the baseline's the median time; a row that has
    no time shows its status."""
    runs = newest(records)
    chosen = {
        (operation, shape): [found for found in run if found["candidate"] in SUMMARY]
        for (operation, shape), run in runs.items()
        if operation == "layer" or (operation == "aggregate" and shape.endswith("F=128"))
    }
    made = {"targets": compared} if (compared := targets.compared(runs)) else {}
    if chosen:
        made["summary"] = _table(chosen, partial(_cell, spread=False))
    for name in dict.fromkeys(operation for operation, _ in runs):
        made[name] = _table({key: run for key, run in runs.items() if key[0] == name}, _cell, named=False)
    for name, column, unit in (
        ("bounds", "bound", "{:.0%}"),
        ("energy", "millijoules", "{:.3g} mJ"),
        ("memory", "peak_bytes", "{:,.0f} B"),
    ):
        measured = {key: kept for key, run in runs.items() if (kept := [found for found in run if found[column]])}
        if measured:
            made[name] = _table(measured, partial(_plain, column, unit))
    return made


def _table(runs: Mapping[tuple[str, str], list[Record]], cell: Callable[[Record], str], named: bool = True) -> str:
    """One row a shape, with the name of the operation or without it, and one column a candidate."""
    names = list(dict.fromkeys(str(found["candidate"]) for run in runs.values() for found in run))
    lines = [["", *names], ["---", *["---:"] * len(names)]]
    for (operation, shape), run in runs.items():
        cells = {found["candidate"]: cell(found) for found in run}
        lines.append([f"{operation}, {shape}" if named else shape, *(cells.get(name, "") for name in names)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(column: str, unit: str, found: Record) -> str:
    return unit.format(_number(found, column))


def _cell(found: Record, spread: bool = True) -> str:
    if found["status"] != "ok" or not found["ms_50"]:
        return str(found["status"])
    if found["candidate"] == found["baseline"] or not found["ratio_50"]:
        return f"{_number(found, 'ms_50'):.3g} ms"
    low, middle, high = _ratios(found)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})" if spread else f"{middle:.2f}"


def document(records: Iterable[Record]) -> str:
    """All tables under headings."""
    return "\n\n".join(f"### {name}\n{table}" for name, table in tables(records).items())


_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def refreshed(text: str, records: Iterable[Record]) -> str:
    """``text`` with the tables of ``records`` between its markers, ``<!-- table: NAME -->`` and ``<!-- end of table -->``; the name "all" stands
    for all of them, under headings.

    Raises:
        ValueError: there are no markers, or one names a table that the records do not have.
    """
    records = list(records)
    known = tables(records) | {"all": document(records)}

    def table(marked: re.Match[str]) -> str:
        if marked[2] not in known:
            raise ValueError(f"there is no table {marked[2]!r} in these results; there are {', '.join(known)}")
        return f"{marked[1]}{known[marked[2]]}\n{marked[3]}"

    new, count = _MARKED.subn(table, text)
    if not count:
        raise ValueError("nothing is marked as a table; put <!-- table: NAME --> and <!-- end of table --> around one")
    return new
