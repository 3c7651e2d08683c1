"""Every phase of a simulation as one line of CSV, written as it is made.

=========  =============================================================================================================================
layer      number of the layer
stage      "update", "attention" (the products of a head with one of its two attention vectors) or "aggregation"
column     of W, of the attention vectors (heads times 2), or of B
group      which group of ``pes`` rows, in the order in which the stage takes them
rows       rows in the group; the last may have fewer than ``pes``
cycles     of the phase, constants included; their sums are ``update_cycles`` (attention included) and ``aggregation_cycles``
start      cycle in which the phase begins if the array never waits for the memory; a layer begins where the one before it ends
useful     MAC cycles that do something; sums: ``sum(b) F_in F_out``, ``2 N F_out s`` and ``E C s``
=========  =============================================================================================================================
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .config import Config
from .cycles import ceil_div
from .simulator import aggregated_degrees, charged_bits, update_order
from .workload import Layer, Workload

COLUMNS = ("layer", "stage", "column", "group", "rows", "cycles", "start", "useful")

Integers = npt.NDArray[np.int64]


class _Stage(NamedTuple):
    """The phases of one column; all columns of a stage are alike."""

    name: str
    columns: int
    rows: Integers
    cycles: Integers
    useful: Integers


def write_trace(workload: Workload, config: Config, path: str | Path) -> int:
    """Writes the phases of all layers; no more than one column of one stage is held in memory.

    Returns:
        The number of phases.

    Raises:
        ValueError: ``config.sync`` is not "lockstep", so there are no phases.
        OSError: the file cannot be written.
    """
    if config.sync != "lockstep":
        raise ValueError(
            f'a trace needs sync "lockstep", got "{config.sync}", which has no phases; choose sync=lockstep'
        )
    count = start = 0
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for number, layer in enumerate(workload.layers):
            for stage in _stages(workload, layer, config):
                begins = (np.cumsum(stage.cycles) - stage.cycles).tolist()
                phases = list(
                    zip(stage.rows.tolist(), stage.cycles.tolist(), begins, stage.useful.tolist(), strict=True)
                )
                for column in range(stage.columns):
                    writer.writerows(
                        (number, stage.name, column, group, rows, cycles, start + begin, useful)
                        for group, (rows, cycles, begin, useful) in enumerate(phases)
                    )
                    start += int(stage.cycles.sum())
                count += stage.columns * len(phases)
    return count


def _stages(workload: Workload, layer: Layer, config: Config) -> Iterator[_Stage]:
    """In the order in which the layer runs them."""
    constants = config.fill_cycles + config.requantize_cycles
    searched = config.search_cycles if layer.nns_groups else 0
    bits = charged_bits(layer, workload.num_nodes, config)
    order = update_order(workload, bits, config)
    widths = _Groups(bits if order is None else bits[order], config.pes)
    degrees = aggregated_degrees(workload, config)
    beats = _Groups(-(-degrees // config.macs), config.pes)
    serial = config.agg_serial
    update = _Stage(
        "update",
        layer.f_out,
        widths.rows,
        ceil_div(layer.f_in, config.macs) * widths.longest + constants + searched,
        layer.f_in * widths.sums,
    )
    aggregation = _Stage(
        "aggregation",
        layer.columns,
        beats.rows,
        serial * beats.longest + constants,
        serial * _Groups(degrees, config.pes).sums,
    )
    if layer.kind in ("gin", "sage"):
        yield aggregation
    yield update
    if layer.kind == "gat":
        channels = layer.f_out // layer.heads
        cycles = np.full(widths.rows.size, ceil_div(channels, config.macs) * serial)
        yield _Stage("attention", 2 * layer.heads, widths.rows, cycles, widths.rows * channels * serial)
    if layer.kind in ("gcn", "gat"):
        yield aggregation


class _Groups:
    """Rows, longest row and sum of every ``pes`` consecutive rows."""

    def __init__(self, work: npt.NDArray[np.integer[Any]], pes: int) -> None:
        starts = np.arange(0, work.size, pes)
        self.rows: Integers = np.minimum(work.size - starts, pes)
        self.longest: Integers = np.maximum.reduceat(work, starts).astype(np.int64)
        self.sums: Integers = np.add.reduceat(work, starts, dtype=np.int64)
