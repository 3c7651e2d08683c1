"""``python -m qgnn.perf.interruptions``: a grid of 40 schemes, 3 data sets and 2 seeds, trained by ``qgnn sweep`` undisturbed, killed again and
again, and by Ray. All three have to give the same table, to the bit."""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pandas as pd

from ..experiments import view
from ..experiments.parquet import read

_RANGES = [
    f"-{ste}-{observer}-{ends}"
    for ste, observer, ends in product(("clip", "ste"), ("minmax", "momentum"), ("extremes", "percentile"))
]
SCHEMES = (
    *("fp32", "fp32/saved=int4", "int8", "nqat-int8", "dq-int8"),
    *(f"{method}{suffix}" for method in ("int4", "dq-int4") for suffix in _RANGES),
    *(f"fixed-{bits}" for bits in range(2, 9)),
    *(f"msfp{bits}" for bits in range(12, 17)),
    *("fixed-8/grad=6", "fixed-6/rounding=stochastic", "sdq:8,6,4,4", "sdq:8,4/over=dq", "adq:4,8", "adq:12,16/over=msfp"),
    "fixed-8/weights=4",
)  # fmt: skip
DETERMINED = ["status", "best_epoch", "test_acc", "val_acc", "test_acc_best_over_epochs", "average_bits", "compression", "packed_bytes"]  # fmt: skip
"""Columns that the settings and the seed alone decide; not times, nor a peak of memory."""


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 if a table differs."""
    parser = argparse.ArgumentParser(prog="python -m qgnn.perf.interruptions", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/interruptions"), metavar="DIR", help="empty or new")
    parser.add_argument("--datasets", default="Cora CiteSeer MUTAG")
    parser.add_argument("--model", default="gin")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    if any(chosen.out.iterdir()):
        parser.error(f"--out {chosen.out} is not empty; what is there would not be trained again")
    grid = chosen.out / "grid.toml"
    grid.write_text(
        f"datasets = {chosen.datasets.split()}\nmodels = {[chosen.model]}\nschemes = {list(SCHEMES)}\nseeds = 2\nfolds = 1\n"
        "recipe = { epochs = 2, warmup = 0, hidden = 16 }\n",
        encoding="utf-8",
    )
    started = time.monotonic()
    _sweep(grid, chosen.out / "undisturbed", chosen.jobs)
    seconds = time.monotonic() - started
    print(f"{len(SCHEMES)} schemes, {len(view.runs(chosen.out / 'undisturbed'))} runs in {seconds:.0f} s", flush=True)
    moments = random.Random(chosen.seed)
    for kill in range(chosen.kills):
        left = _sweep(grid, chosen.out / "killed", chosen.jobs, kill_after=moments.uniform(0, seconds / chosen.kills))
        print(f"kill {kill + 1}: {left} runs were done", flush=True)
    _sweep(grid, chosen.out / "killed", chosen.jobs)
    _sweep(grid, chosen.out / "ray", chosen.jobs, "--engine", "ray")
    same = [_compare(chosen.out, name) for name in ("killed", "ray")]
    return 0 if all(same) else 1


def _sweep(grid: Path, out: Path, jobs: int, *more: str, kill_after: float | None = None) -> int:
    """``qgnn sweep``, killed after some seconds, or left to its end; returns the number of results."""
    command = ["sweep", str(grid), "--out", str(out), "--jobs", str(jobs), "--resume", *more]
    process = subprocess.Popen(
        [sys.executable, "-c", "from qgnn.cli import main; main()", *command], stdout=subprocess.DEVNULL
    )
    try:
        process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return read(out).num_rows


def _compare(out: Path, name: str) -> bool:
    """Whether two folders hold the same runs with the same results; says which differ."""
    ours, theirs = view.runs(out / "undisturbed"), view.runs(out / name)
    differ = pd.concat([f[[*view.RUN, *DETERMINED]] for f in (ours, theirs)]).drop_duplicates(keep=False)
    tables = view.markdown(view.means(ours)) == view.markdown(view.means(theirs))
    repeated = int((theirs["attempt"] > 1).sum())
    print(
        f"{name}: {len(theirs)} runs, {len(differ)} rows differ, tables {'agree' if tables else 'differ'}, {repeated} tried twice"
    )
    if len(differ):
        print(differ[["dataset", "scheme", "seed", "status", "test_acc"]].head(20).to_string())
    return tables and not len(differ)


if __name__ == "__main__":
    sys.exit(main())
