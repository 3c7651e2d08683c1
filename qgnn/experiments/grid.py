"""Grids of experiments: one TOML file that says what ``qgnn sweep`` trains, every combination of

- ``datasets``, ``models``, ``schemes``: names as ``qgnn train`` takes them;
- ``seeds``: how many, from 0, or which: ``3`` or ``[100, 101]``; and every fold, or the first ``folds`` of a data set that has several;
- ``[recipe]``: values of the recipe (:class:`qgnn.recipes.Recipe`), as ``--set`` takes them; of a list, each.

``[[exclude]]`` leaves out what matches all of its fields: ``dataset``, ``model``, ``scheme`` or a name under ``[recipe]``, with a value, a pattern
such as ``"dq-*"``, or a list of these. ``[search]`` looks for hyper-parameters instead (:mod:`.search`)::

    datasets = ["Cora", "MUTAG"]
    models = ["gcn", "gin"]
    schemes = ["fp32", "fixed-8", "sdq:8,6,4,4"]
    seeds = 10

    [recipe]
    hidden = [16, 128]

    [[exclude]]
    dataset = "MUTAG"
    model = "gcn"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

from .. import quant
from ..data import Dataset, GraphDataset, load
from ..recipes import recipe_for
from ..tasks import fold_count
from .search import Search
from .store import Cell, Key
from .table import toml

Point = dict[str, Any]
"""One combination: "dataset", "model", "scheme" and the values under ``[recipe]``."""


@dataclass(frozen=True)
class Grid:
    """A grid; the module says what its fields mean.

    Attributes:
        recipe: by name, the values that are tried.
        exclude: by name, patterns of which one has to match.
    """

    name: str
    datasets: tuple[str, ...]
    models: tuple[str, ...]
    schemes: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    folds: int | None = None
    recipe: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    exclude: tuple[Mapping[str, tuple[str, ...]], ...] = ()
    search: Search | None = None

    def points(self) -> Iterator[Point]:
        """The combinations that no exclusion matches, data set by data set.

        Raises:
            ValueError: an exclusion that matches nothing.
        """
        unused = list(self.exclude)
        axes = {"dataset": self.datasets, "model": self.models, "scheme": self.schemes, **self.recipe}
        for values in product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            matching = [e for e in self.exclude if _matches(e, point)]
            unused = [e for e in unused if e not in matching]
            if not matching:
                yield point
        if unused:
            raise ValueError(f"grid {self.name}: nothing matches the exclusion {dict(unused[0])}")


def _matches(exclusion: Mapping[str, tuple[str, ...]], point: Point) -> bool:
    return all(any(fnmatchcase(str(point[k]), p) for p in patterns) for k, patterns in exclusion.items())


def load_grid(path: Path) -> Grid:
    """The grid of a TOML file.

    Raises:
        ValueError: there is no such file, or it is no grid; the sentence names the field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the grid {path} cannot be read ({error})") from error
    return parse(path.stem, text)


def parse(name: str, text: str) -> Grid:
    """The grid of a file's text."""
    content, where = toml(f"grid {name}", text), f"grid {name}"
    known = ("datasets", "models", "schemes", "seeds", "folds", "recipe", "exclude", "search")
    if unknown := set(content) - set(known):
        raise ValueError(f"{where} has unknown fields {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    seeds, folds = content.get("seeds", 1), content.get("folds")
    if _is_count(seeds):
        seeds = list(range(seeds))
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int and s >= 0 for s in seeds):
        raise ValueError(f"{where}: seeds is a number from 1, or a list such as [100, 101]")
    if folds is not None and not _is_count(folds):
        raise ValueError(f"{where}: folds is a number from 1")
    recipe = _tables(where, "recipe", [content.get("recipe", {})])[0]
    exclude = _tables(where, "exclude", content.get("exclude", []))
    axes = {"dataset", "model", "scheme", *recipe}
    for exclusion in exclude:
        if not exclusion or set(exclusion) - axes:
            raise ValueError(f"{where}: an [[exclude]] has some of the fields {', '.join(sorted(axes))}")
    search = content.get("search")
    return Grid(
        name,
        datasets=_names(where, content, "datasets"),
        models=_names(where, content, "models"),
        schemes=_names(where, content, "schemes"),
        seeds=tuple(dict.fromkeys(seeds)),
        folds=folds,
        recipe=recipe,
        exclude=tuple({k: tuple(map(str, v)) for k, v in exclusion.items()} for exclusion in exclude),
        search=None if search is None else Search.parse(where, search),
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _names(where: str, content: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = content.get(key)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{where}: {key} is a list of names, as in {key} = ["..."]')
    return tuple(dict.fromkeys(names))


def _tables(where: str, key: str, tables: Any) -> list[dict[str, tuple[Any, ...]]]:
    """Tables of values and lists of values; a value is a list of one."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        form = {"recipe": "one table, [recipe]", "exclude": "a list of tables, each under [[exclude]]"}
        raise ValueError(f"{where}: {key} is {form[key]}")
    found = [{k: tuple(v) if isinstance(v, list) else (v,) for k, v in table.items()} for table in tables]
    for name, values in (item for table in found for item in table.items()):
        if not values or not all(isinstance(v, int | float | str) for v in values):
            raise ValueError(f"{where}: {name} under {key} is a number, a name, or a list of these")
    return found


@dataclass(frozen=True)
class Group:
    """The trainings of one combination, one for every seed and fold, and whether a larger metric is better."""

    cells: list[Cell]
    larger: bool


def groups(grid: Grid, root: Path | None = None) -> list[Group]:
    """The trainings of a grid. Each data set is loaded once, and let go. Combinations that come to the same, such as two spellings of a number, are
    one.

    Raises:
        ValueError: a data set, scheme, model or setting does not exist, or a data set is missing; the sentence names the combination.
    """
    found: dict[Key, Group] = {}
    dataset: Dataset | GraphDataset | None = None
    asked_for = ""
    for point in grid.points():
        try:
            if dataset is None or asked_for != point["dataset"]:
                dataset, asked_for = load(point["dataset"], root), point["dataset"]
            cells = _cells(point, dataset, grid)
        except ValueError as error:
            raise ValueError(f"grid {grid.name}, {' '.join(map(str, point.values()))}: {error}") from error
        found.setdefault(cells[0].key, Group(cells, larger=dataset.task != "graph-regression"))
    if not found:
        raise ValueError(f"grid {grid.name}: the exclusions leave nothing to train")
    return list(found.values())


def _cells(point: Point, dataset: Dataset | GraphDataset, grid: Grid) -> list[Cell]:
    scheme, several = quant.parse(point["scheme"]), fold_count(dataset)
    if grid.folds is not None and several > 1 and grid.folds > several:
        raise ValueError(f"folds = {grid.folds} asks for more folds than {dataset.name} has, {several}")
    settings = {name: str(value) for name, value in point.items() if name not in ("dataset", "model", "scheme")}
    recipe = recipe_for(point["model"], scheme, dataset).changed(settings=settings)
    folds = several if grid.folds is None else min(grid.folds, several)
    return [
        Cell(dataset.name, point["model"], scheme.name, recipe, seed, fold)
        for seed in grid.seeds
        for fold in range(folds)
    ]
