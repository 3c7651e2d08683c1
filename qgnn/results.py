"""Results of runs: one JSON object a line, appended so that a crash costs at most the line it interrupts.

Fields of a training run:

==========================  ======================================================================================================
field                       meaning
==========================  ======================================================================================================
dataset, model, scheme      what was trained
seed                        the run's seed
fold                        the split; 0 where there is one (records of version 0.1.0 have none of fold, task and metric)
task                        "node", "node-multilabel", "link", "graph", "graph-multilabel" or "graph-regression"
metric                      "accuracy", "f1", "ap" or "hits@50", in percent, or "mae", in units of the target
best_epoch                  of the second phase: that of the best validation metric within the recipe's bits_limit, else of the fewest bits
val_acc, test_acc           the metric at that epoch, whatever it is
test_acc_best_over_epochs   the best test metric of an epoch of that phase within the limit: the papers' protocol, which looks at the test set
average_bits                mean over the quantized layers of the mean width over nodes
average_bits_dim            the same, each feature map weighted by its dimension
average_bits_all            every feature map counted, the unquantized ones as well
widths                      the scheme's width in the second phase, one after the other, as [width, epochs] pairs; null where widths are learned or
                            nothing is quantized
compression                 bits of the feature maps at FP32 over their bits as quantized
compression_with_steps      the same, the 32-bit steps counted too
packed_bytes, fp32_bytes    bytes of the feature maps, as quantized and at FP32
train_step_ms               time of a training step
peak_memory_bytes           on a CPU what a training step keeps for backward, parameters not counted; on a GPU the allocator's peak
integer_test_acc            test metric of the frozen integer model; null for schemes without integers, as the next three
integer_mismatches          nodes or graphs that it predicts otherwise than the fake-quantized model
integer_ties                codes of its feature maps that differ because float rounding decided a tie
integer_max_relative        largest difference of a logit over the largest logit
recipe                      settings of the run (:class:`qgnn.recipes.Recipe`)
processes, parallel, halo   of several processes (docs/scaling.md): their number, what they share, and the width of the rows they exchange
partition, halo_nodes       of a graph in parts: how it was parted, and rows of other parts that all parts read together
sent_*_bytes                what all processes sent in the run: codes and steps, forward and backward
==========================  ======================================================================================================
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

log = logging.getLogger(__name__)

KEYS = ("dataset", "model", "scheme")
MEASURES = (
    "test_acc",
    "val_acc",
    "test_acc_best_over_epochs",
    "average_bits",
    "average_bits_dim",
    "average_bits_all",
    "compression",
    "compression_with_steps",
    "integer_test_acc",
    "integer_mismatches",
    "integer_ties",
    "integer_max_relative",
    "packed_bytes",
    "fp32_bytes",
    "train_step_ms",
    "peak_memory_bytes",
)
"""The fields that :func:`summary` averages."""


def dumps(record: Mapping[str, Any]) -> str:
    """The record as one line of JSON. NaN and infinity, which JSON does not have, become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False)


def append(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Adds a record as one line, written in one piece and synchronised to the disk. Missing folders are made.

    Raises:
        OSError: the file cannot be written, or the disk is full.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    line = f"{dumps(record)}\n".encode()
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":  # an earlier line was cut off: keep it apart
            line = b"\n" + line
        if os.write(file, line) != len(line):
            raise OSError(f"{path}: the record was written in part only; is the disk full?")
        os.fsync(file)
    finally:
        os.close(file)


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records of a file, in order; none if there is no file. A line that is no record, such as one cut off by a crash, is left out
    with a warning in the log."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            log.warning("%s, line %d is not a complete record; it is left out", path, number)
    return records


def summary(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One row for each (dataset, model, scheme), in the order of their first records: ``metric``; the numbers of ``seeds`` and of ``runs``, which are
    more where there are folds; and for each of :data:`MEASURES` the mean over the runs and, as ``NAME_sd``, the sample standard deviation (NaN
    for one run)."""
    columns = [*KEYS, "seed", "metric", *MEASURES]
    frame = pd.DataFrame([{k: r.get(k) for k in columns} for r in records], columns=columns)
    frame = frame.astype(dict.fromkeys(MEASURES, "float64"))
    frame["metric"] = frame["metric"].fillna("accuracy")
    groups = frame.groupby(list(KEYS), sort=False)
    measures = groups[list(MEASURES)]
    table = measures.mean().join(measures.std().add_suffix("_sd"))
    table.insert(0, "metric", groups["metric"].first())
    table.insert(1, "seeds", groups["seed"].nunique())
    table.insert(2, "runs", groups["seed"].size())
    return table.reset_index()
