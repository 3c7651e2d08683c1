"""What ``qgnn results`` shows of a folder that ``qgnn sweep`` filled: runs that match a condition, their means, pivots, and files of them."""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from ..results import KEYS
from ..trace import write_whole
from .compare import aligned
from .parquet import SETTINGS, read, write_table
from .store import DEFAULTS, Key, key_of

MEANS = ("test_acc", "val_acc", "test_acc_best_over_epochs", "average_bits", "compression")
"""What :func:`means` averages."""

RUN = [*KEYS, "seed", "fold", *SETTINGS]
"""The columns that tell runs apart."""


def runs(out: Path) -> pd.DataFrame:
    """The last attempt at every training of a folder, all columns (:data:`.parquet.SCHEMA`), in the order of data set, model, scheme and seed.

    Raises:
        ValueError: there are none.
    """
    frame = read(out).to_pandas().fillna(DEFAULTS)
    if frame.empty:
        raise ValueError(f"{out} holds no results; qgnn sweep FILE --out {out} puts them there")
    frame = frame.sort_values([*RUN, "attempt"], kind="stable", ignore_index=True)
    return frame.drop_duplicates(RUN, keep="last", ignore_index=True)


def among(frame: pd.DataFrame, keys: Set[Key]) -> pd.DataFrame:
    """The runs with these keys."""
    return frame[[key_of(row, {name: row[name] for name in SETTINGS}) in keys for row in records(frame)]]


_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda column, values: column.isin(values),
    ast.NotIn: lambda column, values: ~column.isin(values),
}


def where(frame: pd.DataFrame, condition: str) -> pd.DataFrame:
    """The rows for which a condition holds: comparisons of a column with a value, such as ``dataset == 'Cora' and average_bits <= 4`` or
    ``scheme in ['fp32', 'fixed-8']``, joined by ``and``, ``or``, ``not`` and parentheses. It has Python's syntax, but is looked at, not run.

    Raises:
        ValueError: it is something else, or there is no such column.
    """
    try:
        mask = _mask(frame, ast.parse(condition.strip(), mode="eval").body)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        known = "dataset == 'Cora' and (bits <= 4 or scheme in ['fp32', 'fixed-8'])"
        raise ValueError(f"--where {condition!r} is no condition ({error}); write one such as {known}") from error
    if not mask.any():
        raise ValueError(f"no run matches --where {condition!r}")
    return frame[mask]


def _mask(frame: pd.DataFrame, node: ast.expr) -> pd.Series[bool]:
    match node:
        case ast.BoolOp(op, values):
            first, *others = (_mask(frame, value) for value in values)
            for other in others:
                first = first & other if isinstance(op, ast.And) else first | other
            return first
        case ast.UnaryOp(ast.Not(), operand):
            return ~_mask(frame, operand)
        case ast.Compare(ast.Name(name), [op], [value]) if type(op) in _COMPARISONS:
            column, given = frame[_column(frame, name)], _literal(value)
            if not isinstance(op, ast.In | ast.NotIn) and not isinstance(given, int | float | str | None):
                raise TypeError(f"{ast.unparse(node)} does not compare with one value; a list takes in")
            return _COMPARISONS[type(op)](column, given)
    raise TypeError(f"{ast.unparse(node)} does not compare a column with a value")


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise TypeError(f"{ast.unparse(node)} is no number, string or list") from None


def _column(frame: pd.DataFrame, name: str) -> str:
    if name not in frame.columns:
        raise ValueError(f"there is no column {name!r}; there are {', '.join(frame.columns)}")
    return name


def means(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for every data set, model and scheme, and for every value of the settings that differ among these: the numbers of ``runs`` that are
    done and of those ``not_done``, and of :data:`MEANS` the mean and, as ``NAME_sd``, the sample standard deviation."""
    differing = [name for name in SETTINGS if (frame.groupby(list(KEYS))[name].nunique() > 1).any()]
    groups = frame.assign(done=frame["status"] == "done").groupby([*KEYS, *differing], sort=False)
    table = groups.agg(metric=("metric", "first"), runs=("done", "sum"), size=("done", "size"))
    table["not_done"] = table.pop("size") - table["runs"]
    for name in MEANS:
        table[name], table[f"{name}_sd"] = groups[name].mean(), groups[name].std()
    return table.reset_index()


def failures(frame: pd.DataFrame) -> list[str]:
    """A sentence for every run without a result. What a search pruned, or saw diverge, is one."""
    expected = frame["status"].isin(["done", "pruned"]) | (frame["status"] == "diverged") & frame["trial"].notna()
    return [
        f"{row['dataset']} {row['model']} {row['scheme']}, seed {row['seed']}, fold {row['fold']}: {row['status']}: {row['reason']}"
        for row in frame[~expected].to_dict("records")
    ]


def pivot(frame: pd.DataFrame, shape: str) -> pd.DataFrame:
    """The mean of a column over the runs, by others: ``shape`` is "ROWS,COLUMNS,VALUE", such as "scheme,dataset+model,test_acc".

    Raises:
        ValueError: ``shape`` is something else, or there is no such column.
    """
    parts = shape.split(",")
    if len(parts) != 3 or "+" in parts[2]:
        raise ValueError(f"--pivot takes ROWS,COLUMNS,VALUE, such as scheme,dataset+model,test_acc; got {shape!r}")
    rows, columns, (value,) = ([_column(frame, name) for name in part.split("+")] for part in parts)
    if frame[value].dtype.kind not in "iuf":
        raise ValueError(f"--pivot averages numbers, and {value} is none; such as {', '.join(MEANS)}")
    if twice := {name for name in [*rows, *columns, value] if [*rows, *columns, value].count(name) > 1}:
        raise ValueError(f"--pivot names {', '.join(twice)} more than once")
    table = frame.pivot_table(value, rows, columns, sort=False)
    table.columns = pd.Index([" ".join(map(str, c)) if isinstance(c, tuple) else str(c) for c in table.columns])
    return table.reset_index()


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as JSON can hold them."""
    rows = table.to_dict("records")
    return [{str(name): None if pd.isna(value) else value for name, value in row.items()} for row in rows]


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown that reads well as plain text, too; deviations stand behind their means."""
    shown = [name for name in table.columns if not (name.endswith("_sd") and name[:-3] in table.columns)]
    rows = [[_text(row, name) for name in shown] for row in table.to_dict("records")]
    left = next((i for i, name in enumerate(shown) if table[name].dtype.kind in "iuf"), len(shown))
    return "\n".join(aligned([shown, *rows], left)) + "\n"


def _text(row: dict[Any, Any], name: str) -> str:
    value, deviation = row[name], row.get(f"{name}_sd")
    if pd.isna(value):
        return ""
    if not isinstance(value, float):
        return str(value)
    if deviation is None:
        return f"{value:.6g}"
    digits = ".3f" if row["metric"] == "mae" else ".2f"
    return f"{value:{digits}}" + ("" if pd.isna(deviation) else f" ± {deviation:{digits}}")


def export(table: pd.DataFrame, path: Path) -> None:
    """Writes a table whole or not at all, in the form that the file's suffix names.

    Raises:
        ValueError: the suffix is none of .csv, .parquet, .json and .md.
    """
    if path.suffix == ".parquet":
        write_table(path, pa.Table.from_pandas(table, preserve_index=False), {})
    elif path.suffix == ".csv":
        write_whole(path, table.to_csv(index=False))
    elif path.suffix == ".json":
        write_whole(path, json.dumps(records(table), indent=1) + "\n")
    elif path.suffix == ".md":
        write_whole(path, markdown(table))
    else:
        raise ValueError(f"--export {path}: the name has to end with .csv, .parquet, .json or .md")
