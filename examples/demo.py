"""Trains a GCN on scikit-learn's digits with four schemes, freezes each to integers, and runs these beside PyG's FP32.

`make demo`, or `python examples/demo.py`: half a minute, nothing is downloaded. Prints one table, and draws how the widths that
A2Q learned depend on in-degree (out/demo_bits.png).
"""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import matplotlib
import numba
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from qgnn.data import load
from qgnn.perf.timing import paired
from qgnn.perf.train_step import PyGModel, pyg_layers
from qgnn.quant import FeatureMap, feature_maps
from qgnn.recipes import Recipe
from qgnn.train import Run, train

SCHEMES = ("fp32", "dq-int8", "dq-int4", "a2q")
PICTURE = Path("out/demo_bits.png")


def row(run: Run, pyg: torch.nn.Module) -> list[str]:
    """One line of the table: the integer model of a run beside PyG's FP32."""
    frozen = run.frozen
    assert frozen is not None and frozen.report is not None
    with torch.inference_mode():
        times = paired({"pyg": lambda: pyg(run.data.x, run.data.edge_index), "ours": frozen}, rounds=50)
    ours, theirs = times["ours"].ms[1], times["pyg"].ms[1]
    report = frozen.report
    return [
        run.record["scheme"],
        f"{run.record['test_acc']:.1f}",
        f"{run.record['average_bits']:.2f}",
        f"{run.record['compression']:.1f}",
        f"{report.packed_bytes:,} | {report.fp32_bytes:,}",
        f"{ours:.2f} | {theirs:.2f}",
        f"{report.max_difference:.1e}",
        f"{report.mismatched_predictions}",
    ]


def draw(maps: list[FeatureMap], degree: np.ndarray, path: Path) -> None:
    """Mean and spread of the learned widths in bins of in-degree that hold about as many nodes each."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    edges = np.unique(np.quantile(degree, np.linspace(0, 1, 9)).astype(int))
    edges[-1] += 1
    place = np.digitize(degree, edges) - 1
    bins = range(len(edges) - 1)
    labels = [f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in pairwise(edges)]
    figure, (top, bottom) = pyplot.subplots(2, sharex=True, height_ratios=[3, 1], figsize=(7, 5), layout="constrained")
    for i, learned in enumerate(maps):
        bits = learned.bits.float().numpy()
        groups = [bits[place == b] for b in bins]
        shift = 0.12 * (i - (len(maps) - 1) / 2)
        means, spread = [g.mean() for g in groups], [g.std() for g in groups]
        top.errorbar(
            np.arange(len(groups)) + shift,
            means,
            spread,
            fmt="o-",
            capsize=3,
            label=f"{learned.name}, {learned.dim} wide",
        )
    top.set(
        ylabel="learned width, bits (mean ± sd)", title="A²Q on digits: learned width against in-degree", ylim=(0, None)
    )
    top.legend()
    counts = bottom.bar(labels, [int((place == b).sum()) for b in bins], color="0.7")
    bottom.bar_label(counts)
    bottom.set(xlabel="in-degree", ylabel="nodes")
    bottom.margins(y=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Trains, freezes, measures, prints and draws."""
    began = time.perf_counter()
    # On a graph this small, threads cost more than they give, most of all where other processes want the processors too.
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    console = Console()
    dataset = load("digits")
    runs = {}
    with Progress(console=Console(stderr=True), transient=True, disable=not console.is_terminal) as bar:
        for scheme in SCHEMES:
            task = bar.add_task(scheme)
            runs[scheme] = train(
                dataset,
                "gcn",
                scheme,
                0,
                progress=lambda done, total, task=task: bar.update(task, completed=done, total=total),
            )
    table = Table(
        "scheme", "test\nacc.", "avg.\nbits", "compr.", Column("bytes of maps\npacked | FP32", no_wrap=True),
        Column("ms: ours |\nPyG FP32", no_wrap=True), "logit\ndiff.", "preds.\ndiff.", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0),
        title=f"GCN on digits: {dataset.data.num_nodes:,} nodes, {dataset.data.num_edges:,} edges", title_justify="left",
    )  # fmt: skip
    fp32 = runs.pop("fp32").record
    table.add_row("fp32", f"{fp32['test_acc']:.1f}", "32", "1.0", f"{fp32['fp32_bytes']:,}")
    for run in runs.values():
        layers = pyg_layers("gcn", dataset.data.x.size(1), dataset.num_classes, Recipe(**run.record["recipe"]))
        table.add_row(*row(run, PyGModel(layers, 0.0, 0.0).eval()))
    console.print(table)
    console.print(
        "One seed each, accuracy in percent. Average bits and compression count the quantized\n"
        "inputs of layers, bytes every feature map. ms an inference: medians of runs that take\n"
        "turns, one thread each. Differences: the integer model against the fake-quantized one\n"
        "it was frozen from, the largest of a logit and the number of predictions.",
        soft_wrap=True,
    )
    degree = np.bincount(dataset.data.edge_index[1].numpy(), minlength=dataset.data.num_nodes)
    maps = [m for m in feature_maps(runs["a2q"].model, dataset.data.num_nodes) if m.learned]
    draw(maps, degree, PICTURE)
    console.print(
        f"Learned widths against in-degree: {PICTURE}   ({time.perf_counter() - began:.0f} s in all)", soft_wrap=True
    )


if __name__ == "__main__":
    main()
