"""``python -m qgnn.perf``: kernels and training steps against their peers; ``--out FILE`` appends the rows to a CSV file."""

from __future__ import annotations

import argparse
import platform
import sys
from datetime import date
from pathlib import Path

import pandas as pd
import torch

from .. import __version__
from ..data import Dataset, load
from . import inference, kernels, quantizers
from .kernels import Row
from .train_step import train_steps

COLUMNS = (
    "operation",
    "shape",
    "candidate",
    "ms_20",
    "ms_50",
    "ms_80",
    "ratio_20",
    "ratio_50",
    "ratio_80",
    "device",
    "threads",
    "torch",
    "qgnn",
    "date",
)


def device_name(device: str) -> str:
    """The GPU's name, or the processor's model."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def record(row: Row, device: str) -> dict[str, object]:
    """One CSV row; ratios are the first candidate's time over this one's."""
    timing = row.timing
    values = (
        row.operation,
        row.shape,
        row.candidate,
        *timing.ms,
        *timing.ratio,
        device_name(device),
        torch.get_num_threads(),
        torch.__version__,
        __version__,
        date.today(),
    )
    return dict(zip(COLUMNS, values, strict=True))


def main(arguments: list[str] | None = None) -> int:
    """Runs the suites that the command line names, and prints their rows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m qgnn.perf",
        description=__doc__,
        epilog="example: python -m qgnn.perf --suite train-step --dataset Cora",
    )
    parser.add_argument("--suite", choices=("kernels", "quantizers", "inference", "train-step", "all"), default="all")
    parser.add_argument(
        "--graphs", default="powerlaw:169343,2332486", help="synthetic graphs of the aggregation, separated by spaces"
    )
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--dataset", default="digits", help="data set of the training steps")
    parser.add_argument("--model", default="gcn", help="model of the training steps: gcn, gat or gin")
    parser.add_argument("--schemes", default="fp32,dq-int8,a2q")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="CSV file that rows are appended to")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    if options.suite in ("kernels", "all"):
        for graph in options.graphs.split():
            rows += kernels.aggregation(graph, options.features, device, options.rounds)
        for shape in kernels.PRODUCTS:
            rows += kernels.product(*shape, device, options.rounds)
    if options.suite in ("quantizers", "all"):
        for tail in quantizers.TAILS:
            rows += quantizers.order_statistics(*tail, device, options.rounds)
        for groups in quantizers.NEAREST:
            rows += quantizers.nearest(*groups, device, options.rounds)
    if options.suite in ("inference", "all"):
        rows += inference.nearest_share(device, options.rounds)
    if options.suite in ("train-step", "all"):
        dataset = load(options.dataset)
        if not isinstance(dataset, Dataset):
            raise ValueError(f"{dataset.name} has many graphs; --dataset takes one graph, such as Cora")
        for timings in train_steps(
            dataset, options.model, options.schemes.split(","), options.hidden, options.rounds, device
        ).values():
            trained = f"{dataset.name} {options.model}"
            rows += [Row("train-step", trained, name, timing) for name, timing in timings.items()]
    table = pd.DataFrame([record(row, device) for row in rows])
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("ratio: time of the first candidate over this one's, quantiles 20, 50, 80 %")
    print(
        table[["operation", "shape", "candidate", "ms_50", "ratio_20", "ratio_50", "ratio_80"]]
        .round(3)
        .to_string(index=False)
    )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(options.out, mode="a", header=not options.out.exists(), index=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
