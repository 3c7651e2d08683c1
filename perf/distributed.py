"""``torchrun --nproc-per-node P -m qgnn.perf.distributed``: training in P parts, by width of the halo: accuracy over seeds, and bytes on the wire.

Without torchrun, the same runs by one process. ``--out`` adds a JSON record a run; ``--table FILE...`` prints what such files hold.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import results
from ..data import load
from ..distributed import joined, processes, train
from ..distributed.wire import WIDTHS
from ..quant import parse
from ..recipes import recipe_for
from ..train import train as train_alone

CODES = ("sent_forward_codes_bytes", "sent_backward_codes_bytes")
STEPS = ("sent_forward_steps_bytes", "sent_backward_steps_bytes")


def main(arguments: list[str] | None = None) -> int:
    """Trains, and prints a line for each run and one for each width."""
    parser = argparse.ArgumentParser(prog="python -m qgnn.perf.distributed", description=__doc__)
    parser.add_argument("--dataset", default="Cora")
    parser.add_argument("--model", default="gcn")
    parser.add_argument("--scheme", default="fp32")
    parser.add_argument("--halo", nargs="+", default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE")
    chosen = parser.parse_args(arguments)
    if chosen.table:
        print(table([record for path in chosen.table for record in results.read(path)]))
        return 0
    dataset, scheme = load(chosen.dataset), parse(chosen.scheme)
    recipe = recipe_for(chosen.model, scheme, dataset).changed(chosen.epochs)
    settings = (dataset, chosen.model, scheme.name)
    records: list[dict[str, Any]] = []

    def done(record: dict[str, Any]) -> None:
        records.append(record)
        if chosen.out is not None:
            results.append(chosen.out, record)

    if processes() == 1:
        for seed in range(chosen.seeds):
            done({"processes": 1, "halo": "", **train_alone(*settings, seed, recipe=recipe).record})
    else:
        with joined():
            for width in chosen.halo:
                for seed in range(chosen.seeds):
                    run = train(*settings, seed, recipe=recipe, parallel="partition", halo=width)
                    if run is not None:
                        done(run.record)
    if os.environ.get("RANK", "0") == "0":
        print(table(records))
    return 0


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over seeds of accuracy, and bytes of all processes in one run, codes beside those of FP32 rows."""
    lines = [
        "| data | processes | halo | seeds | test accuracy, % | codes, MB | of FP32 | steps, MB | both, of FP32 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["dataset"], record["processes"], record["halo"]), []).append(record)

    def sent(rows: Iterable[dict[str, Any]], names: Sequence[str]) -> float:
        return statistics.fmean(sum(row.get(name, 0) for name in names) for row in rows)

    for (data, size, halo), rows in groups.items():
        accuracy = [row["test_acc"] for row in rows]
        spread = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
        cells = [data, size, halo, len(rows), f"{statistics.fmean(accuracy):.2f} ± {spread:.2f}"]
        floats = groups.get((data, size, "fp32"))
        codes, steps = sent(rows, CODES), sent(rows, STEPS)
        whole = sent(floats, CODES) if floats else 0.0
        share = [f"{part / whole:.4f}" if whole else "" for part in (codes, codes + steps)]
        cells += [f"{codes / 1e6:.3f}", share[0], f"{steps / 1e6:.3f}", share[1]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
