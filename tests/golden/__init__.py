"""A small workload with a layer of every kind, and all that the simulator says of it.

After a change that is meant to change them, ``python -m tests.golden``, in the top folder, writes the files anew; read their difference then.
"""

from pathlib import Path
from unittest import mock

import numpy as np

from qgnn.accel import report, trace
from qgnn.accel.config import Config, load_config
from qgnn.accel.simulator import simulate
from qgnn.accel.workload import Layer, Workload

FOLDER = Path(__file__).parent
NODES = 20


def workload() -> Workload:
    """20 nodes: a hub, rows without entries, rows of 0 bits; layers of every kind, with a binary input, groups and a real-valued input."""
    rows = np.arange(NODES)
    degrees = np.where(rows == 5, 17, 3 * rows % 5)
    indptr = np.concatenate(([0], np.cumsum(degrees)))
    indices = 7 * np.arange(indptr[-1]) % NODES
    layers = (
        Layer(21, 10, 5 * rows % 9, binary_input=True, name="conv1"),
        Layer(10, 8, 1 + 5 * rows % 8, "gat", heads=2, name="conv2"),
        Layer(8, 6, 2 + 3 * rows % 5, "sage", nns_groups=5, name="conv3"),
        Layer(6, 5, 3, "gin"),
        Layer(5, 3, None, "linear", name="readout"),
    )
    return Workload(indptr, indices, layers, "golden")


def config() -> Config:
    """An array and buffers small enough for several phases, spills and stalls."""
    return load_config(
        "cacti45-hp", pes=8, macs=4, input_buffer=32, edge_buffer=128, weight_buffer=64, hbm_gbs=1,
        fill_cycles=1, requantize_cycles=2, search_cycles=3,
    )  # fmt: skip


def make(folder: Path) -> None:
    """Writes the files. Plots are left out: their bytes change with matplotlib; and the version of qgnn, which changes with every release."""
    graph, choices = workload(), config()
    with mock.patch.object(report, "__version__", "VERSION"):
        document = report.to_dict(simulate(graph, choices), graph, report.comparison(graph, choices))
    report.write(folder, document, plots=False)
    trace.write_trace(graph, choices, folder / "trace.csv")
    graph.save(folder / "workload.npz")
