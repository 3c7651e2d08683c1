"""A folder of runs: results.jsonl has a record for each finished one, checkpoints/ the unfinished ones, models/ what was frozen, traces/ what
``qgnn report`` plots."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from .. import results, train
from ..data import Dataset, GraphDataset
from ..recipes import Recipe
from ..serialize import save
from ..trace import collect_trace, write_trace

Key = tuple[str, str, str, str, int, int]

DEFAULTS = {f.name: f.default for f in fields(Recipe) if f.default is not MISSING}
"""Settings that recipes did not always have."""


class Pruned(Exception):
    """A search has ended a training that promises less than others; the sentence says where it stood."""


class Trial(Protocol):
    """What a search has to do with a training: the number of its trial, and what looks on."""

    @property
    def number(self) -> int:
        """Of the trial, from 0."""

    def watch(self, curve: Sequence[Mapping[str, Any]]) -> None:
        """Called after every epoch with the curve so far (:attr:`qgnn.train.Run.curve`).

        Raises:
            Pruned: the training is to end.
        """


@dataclass(frozen=True)
class Cell:
    """One training, with all that its record depends on. No table is part of it, so tables share their runs. Nor is ``trial``, what a search has to
    do with it."""

    dataset: str
    model: str
    scheme: str
    recipe: Recipe
    seed: int
    fold: int = 0
    trial: Trial | None = None

    @property
    def key(self) -> Key:
        """By which a record is found again."""
        return key_of(vars(self), asdict(self.recipe))

    @property
    def stem(self) -> str:
        """Name of its files."""
        *names, seed, fold = self.key
        return re.sub(r"[^\w.-]+", "-", "_".join(map(str, names))) + f"_seed{seed}" + (f"_fold{fold}" if fold else "")

    def __str__(self) -> str:
        fold = f", fold {self.fold}" if self.fold else ""
        return f"{self.dataset} {self.model} {self.scheme}, seed {self.seed}{fold}"


def key_of(values: Mapping[str, Any], recipe: Mapping[str, Any]) -> Key:
    """The key of a cell or of a record, and its recipe. Settings that are None, or that recipes did not have yet, count as their defaults."""
    recipe = {**DEFAULTS, **{name: value for name, value in recipe.items() if value is not None}}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    return values["dataset"], values["model"], values["scheme"], digest, values["seed"], values.get("fold", 0)


class Folder:
    """The folder ``out`` of runs, made where it is missing.

    Args:
        parts: folders in it that are made, too.

    Raises:
        ValueError: it cannot be made.
    """

    def __init__(self, out: Path, *parts: str) -> None:
        self.out, self.checkpoints = out, out / "checkpoints"
        try:
            for folder in (self.checkpoints, *(out / part for part in parts)):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out {out}: the folder cannot be made ({error.strerror})") from error

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps a second command out of the folder, where it would repeat the same runs."""
        with (self.out / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another qgnn train, reproduce or sweep is running in {self.out}; wait for it or choose another --out"
                ) from None
            yield

    def checkpoint(self, cell: Cell) -> Path:
        """Where a run is resumed from."""
        return self.checkpoints / f"{cell.stem}.pt"

    def save(self, cell: Cell, done: train.Run) -> None:
        """Called in the process that trained, before the record leaves it."""

    def clear(self, cell: Cell) -> None:
        """Removes a cell's checkpoint, when its record is written."""
        for path in self.checkpoints.glob(f"{glob.escape(cell.stem)}.pt*"):
            path.unlink(missing_ok=True)


class Store(Folder):
    """A folder with the records of its runs, their traces and integer models."""

    def __init__(self, out: Path) -> None:
        super().__init__(out, "models", "traces")
        self.results, self.models, self.traces = out / "results.jsonl", out / "models", out / "traces"

    def finished(self) -> dict[Key, dict[str, Any]]:
        """The records of finished runs."""
        found = {}
        for record in results.read(self.results):
            if record.keys() >= {"dataset", "model", "scheme", "seed", "recipe"}:
                found[key_of(record, record["recipe"])] = record
        return found

    def save(self, cell: Cell, done: train.Run) -> None:
        """Saves trace and integer model; :meth:`keep` has to follow."""
        write_trace(self.traces / f"{cell.stem}.json", collect_trace(done))
        if done.frozen is not None:
            save(done.frozen, self.models / f"{cell.stem}.safetensors")

    def keep(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """Writes the record of a finished run; then its checkpoint goes, and what an earlier crash left half-written."""
        results.append(self.results, record)
        self.clear(cell)
        for path in chain(*(folder.glob(f"{glob.escape(cell.stem)}.*.tmp") for folder in (self.models, self.traces))):
            path.unlink(missing_ok=True)


def run(
    cell: Cell,
    dataset: Dataset | GraphDataset,
    store: Folder | None,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> train.Run:
    """Trains a cell on its data, from the checkpoint if there is one, and saves the rest (:meth:`Store.save`); writing the record is left to the
    caller.

    Args:
        store: None trains without a trace.
        progress: called with (epochs done, epochs in all).

    Raises:
        Pruned: the search that the cell belongs to ended it.
    """
    done = train.train(
        dataset,
        cell.model,
        cell.scheme,
        cell.seed,
        fold=cell.fold,
        recipe=cell.recipe,
        device=device,
        checkpoint=None if store is None else store.checkpoint(cell),
        progress=progress,
        watch=None if cell.trial is None else cell.trial.watch,
    )
    if store is not None:
        store.save(cell, done)
    return done
