"""A folder of runs whose results are one Parquet data set: ``runs/`` has a file for each attempt at a training, with one row, and one with the rows
of earlier commands; ``checkpoints/`` the unfinished ones.

A file appears whole or not at all. Whatever reads Parquet reads all of them as one table, of the columns in :data:`SCHEMA`, which are numbers and
strings: no value is a serialized object.
"""

from __future__ import annotations

import json
import os
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet

from .. import environment, quant, results, train
from ..recipes import Recipe
from .store import Cell, Folder, Key, key_of
from .workers import Failure, Outcome

_TYPES = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "str": pa.string()}
SETTINGS = tuple(f.name for f in fields(Recipe))
"""The columns of the recipe."""

SCHEMA = pa.schema(
    [
        # what was trained; trial: its number in a search, null in a grid
        *((name, pa.string()) for name in results.KEYS),
        *((name, pa.int64()) for name in ("seed", "fold", "trial")),
        # how it ended: "done", or why not (workers.Failure) with a sentence; and which attempt it was, from 1
        ("status", pa.string()),
        ("reason", pa.string()),
        ("attempt", pa.int64()),
        # what came out (results.py), null unless it is done: these fields of its record, and the whole record as JSON
        *((name, pa.string()) for name in ("task", "metric")),
        ("best_epoch", pa.int64()),
        *((name, pa.float64()) for name in results.MEASURES),
        ("record", pa.string()),
        # the scheme (quant.Scheme): two of its fields, and all as JSON
        ("method", pa.string()),
        ("bits", pa.int64()),
        ("scheme_fields", pa.string()),
        *((f.name, _TYPES[str(f.type)]) for f in fields(Recipe)),
        # versions and devices of the process that trained (environment.machine) as JSON, null unless it is done
        ("environment", pa.string()),
    ]
)
"""The columns of the data set."""


class ParquetFolder(Folder):
    """A folder of runs with Parquet files."""

    def __init__(self, out: Path) -> None:
        super().__init__(out, "runs")

    def save(self, cell: Cell, done: train.Run) -> None:
        done.record["environment"] = _environment()

    def write(self, cell: Cell, outcome: Outcome, attempt: int) -> dict[str, Any]:
        """Writes the row of an attempt at a cell, and returns it. Of what is not done and may be tried again, the checkpoint stays."""
        row = _row(cell, outcome, attempt)
        # 8 KB in place of the 28 with statistics, dictionaries and a second schema for one row
        small = {"write_statistics": False, "use_dictionary": False, "store_schema": False}
        self._write(f"{cell.stem}_attempt{attempt}", pa.Table.from_pylist([row], SCHEMA), small)
        if row["status"] in ("done", "diverged", "pruned"):
            self.clear(cell)
        return row

    def merge(self) -> None:
        """Puts all rows into one file, which takes 15,000 of them in half a second where that many files take most of a minute. A crash on the way
        leaves rows twice, and these count once. What crashes left half-written goes, too."""
        files = _files(self.out)
        if len(files) > 1:
            rows = read(self.out)
            twice = rows.select([*results.KEYS, "seed", "fold", "attempt", *SETTINGS]).to_pandas().duplicated()
            self._write(f"merged-{uuid.uuid4().hex}", rows.filter(pa.array(~twice)), {})
            for file in files:
                file.unlink()
        for file in (self.out / "runs").glob(".*.tmp"):
            file.unlink()

    def _write(self, name: str, table: pa.Table, options: dict[str, bool]) -> None:
        write_table(self.out / "runs" / f"{name}.parquet", table, options)


class Ledger:
    """How the cells of a folder ended: its rows, in memory.

    Raises:
        ValueError: a file cannot be read.
    """

    def __init__(self, folder: ParquetFolder) -> None:
        self.folder = folder
        self.rows: dict[Key, dict[str, Any]] = {}
        self._attempts = Counter[Key]()
        columns = [*results.KEYS, "seed", "fold", "status", "attempt", "val_acc", *SETTINGS]
        for row in read(folder.out).select(columns).sort_by("attempt").to_pylist():
            self._add(row)

    def status(self, cell: Cell) -> str:
        """Of its last attempt; "" where there was none."""
        row = self.rows.get(cell.key)
        return "" if row is None else row["status"]

    def note(self, cell: Cell, outcome: Outcome) -> None:
        """Writes how an attempt at a cell ended."""
        self._add(self.folder.write(cell, outcome, self._attempts[cell.key] + 1))

    def _add(self, row: dict[str, Any]) -> None:
        key = key_of(row, {name: row.get(name) for name in SETTINGS})
        self.rows[key], self._attempts[key] = row, row["attempt"]


@lru_cache(maxsize=1)
def _environment() -> dict[str, Any]:
    return environment.machine()


def _row(cell: Cell, outcome: Outcome, attempt: int) -> dict[str, Any]:
    scheme = quant.parse(cell.scheme)
    row = {
        **{name: getattr(cell, name) for name in (*results.KEYS, "seed", "fold")},
        "trial": None if cell.trial is None else cell.trial.number,
        "attempt": attempt,
        "method": scheme.method,
        "bits": scheme.bits,
        "scheme_fields": json.dumps(asdict(scheme)),
        **asdict(cell.recipe),
    }
    if isinstance(outcome, Failure):
        return {**row, "status": outcome.status, "reason": outcome.reason}
    record = {name: value for name, value in outcome.items() if name != "environment"}
    return {
        **row,
        **{name: record[name] for name in ("task", "metric", "best_epoch")},
        **{name: record.get(name) for name in results.MEASURES},
        "status": "done",
        "record": results.dumps(record),
        "environment": json.dumps(outcome.get("environment")),
    }


def write_table(path: Path, table: pa.Table, options: Mapping[str, bool]) -> None:
    """Writes a table to a file that appears whole or not at all, and is on the disk then. Until then its name begins with a dot, which readers of
    Parquet data sets skip."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            pyarrow.parquet.write_table(table, file, **options)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or a power cut could undo the renaming, and not the removal of what was merged
    finally:
        os.close(folder)


def _files(out: Path) -> list[Path]:
    return sorted((out / "runs").glob("*.parquet"))


def read(out: Path) -> pa.Table:
    """All rows of a folder, in the order of the file names. Columns that an older version did not write are null.

    Raises:
        ValueError: a file cannot be read.
    """
    files = _files(out)
    if not files:
        return SCHEMA.empty_table()
    try:
        return pyarrow.dataset.dataset(list(map(str, files)), SCHEMA).to_table()
    except (pa.ArrowException, OSError) as error:
        if _files(out) != files:  # a sweep that runs there has merged them meanwhile
            return read(out)
        raise ValueError(
            f"results in {out} cannot be read ({error}); delete the file, and its training is run again"
        ) from error
