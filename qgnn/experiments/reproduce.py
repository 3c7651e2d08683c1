"""The engine of ``qgnn reproduce``: from a table's rows to trainings, from their records to the table with our numbers beside the printed ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import quant
from ..data import Dataset, GraphDataset, UnknownDataset, load
from ..recipes import recipe_for
from ..tasks import fold_count
from .store import Cell, Key, Store
from .table import Row, Table
from .workers import Failure, Setup, outcomes


@dataclass
class Plan:
    """A row and what there is to run for it.

    Attributes:
        cells: its trainings, seed by seed, each on every fold.
        folds: splits of its data set.
        missing: why it cannot run: what to download.
        failed: sentences about trainings that failed.
    """

    row: Row
    cells: tuple[Cell, ...] = ()
    folds: int = 1
    missing: str = ""
    failed: list[str] = field(default_factory=list)

    def records(self, finished: Mapping[Key, dict[str, Any]]) -> list[dict[str, Any]]:
        """The records of its trainings that are finished."""
        return [finished[cell.key] for cell in self.cells if cell.key in finished]


def cells(row: Row, dataset: Dataset | GraphDataset, seeds: int) -> tuple[Cell, ...]:
    """The trainings of a row: seeds 0 to ``seeds - 1``, each on every fold of the data set.

    Raises:
        ValueError: there is no such scheme, model or setting.
    """
    scheme = quant.parse(row.scheme or "fp32")
    recipe = recipe_for(row.model, scheme, dataset).changed(settings={k: str(v) for k, v in row.recipe.items()})
    return tuple(
        Cell(dataset.name, row.model, scheme.name, recipe, seed, fold)
        for seed in range(seeds)
        for fold in range(fold_count(dataset))
    )


def plan(table: Table, rows: Iterable[Row], seeds: int, root: Path | None = None) -> list[Plan]:
    """What to run for each row. Each data set is loaded once, and let go: where that fails, its rows are not run and say why.

    Raises:
        ValueError: a row's data set, scheme, model or setting does not exist; the sentence names the row.
    """
    plans = {row.id: Plan(row) for row in rows}
    for name in dict.fromkeys(p.row.dataset for p in plans.values() if p.row.scheme):
        own = [p for p in plans.values() if p.row.dataset == name and p.row.scheme]
        try:
            dataset = load(name, root)
        except UnknownDataset as error:
            raise ValueError(f"table {table.name}, row {own[0].row.id}: {error}") from error
        except (ValueError, OSError) as error:
            for p in own:
                p.missing = str(error)
            continue
        for p in own:
            try:
                p.cells, p.folds = cells(p.row, dataset, seeds), fold_count(dataset)
            except ValueError as error:
                raise ValueError(f"table {table.name}, row {p.row.id}: {error}") from error
    return list(plans.values())


def train(
    plans: list[Plan],
    store: Store,
    jobs: int = 1,
    root: Path | None = None,
    device: str = "cpu",
    progress: Callable[[float, int], None] = lambda done, total: None,
) -> Iterator[dict[Key, dict[str, Any]]]:
    """Runs what is not finished. Yields all records, at first those that were there, and again whenever one is added; sentences about failures go
    to the plans.

    Args:
        jobs: processes; torch's threads are divided among them.
        progress: called with (trainings done, trainings in all); those under way count in part.
    """
    finished = store.finished()
    yield finished
    every = {cell.key: cell for p in plans for cell in p.cells}
    waiting = [cell for key, cell in every.items() if key not in finished]
    before = len(every) - len(waiting)
    jobs = max(1, min(jobs, len(waiting)))
    setup = Setup(store, root, device, max(1, torch.get_num_threads() // jobs))
    for cell, outcome in outcomes(deque(waiting), jobs, setup, lambda done: progress(before + done, len(every))):
        if isinstance(outcome, Failure):
            for p in plans:
                if cell in p.cells:
                    p.failed.append(f"{cell}: {outcome.reason}")
        else:
            store.keep(cell, outcome)
            finished[cell.key] = outcome
        yield finished
