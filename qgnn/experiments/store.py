"""A folder of runs: results.jsonl has a record for each finished one, checkpoints/ the unfinished ones, models/ what was frozen, traces/ what
``qgnn report`` plots."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

from .. import results, train
from ..data import Dataset, GraphDataset
from ..recipes import Recipe
from ..serialize import save
from ..trace import collect_trace, write_trace

Key = tuple[str, str, str, str, int, int]

_DEFAULTS = {f.name: f.default for f in fields(Recipe) if f.default is not MISSING}


@dataclass(frozen=True)
class Cell:
    """One training, with all that its record depends on. No table is part of it, so tables share their runs."""

    dataset: str
    model: str
    scheme: str
    recipe: Recipe
    seed: int
    fold: int = 0

    @property
    def key(self) -> Key:
        """By which a record is found again."""
        return _key(vars(self), asdict(self.recipe))

    @property
    def stem(self) -> str:
        """Name of its files."""
        *names, seed, fold = self.key
        return re.sub(r"[^\w.-]+", "-", "_".join(map(str, names))) + f"_seed{seed}" + (f"_fold{fold}" if fold else "")

    def __str__(self) -> str:
        fold = f", fold {self.fold}" if self.fold else ""
        return f"{self.dataset} {self.model} {self.scheme}, seed {self.seed}{fold}"


def _key(values: Mapping[str, Any], recipe: Mapping[str, Any]) -> Key:
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    return values["dataset"], values["model"], values["scheme"], digest, values["seed"], values.get("fold", 0)


class Store:
    """The folder ``out``, made where it is missing.

    Raises:
        ValueError: it cannot be made.
    """

    def __init__(self, out: Path) -> None:
        self.results = out / "results.jsonl"
        self.out, self.checkpoints, self.models, self.traces = out, out / "checkpoints", out / "models", out / "traces"
        try:
            for folder in (self.checkpoints, self.models, self.traces):
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
                    f"another qgnn train or reproduce is running in {self.out}; wait for it or choose another --out"
                ) from None
            yield

    def finished(self) -> dict[Key, dict[str, Any]]:
        """The records of finished runs. Settings that recipes did not have yet when one was written count as their defaults."""
        found = {}
        for record in results.read(self.results):
            if record.keys() >= {"dataset", "model", "scheme", "seed", "recipe"}:
                found[_key(record, {**_DEFAULTS, **record["recipe"]})] = record
        return found

    def checkpoint(self, cell: Cell) -> Path:
        """Where a run is resumed from."""
        return self.checkpoints / f"{cell.stem}.pt"

    def keep(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """Writes the record of a finished run; then its checkpoint goes, and what an earlier crash left half-written."""
        results.append(self.results, record)
        name = glob.escape(cell.stem)
        leftovers = [folder.glob(f"{name}.*.tmp") for folder in (self.models, self.traces)]
        for path in (*self.checkpoints.glob(f"{name}.pt*"), *chain(*leftovers)):
            path.unlink(missing_ok=True)


def run(
    cell: Cell,
    dataset: Dataset | GraphDataset,
    store: Store | None,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> train.Run:
    """Trains a cell on its data, from the checkpoint if there is one, and saves trace and integer model; :meth:`Store.keep` has to follow.

    Args:
        store: None trains without a trace.
        progress: called with (epochs done, epochs in all).
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
    )
    if store is not None:
        write_trace(store.traces / f"{cell.stem}.json", collect_trace(done))
        if done.frozen is not None:
            save(done.frozen, store.models / f"{cell.stem}.safetensors")
    return done
