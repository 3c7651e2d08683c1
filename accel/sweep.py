"""Sweeps: a workload under every combination of the values of some keys of the configuration."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from .config import Config, load_config
from .report import flat
from .simulator import Result, simulate
from .workload import Workload, baseline

Row = dict[str, Any]

_OF_A_LAYER = ("name", "kind", "f_in", "f_out")


def configurations(base: Config, axes: Mapping[str, Sequence[Any]]) -> list[Config]:
    """``base`` with every combination of the values in ``axes``, the last key changing fastest.

    Raises:
        ValueError: a key has no values, is unknown, or has a value that its key does not take.
    """
    if empty := [key for key, values in axes.items() if not len(values)]:
        raise ValueError(f"the sweep over {empty[0]} has no values; give it at least one")
    return [
        load_config(**(base.to_dict() | dict(zip(axes, values, strict=True)))) for values in product(*axes.values())
    ]


def sweep(
    workload: Workload,
    base: Config,
    axes: Mapping[str, Sequence[Any]],
    baselines: Sequence[int] = (4, 8),
    progress: Callable[[int, int], None] | None = None,
    jobs: int | None = None,
) -> Iterator[Row]:
    """Simulates ``workload`` under each of :func:`configurations`; yields a row for each, in their order, when it is there.

    A row holds the swept keys; the workload's name; the fields of ``Result.total``, nested names joined by "_"; ``seconds``; ``energy_pj``, of all
    parts; for each baseline of b bits ``intb_total_cycles``, and its cycles and energy over those of the workload on the same array, ``intb_speedup``
    and ``intb_energy_ratio``; and the configuration's other keys.

    Args:
        axes: values of keys of the configuration, as :func:`~qgnn.accel.load_config` takes them.
        baselines: widths of the uniform baselines, bits.
        progress: called with the rows finished and their number.
        jobs: threads; they share the graph. Else one for each processor.

    Raises:
        ValueError: a key or a value is not one of the configuration's; before anything is simulated.
    """
    configs = configurations(base, axes)
    uniform = {f"int{bits}": baseline(workload, bits) for bits in baselines}
    return _rows(workload, uniform, configs, list(axes), progress, jobs or _processors())


def _rows(
    workload: Workload,
    uniform: Mapping[str, Workload],
    configs: Sequence[Config],
    keys: Sequence[str],
    progress: Callable[[int, int], None] | None,
    jobs: int,
) -> Iterator[Row]:
    def row(config: Config) -> Row:
        chosen = config.to_dict()
        measured = _measures(simulate(workload, config), {n: simulate(w, config) for n, w in uniform.items()})
        return {key: chosen[key] for key in keys} | {"workload": workload.name} | measured | chosen

    pool = ThreadPoolExecutor(jobs)
    try:
        for done, finished in enumerate(pool.map(row, configs), 1):
            if progress is not None:
                progress(done, len(configs))
            yield finished
    finally:
        pool.shutdown(cancel_futures=True)  # where the caller stops, no further one begins


def _measures(result: Result, uniform: Mapping[str, Result]) -> Row:
    total, energy = result.total, result.joules * 1e12
    measures = {key: value for key, value in flat(asdict(total)).items() if key not in _OF_A_LAYER}
    measures |= {"seconds": result.seconds, "energy_pj": energy}
    for name, other in uniform.items():
        measures[f"{name}_total_cycles"] = other.total.total_cycles
        measures[f"{name}_speedup"] = _ratio(other.total.total_cycles, total.total_cycles)
        measures[f"{name}_energy_ratio"] = _ratio(other.joules * 1e12, energy)
    return measures


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else float("nan")


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def save(rows: Iterable[Row], path: str | os.PathLike[str]) -> Iterator[Row]:
    """Writes each row to a CSV file as soon as it is there, and passes it on. The file is replaced; missing folders are made.

    Raises:
        OSError: the file cannot be written.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        for number, row in enumerate(rows):
            if number == 0:
                writer.writerow(row)
            writer.writerow(row.values())
            file.flush()
            yield row
