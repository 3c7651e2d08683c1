"""The engine of ``qgnn sweep``: trains what a grid or a search asks for, writes how each training ended, tries again what crashed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence, Set
from contextlib import closing
from pathlib import Path
from typing import Literal, Protocol

import torch

from . import workers
from .grid import Grid, Group
from .parquet import Ledger
from .search import Searcher
from .store import Cell, Key
from .workers import Outcome, Setup

Engine = Literal["local", "ray"]

RETRIED = ("out of memory", "killed", "crashed")
"""What the machine did to a training, and not its settings: it is tried once more, after all others."""


class Plan(Protocol):
    """What there is to train. ``total`` trainings, of which ``settled`` need no more."""

    total: int
    settled: int

    def keys(self) -> Set[Key]:
        """The trainings, by their keys; those of a search that have been proposed. A folder may hold others, from before the file was changed."""

    def start(self, jobs: int) -> list[Cell]:
        """What ``jobs`` processes begin with."""

    def after(self, cell: Cell) -> list[Cell]:
        """What follows when a cell has ended for good."""


class Whole:
    """All trainings of a grid that are not done. Those whose loss diverged are as good as done: it would do so again."""

    def __init__(self, groups: Sequence[Group], ledger: Ledger) -> None:
        every = {cell.key: cell for group in groups for cell in group.cells}
        self._missing = [cell for cell in every.values() if ledger.status(cell) not in ("done", "diverged")]
        self._every = every
        self.total = len(every)
        self.settled = self.total - len(self._missing)

    def keys(self) -> Set[Key]:
        """All of the grid."""
        return self._every.keys()

    def start(self, jobs: int) -> list[Cell]:
        """All at once."""
        return self._missing

    def after(self, cell: Cell) -> list[Cell]:
        """Nothing."""
        self.settled += 1
        return []


def plan(grid: Grid, groups: Sequence[Group], ledger: Ledger) -> Whole | Searcher:
    """What a grid, or the search in it, asks for.

    Raises:
        ValueError: the search has a setting that recipes do not have, or its storage cannot be opened.
    """
    if grid.search is None:
        return Whole(groups, ledger)
    file = (ledger.folder.out / "search.db").absolute()
    return Searcher(grid.search, groups, ledger, grid.search.storage or f"sqlite:///{file}")


def train(
    plan: Plan,
    ledger: Ledger,
    engine: Engine = "local",
    jobs: int = 1,
    root: Path | None = None,
    device: str = "cpu",
    progress: Callable[[float, int], None] = lambda done, total: None,
) -> None:
    """Trains what a plan asks for, and writes how each attempt ended.

    Args:
        jobs: processes; torch's threads are divided among them.
        progress: called with (trainings done, trainings in all); those under way count in part.
    """
    ended, retried = 0, set[Key]()
    waiting = deque(plan.start(jobs))
    # Of the jobs asked for, not of those that are left to do: the order of torch's sums depends on it.
    setup = Setup(ledger.folder, root, device, max(1, torch.get_num_threads() // jobs))

    def show(done: float) -> None:
        progress(plan.settled + done - ended, plan.total)

    show(0)
    with closing(_outcomes(engine)(waiting, jobs, setup, show)) as outcomes:  # whatever ends this, ends the processes
        for cell, outcome in outcomes:
            ended += 1
            ledger.note(cell, outcome)
            if ledger.status(cell) in RETRIED and cell.key not in retried:
                retried.add(cell.key)
                waiting.append(cell)
            else:
                waiting.extend(plan.after(cell))


def _outcomes(
    engine: Engine,
) -> Callable[[deque[Cell], int, Setup, Callable[[float], None]], Generator[tuple[Cell, Outcome]]]:
    if engine == "local":
        return workers.outcomes
    from .cluster import outcomes

    return outcomes
