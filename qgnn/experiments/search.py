"""Search for hyper-parameters: the table ``[search]`` of a grid (:mod:`.grid`).

Every data set, model and scheme of the grid gets a study of ``trials`` trials. Each has a value for everything under ``[search.space]``, and trains
with it on every seed and fold of the grid; what counts is the mean of ``val_acc``. Values are proposed by Optuna's tree-structured Parzen estimator,
and successive halving ends trials early, asynchronously (ASHA, Li et al. 2020, as Degree-Quant used it): when the first training of one has done
``first`` epochs of the second phase, and whenever it has done ``reduction`` times as many, its best validation metric so far has to be among
the best ``1 / reduction`` of those that came as far::

    [search]
    trials = 40
    first = 10           # epochs before the first decision
    reduction = 4        # the default
    seed = 0             # of the proposals, the default
    storage = "postgresql://..."   # any Optuna storage; by default search.db, an SQLite file in the folder of the results

    [search.space]
    lr = { low = 1e-4, high = 0.1, log = true }
    layers = { low = 2, high = 4 }
    hidden = [16, 32, 64]

The proposal of a trial depends on ``seed`` and on the trials before it alone: with one process, a search that is killed and resumed makes the same
trials as an undisturbed one.
"""

from __future__ import annotations

import hashlib
import json
import random
import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from ..recipes import Recipe
from .store import Cell, Key, Pruned

if TYPE_CHECKING:
    import optuna

    from .grid import Group
    from .parquet import Ledger


Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Interval:
    """Numbers from ``low`` to ``high``: whole ones where both are, evenly spread over their logarithms with ``log``."""

    low: float
    high: float
    log: bool = False

    def suggest(self, trial: optuna.Trial, name: str) -> float:
        """The trial's value."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Choice:
    """One of some numbers or names."""

    values: tuple[int | float | str, ...]

    def suggest(self, trial: optuna.Trial, name: str) -> object:
        """The trial's value."""
        return trial.suggest_categorical(name, self.values)


@dataclass(frozen=True)
class Search:
    """What is searched for, and how; the module says what the fields mean."""

    trials: int
    first: int
    space: Mapping[str, Interval | Choice]
    reduction: int = 4
    seed: int = 0
    storage: str = ""

    @staticmethod
    def parse(where: str, table: Any) -> Search:
        """The search of a TOML table.

        Raises:
            ValueError: it is none; the sentence names the field.
        """
        known = [f.name for f in fields(Search)]
        if not isinstance(table, dict) or set(table) - set(known):
            raise ValueError(f"{where}: [search] is a table with {', '.join(known)}")
        for name, least in (("trials", 1), ("first", 1), ("reduction", 2), ("seed", 0)):
            value = table.get(name, least if name in ("reduction", "seed") else None)
            if type(value) is not int or value < least:
                raise ValueError(f"{where}: [search] needs {name}, a number from {least}")
        space = table.get("space")
        if not isinstance(table.get("storage", ""), str) or not isinstance(space, dict) or not space:
            raise ValueError(f"{where}: [search] needs [search.space], and its storage is a URL")
        return Search(**{**table, "space": {name: _values(where, name, entry) for name, entry in space.items()}})

    def rungs(self, epochs: int) -> Iterator[int]:
        """The epochs after which trials are compared: ``first``, and ``reduction`` times as many again and again, before the last one."""
        rung = self.first
        while rung < epochs:
            yield rung
            rung *= self.reduction

    def open(self, url: str, name: str, better: Direction) -> optuna.Study:
        """A study, made where there is none. What Optuna says along the way goes nowhere.

        Raises:
            ValueError: the storage cannot be opened.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.SuccessiveHalvingPruner(self.first, self.reduction)
        try:
            return optuna.create_study(
                storage=url, study_name=name, direction=better, pruner=pruner, load_if_exists=True
            )
        except Exception as error:  # whatever the database behind the URL raises
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"the storage of the search cannot be opened ({type(error).__name__}: {reason})"
            ) from error


def _values(where: str, name: str, entry: Any) -> Interval | Choice:
    if isinstance(entry, list) and entry and all(isinstance(v, int | float | str) for v in entry):
        return Choice(tuple(entry))
    if isinstance(entry, dict) and {"low", "high"} <= set(entry) <= {"low", "high", "log"}:
        low, high, log = entry["low"], entry["high"], entry.get("log", False)
        numbers = all(isinstance(v, int | float) for v in (low, high)) and isinstance(log, bool)
        if numbers and low < high and (low > 0 or not log):
            return Interval(low, high, log)
    raise ValueError(f"{where}: {name} under [search.space] is a list, or {{ low = 1e-4, high = 0.1, log = true }}")


@dataclass(frozen=True)
class SearchTrial:
    """Where a trial stands in Optuna's storage, for the process that trains it.

    Attributes:
        rungs: epochs of the second phase after which it is compared; none for the trainings after a trial's first.
    """

    number: int
    search: Search
    storage: str
    study: str
    better: Direction
    rungs: tuple[int, ...]

    def watch(self, curve: Sequence[Mapping[str, Any]]) -> None:
        """Reports the best validation metric of the second phase, at a rung; raises :class:`Pruned` where it is not good enough."""
        own = [row["val"] for row in curve if row["phase"] == "quantized"]
        if len(own) not in self.rungs:
            return
        trial = _trial(self.search.open(self.storage, self.study, self.better), self.number)
        best = max(own) if self.better == "maximize" else min(own)
        trial.report(best, len(own))
        if trial.should_prune():
            raise Pruned(f"after {len(own)} epochs, with a validation metric of {best:.6g}, others were better")


def _trial(study: optuna.Study, number: int) -> optuna.Trial:
    """A trial that has been asked for, perhaps by another process."""
    import optuna

    return optuna.Trial(
        study, study.get_trials(deepcopy=False)[number]._trial_id
    )  # it has no other name for its storage


@dataclass
class _Study:
    """A combination of the grid, and its study."""

    cells: list[Cell]
    study: optuna.Study
    better: Direction
    left: deque[int]  # trials that an earlier command did not end

    @property
    def made(self) -> int:
        return len(self.study.get_trials(deepcopy=False))


class Searcher:
    """The trainings of a search, one after the other as trials end.

    Args:
        groups: the combinations of the grid.
        storage: URL of Optuna's storage.

    Attributes:
        total: trainings at most; those that a pruned trial saves count.
        settled: trainings of the trials that have ended.

    Raises:
        ValueError: the space has a setting that recipes do not have, or the storage cannot be opened.
    """

    def __init__(self, search: Search, groups: Sequence[Group], ledger: Ledger, storage: str) -> None:
        self._search, self._ledger, self._storage = search, ledger, storage
        self._studies: dict[str, _Study] = {}
        # By study and settings, which several trials may have: their numbers, trainings, and those of these under way.
        self._under_way: dict[tuple[str, Recipe], tuple[list[int], list[Cell], set[Key]]] = {}
        self._given_up: set[Key] = set()
        for group in groups:
            self._check(group.cells[0])
            better: Direction = "maximize" if group.larger else "minimize"
            study = search.open(storage, self._name(group.cells), better)
            running = [t.number for t in study.get_trials(deepcopy=False) if not t.state.is_finished()]
            self._studies[study.study_name] = _Study(group.cells, study, better, deque(running))
        self.total = sum(search.trials * len(s.cells) for s in self._studies.values())
        self.settled = sum((s.made - len(s.left)) * len(s.cells) for s in self._studies.values())

    def start(self, jobs: int) -> list[Cell]:
        """The first trainings, for as many processes."""
        return [cell for _ in range(jobs) for cell in self._next()]

    def after(self, cell: Cell) -> list[Cell]:
        """What can be trained now that a cell has ended."""
        assert isinstance(cell.trial, SearchTrial)
        place = cell.trial.study, cell.recipe
        numbers, cells, missing = self._under_way[place]
        self._given_up.add(cell.key)
        missing.discard(cell.key)
        if missing:
            return []
        if more := self._missing(cells):
            missing.update(c.key for c in more)
            return more
        del self._under_way[place]
        for number in numbers:
            self._end(self._studies[place[0]], number, cells)
        return [following for _ in numbers for following in self._next()]

    def keys(self) -> set[Key]:
        """Of all trials that have been proposed."""
        return {
            replace(cell, recipe=cell.recipe.changed(settings={name: str(v) for name, v in trial.params.items()})).key
            for study in self._studies.values()
            for trial in study.study.get_trials(deepcopy=False)
            for cell in study.cells
        }

    def best(self) -> Iterator[str]:
        """A sentence for every study that has a best trial."""
        for study in (s.study for s in self._studies.values()):
            states = [t.state.name for t in study.get_trials(deepcopy=False)]
            if "COMPLETE" in states:
                settings = ", ".join(f"{name} = {value}" for name, value in study.best_params.items())
                pruned = f"{states.count('PRUNED')} of {len(states)} trials were pruned"
                what = " ".join(study.study_name.split()[:3])
                yield f"{what}: best validation metric {study.best_value:.6g} with {settings}; {pruned}"

    def _check(self, cell: Cell) -> None:
        for name, values in self._search.space.items():
            for value in values.values if isinstance(values, Choice) else (values.low, values.high):
                cell.recipe.changed(settings={name: str(value)})

    def _name(self, cells: list[Cell]) -> str:
        """Of the study of a combination. It is another one where trials would mean something else; there may be more of them."""
        cell, search = cells[0], asdict(replace(self._search, trials=0, storage=""))
        meaning = {**search, "recipe": asdict(cell.recipe), "runs": [(c.seed, c.fold) for c in cells]}
        digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:12]
        return f"{cell.dataset} {cell.model} {cell.scheme} {digest}"

    def _next(self) -> list[Cell]:
        """What to train of the next trial, first of those that an earlier command left. Ends trials of which nothing is missing. A trial with the
        settings of one under way waits for that, and its process with it."""
        for study in self._studies.values():
            while study.left or study.made < self._search.trials:
                number = study.left.popleft() if study.left else study.study.ask().number
                cells = self._cells(study, number)
                place = study.study.study_name, cells[0].recipe
                if place in self._under_way:
                    self._under_way[place][0].append(number)
                    return []
                if missing := self._missing(cells):
                    self._under_way[place] = [number], cells, {c.key for c in missing}
                    return missing
                self._end(study, number, cells)
        return []

    def _cells(self, study: _Study, number: int) -> list[Cell]:
        from optuna.samplers import TPESampler

        trial, settings = _trial(study.study, number), {}
        for name, values in self._search.space.items():
            # Each value has a generator of its own, so that a trial which was cut off after some of them goes on with the same ones.
            seed = random.Random(f"{self._search.seed} {number} {name}").getrandbits(32)
            study.study.sampler = TPESampler(seed=seed)
            settings[name] = str(values.suggest(trial, name))
        recipe = study.cells[0].recipe.changed(settings=settings)
        rungs = tuple(self._search.rungs(recipe.epochs))
        first = SearchTrial(number, self._search, self._storage, study.study.study_name, study.better, rungs)
        trials = first, *[replace(first, rungs=())] * (len(study.cells) - 1)
        return [replace(c, recipe=recipe, trial=t) for c, t in zip(study.cells, trials, strict=True)]

    def _missing(self, cells: list[Cell]) -> list[Cell]:
        """What is to be trained of a trial: at first the training that decides, and if that is done, the others."""
        if not self._over(cells[0]):
            return cells[:1]
        return [c for c in cells if not self._over(c)] if self._ledger.status(cells[0]) == "done" else []

    def _over(self, cell: Cell) -> bool:
        return cell.key in self._given_up or self._ledger.status(cell) in ("done", "diverged", "pruned")

    def _end(self, study: _Study, number: int, cells: list[Cell]) -> None:
        from optuna.trial import TrialState

        self.settled += len(cells)
        if all(self._ledger.status(c) == "done" for c in cells):
            study.study.tell(number, statistics.mean(self._ledger.rows[c.key]["val_acc"] for c in cells))
        else:
            pruned = self._ledger.status(cells[0]) == "pruned"
            study.study.tell(number, state=TrialState.PRUNED if pruned else TrialState.FAIL)
