"""Tables of experiments: TOML files with one row for each figure that a paper prints.

A file has ``title``, ``source``, ``rows`` and ``kind``: "accuracy" (the default), "density" for densities beside it, or "memory", whose rows are
measured and not trained (``qgnn memory``). The fields of a row:

==================  =============================================================================================================
field               meaning
==================  =============================================================================================================
id                  its name, unlike all others of the table
dataset, model      as ``qgnn train`` takes them
scheme              likewise; without it the row is printed only, and ``note`` says why
metric              "accuracy" (the default), "mae", "hits@50", "f1", "ap" or "rocauc"
printed             [value, deviation] as the paper prints them: percent, or the error itself for "mae"
bits, compression   average bits and compression of the feature maps, as printed
ram                 peak RAM in MB, as printed
densities           [memory, arithmetic] density, as printed
recipe              numbers of the recipe (:class:`qgnn.recipes.Recipe`) that the row changes
note                a sentence for the reader
==================  =============================================================================================================
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAMES = (
    *(f"a2q-{n}" for n in (1, 2, 3, *range(8, 17))),
    *(f"dq-{n}" for n in (1, 2, 3, 9)),
    "tu",
    "qt-ram",
    "qt-density",
    "qt-accuracy",
)
"""The tables that come with the package: those of A²Q and of Degree-Quant, by the papers' numbers, GIN on small TUDatasets, and Bqain's of quantized
training."""

KINDS = ("accuracy", "density", "memory")

METRICS = ("accuracy", "mae", "hits@50", "f1", "ap", "rocauc")


@dataclass(frozen=True)
class Row:
    """One row of a table; the module lists the fields."""

    id: str
    dataset: str
    model: str
    scheme: str | None = None
    metric: str = "accuracy"
    printed: tuple[float, float] | None = None
    bits: float | None = None
    compression: float | None = None
    ram: float | None = None
    densities: tuple[float, float] | None = None
    recipe: Mapping[str, int | float | str] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        texts = (self.id, self.dataset, self.model, "" if self.scheme is None else self.scheme, self.note)
        numbers = [
            n
            for n in (self.bits, self.compression, self.ram, *(self.printed or ()), *(self.densities or ()))
            if n is not None
        ]
        if not all(isinstance(t, str) for t in texts) or not all(isinstance(n, int | float) for n in numbers):
            raise ValueError("names are strings, and printed, bits, compression, ram and densities numbers")
        if self.metric not in METRICS:
            raise ValueError(f"metric is {self.metric!r}; choose one of {', '.join(METRICS)}")
        if self.scheme is None and not self.note:
            raise ValueError("without a scheme nothing can be run, so a note has to say why")
        if not isinstance(self.recipe, Mapping):
            raise ValueError("recipe takes settings, as in { layers = 3 }")


@dataclass(frozen=True)
class Table:
    """A table and what it is called: ``name`` is also that of the files that show it."""

    name: str
    title: str
    source: str
    rows: tuple[Row, ...]
    kind: str = "accuracy"

    def select(self, patterns: list[str]) -> tuple[Row, ...]:
        """The rows whose ids match one of the patterns, such as ``gcn-*``; all rows without a pattern.

        Raises:
            ValueError: a pattern that matches nothing.
        """
        for pattern in patterns:
            if not any(fnmatchcase(row.id, pattern) for row in self.rows):
                known = ", ".join(row.id for row in self.rows)
                raise ValueError(f"table {self.name} has no row {pattern!r}; there are {known}")
        return tuple(row for row in self.rows if not patterns or any(fnmatchcase(row.id, p) for p in patterns))


def load(table: str) -> Table:
    """A table by its name, one of :data:`NAMES`, or by the path of a ``.toml`` file.

    Raises:
        ValueError: there is no such table or file, or it is not a table; the sentence names the row and the field.
    """
    if table.endswith(".toml"):
        path = Path(table)
        try:
            return parse(path.stem, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the table {table} cannot be read ({error})") from error
    if table not in NAMES:
        raise ValueError(f"there is no table {table!r}; choose one of {', '.join(NAMES)}, or name a file TABLE.toml")
    file = files(__package__).joinpath("tables", f"{table}.toml")
    return parse(table, file.read_text(encoding="utf-8"))


def parse(name: str, text: str) -> Table:
    """The table of a file's text."""
    content = toml(f"table {name}", text)
    entries = content.get("rows")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f'table {name} has no rows; write rows = [{{ id = "...", dataset = "...", ... }}, ...]')
    if unknown := set(content) - {"title", "source", "rows", "kind"}:
        raise ValueError(f"table {name} has unknown fields {', '.join(sorted(unknown))}")
    rows = tuple(_row(name, number, entry) for number, entry in enumerate(entries, 1))
    ids = [row.id for row in rows]
    if twice := {i for i in ids if ids.count(i) > 1}:
        raise ValueError(f"table {name} has more than one row {', '.join(sorted(twice))}")
    kind = content.get("kind", KINDS[0])
    if kind not in KINDS:
        raise ValueError(f"table {name} has kind {kind!r}; choose one of {', '.join(KINDS)}")
    return Table(name, str(content.get("title", name)), str(content.get("source", "")), rows, kind)


def toml(what: str, text: str) -> dict[str, Any]:
    """What a TOML text holds.

    Raises:
        ValueError: it is no TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{what} is no TOML: {error}") from error


def _row(table: str, number: int, entry: dict[str, Any]) -> Row:
    where = f"table {table}, row {entry.get('id', number)}"
    if unknown := set(entry) - {f.name for f in fields(Row)}:
        raise ValueError(f"{where}: unknown fields {', '.join(sorted(unknown))}")
    if missing := {"id", "dataset", "model"} - set(entry):
        raise ValueError(f"{where}: {', '.join(sorted(missing))} missing")
    pairs = {"printed": "[value, deviation]", "densities": "[memory, arithmetic]"}
    for field_name, form in pairs.items():
        pair = entry.get(field_name)
        if pair is not None and not (isinstance(pair, list) and len(pair) == 2):
            raise ValueError(f"{where}: {field_name} is {form}")
    try:
        values: dict[str, Any] = {name: tuple(value) if name in pairs else value for name, value in entry.items()}
        return Row(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
